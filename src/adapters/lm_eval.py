"""The model `rediff` of lm-eval (EleutherAI, 0.4), for text models.

    pip install -e '.[lm-eval]'
    python -m src.adapters.lm_eval run --model rediff --model_args path=runs/sft/model,tokens_per_step=2 --tasks gsm8k

Arguments of the model: path, sampler, seed, draws (of the bound), and settings of the sampler. From Python, import this
module and call `lm_eval.simple_evaluate(model="rediff", model_args={"path": ...})`.
"""

from __future__ import annotations

from typing import Any

from src.adapters.harness import Harness
from src.generation.captioner import Request
from src.io.errors import UserError

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise UserError("this adapter needs lm-eval: pip install -e '.[lm-eval]'") from error


@register_model("rediff")
class ReDiff(LM):
    """Tasks of generation, and of multiple choice by a bound on the likelihood (`Harness.score`)."""

    def __init__(
        self,
        path: str,
        *,
        draws: int = 32,
        max_batch_size: int | None = None,  # given by lm-eval, for its batch_size=auto
        **settings: Any,
    ) -> None:
        super().__init__()
        self.harness = Harness(path, **settings)
        self.draws = draws

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = {id(request): Request(image=None, prompt=request.args[0]) for request in requests}  # one for repeats
        texts = self.harness.answer([(prompts[id(request)], request.args[1]) for request in requests])
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        scores = self.harness.score([request.args for request in requests], draws=self.draws)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(
            "no likelihood of texts without a prompt, of any length: use tasks of output_type generate_until or "
            "multiple_choice, or the perplexity of conf=evaluate_text"
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        raise NotImplementedError("the model's prompt format is always applied: leave out --apply_chat_template")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
