"""What the adapters to evaluation harnesses share: batches of requests with their generation settings, and likelihoods.

    harness = Harness("runs/sft/model", sampler="refine", tokens_per_step=2, batch_size=16)
    harness.answer([(Request(image=None, prompt="1 + 1 ="), {"until": ["\\n"], "max_gen_toks": 16})])    ["2"]
    harness.score([("1 + 1 =", " 2")], draws=32)                                          [(-0.7, True)]

The prompt format of the model is applied to every prompt, as in `src.generate`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from datamodules.collate import Collate
from datamodules.shards import Sample
from src.generation.captioner import Captioner, Request, check_request, noise_key
from src.io.errors import UserError
from src.metrics.bound import response_nats
from src.samplers.base import AnySampler

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # names of one setting
HARMLESS = {"top_p": (None, 1), "top_k": (None, 0), "num_beams": (None, 1), "use_cache": (True, False)}
Sampling = tuple[tuple[str, Any], ...]  # settings of a sampler and their values
logger = logging.getLogger(__name__)


class Harness:
    """A model and a sampler behind an evaluation harness.

    path, dtype, prompt_format: as in `Captioner.load`; sampler, settings: as in `Captioner.sampler`
    device: also; "cuda:0", the default of both harnesses, means the CPU where there is no CUDA device
    batch_size: a number, also as text
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sampler: str = "refine",
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        prompt_format: str | None = None,
        **settings: Any,
    ) -> None:
        if not str(batch_size).isdigit() or not int(batch_size):
            raise UserError(f"batch_size must be a number, at least 1, got {batch_size!r}")
        device = None if str(device).startswith("cuda") and not torch.cuda.is_available() else device
        self.captioner = Captioner.load(path, device=device, dtype=dtype, prompt_format=prompt_format)
        self.sampler = self.captioner.sampler(sampler, **settings)
        self.seed, self.batch_size = seed, int(batch_size)
        self._warned: set[str] = set()

    def answer(self, requests: Sequence[tuple[Request, Mapping[str, Any]]]) -> list[str]:
        """The text of each response, up to the first of its stop texts.

        Settings: `until`, `max_gen_toks` (or `max_new_tokens`, `max_tokens`), `do_sample`, `temperature`, `top_p`.
        The sampler always writes a response of its own length, which the model was trained with, and the limit cuts
        it; a warning names settings without effect. The seed of the n-th copy of a request object is `seed` + n.
        """
        copies: dict[int, int] = {}
        groups: dict[Sampling, list[tuple[int, Request]]] = {}
        for index, (request, settings) in enumerate(requests):
            copies[id(request)] = copy = copies.get(id(request), -1) + 1
            group = groups.setdefault(self._sampling(settings), [])
            group.append((index, replace(request, seed=self.seed + copy)))
        texts = [""] * len(requests)
        for sampling, group in groups.items():
            sampler = self.captioner.sampler(self.sampler, **dict(sampling))
            captions = self.captioner.answer([request for _, request in group], sampler, batch_size=self.batch_size)
            for (index, _), caption in zip(group, captions, strict=True):
                settings = requests[index][1]
                text = self.captioner.codec.decode(caption.ids[: self._limit(settings)])
                texts[index] = cut(text, settings.get("until"))
        return texts

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[str, str]], *, draws: int) -> list[tuple[float, bool]]:
        """Of (prompt, response): the lower bound on the log-likelihood in nats, and whether greedy sampling writes it.

        The bound is that of `src.metrics.bound`, of the response with its end. The noise is the same for all responses
        to a prompt, so that their differences vary less than they do. Whitespace around a response does not count.
        """
        greedy = self.captioner.sampler(self.sampler, temperature=0.0)
        prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
        answers = self.answer([(Request(image=None, prompt=prompt), {}) for prompt in prompts])
        written = dict(zip(prompts, answers, strict=True))
        scores = []
        for start in range(0, len(pairs), self.batch_size):
            part = [(prompt, response.strip()) for prompt, response in pairs[start : start + self.batch_size]]
            bounds = (-self._nats(part, greedy, draws)).tolist()
            same = [written[prompt].strip() == response for prompt, response in part]
            scores += zip(bounds, same, strict=True)
        return scores

    def _nats(self, pairs: Sequence[tuple[str, str]], sampler: AnySampler, draws: int) -> torch.Tensor:
        codec, backbone, samples = self.captioner.codec, self.captioner.backbone, []
        for prompt, text in pairs:
            check_request(codec, sampler, prompt=prompt, text=None, positions=self.captioner.positions, images=0)
            if (length := len(codec.encode(text)[0])) >= sampler.length:
                raise UserError(f"{text[:60]!r} has {length} tokens, a response at most {sampler.length - 1}")
            record = {"prompt": prompt, "captions": [{"text": text}]}
            samples.append(Sample(noise_key(None, prompt), record, b"", None))
        collate = Collate(codec, response_length=sampler.length, layout=backbone.layout, seed=0, first=True)
        batch = collate(samples)[0].to(self.captioner.device)
        return response_nats(backbone, batch, special=codec.special, draws=draws, seed=self.seed)

    def _sampling(self, settings: Mapping[str, Any]) -> Sampling:
        """The sampler's settings of a request: greedy unless it says otherwise."""
        sampling = bool(settings.get("do_sample", settings.get("temperature")))
        used: dict[str, Any] = {"temperature": float(settings.get("temperature", 1.0)) if sampling else 0.0}
        if sampling and settings.get("top_p") is not None and hasattr(self.sampler, "top_p"):
            used["top_p"] = float(settings["top_p"])
        known = {"until", "do_sample", *LIMITS, *used} | (set() if sampling else {"top_p", "top_k", "temperature"})
        for name in settings.keys() - known:
            if settings[name] not in HARMLESS.get(name, ()):
                self._warn(f"{name}={settings[name]!r} has no effect")
        return tuple(used.items())

    def _limit(self, settings: Mapping[str, Any]) -> int:
        limit = next((int(settings[name]) for name in LIMITS if settings.get(name) is not None), self.sampler.length)
        if limit > self.sampler.length:
            self._warn(f"responses end after {self.sampler.length} tokens (length), the task allows {limit}")
        return limit

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            logger.warning(message)
        self._warned.add(message)


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of the stop texts; an empty one stops nothing."""
    stops = [until] if isinstance(until, str) else until or []
    return text[: min((text.index(stop) for stop in stops if stop and stop in text), default=len(text))]
