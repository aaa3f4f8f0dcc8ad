"""The model `rediff` of lmms-eval (0.7): captions and answers about one image, or about none.

    pip install lmms-eval               brings a torch of its own choice along: see docs/evaluation.md
    python -m src.adapters.lmms_eval --model rediff --model_args path=runs/stage2/model,tokens_per_step=4 --tasks pope

Arguments of the model: path, sampler, seed, and settings of the sampler.
"""

from __future__ import annotations

from typing import Any

from src.adapters.harness import Harness
from src.generation.captioner import Request
from src.io.errors import UserError

try:
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
    from lmms_eval.models import MODEL_REGISTRY_V2  # pyright: ignore[reportMissingImports]
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise UserError(f"this adapter needs lmms-eval, and what it imports ({error}): see docs/evaluation.md") from error

MODEL_REGISTRY_V2.register_manifest(
    ModelManifest(model_id="rediff", simple_class_path="src.adapters.lmms_eval.ReDiff"), overwrite=True
)


class ReDiff(lmms):
    """Tasks of generation only. Raises UserError for a question with several images, or a video."""

    is_simple = True

    def __init__(
        self,
        path: str,
        *,
        max_batch_size: int | None = None,  # given by lmms-eval
        **settings: Any,
    ) -> None:
        super().__init__()
        self.harness = Harness(path, **settings)

    def generate_until(self, requests: list[Any]) -> list[str]:
        questions = {id(request): self._question(*request.args) for request in requests}  # one for repeats
        return self.harness.answer([questions[id(request)] for request in requests])

    def _question(self, prompt, settings, doc_to_visual, doc_id, task, split) -> tuple[Request, dict[str, Any]]:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
        if len(visuals := visuals or []) > 1 or any(isinstance(visual, str) for visual in visuals):
            raise UserError(f"{task}, question {doc_id}: the model takes one image, not {len(visuals)} or a video")
        return Request(image=visuals[0] if visuals else None, prompt=prompt), settings

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("no likelihoods here: use tasks of output_type generate_until")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("one round only: use tasks of output_type generate_until")


if __name__ == "__main__":
    from lmms_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
