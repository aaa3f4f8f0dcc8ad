"""Generative perplexity: perplexity of the generated texts under another, causal language model.

    GenerativePerplexity(model="models/gpt2-large")     a local transformers folder with model and tokenizer

WARN: dull, repetitive texts score well; read it together with `src.metrics.variety.Variety`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.io.errors import UserError
from src.metrics.caption import Stat, ratio_stat


class GenerativePerplexity(Metric):
    """`gen_nll`, the mean negative log-likelihood in nats over all tokens of all texts, and `gen_perplexity`, its exp.
    Standard errors are over texts.

    The model's own tokenizer encodes the texts, after its beginning-of-text token if it has one; otherwise the first
    token of a text is not scored. Texts are truncated to `max_length` tokens.

    model:      folder of a causal language model; nothing is downloaded
    batch_size: texts per forward call

    Raises UserError if the folder holds no such model, and `compute` ValueError if no text has a token to score.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    sums: Tensor
    count: Tensor

    def __init__(self, *, model: str, batch_size: int = 16, max_length: int = 1024) -> None:
        super().__init__()
        if batch_size < 1 or max_length < 2:
            raise UserError(f"batch_size must be at least 1 and max_length 2, got {batch_size} and {max_length}")
        self.batch_size, self.path = batch_size, model
        self.max_length = min(max_length, getattr(_load(model)[0].config, "max_position_embeddings", max_length))
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")  # s, n, s^2, sn, n^2
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        """Add texts; records are ignored."""
        for start in range(0, len(texts), self.batch_size):
            ids = [self._ids(text) for text in texts[start : start + self.batch_size]]
            nats, tokens = self._nats(ids).double(), torch.tensor([max(0, len(row) - 1) for row in ids]).double()
            nats, tokens = nats.to(self.sums.device), tokens.to(self.sums.device)
            self.sums += torch.stack([nats, tokens, nats**2, nats * tokens, tokens**2]).sum(1)
        self.count += len(texts)

    def compute(self) -> dict[str, Stat]:
        """Statistics by name; `n` counts texts."""
        nll = ratio_stat(self.sums.tolist(), int(self.count))
        perplexity = math.exp(nll["mean"])
        se = None if nll["se"] is None else nll["se"] * perplexity
        return {"gen_nll": nll, "gen_perplexity": Stat(mean=perplexity, se=se, n=nll["n"])}

    def _ids(self, text: str) -> list[int]:
        tokenizer = _load(self.path)[1]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return [*begin, *ids][: self.max_length]

    def _nats(self, rows: list[list[int]]) -> Tensor:
        """Sum of the negative log-likelihoods of each row's tokens after the first: (B,)."""
        model = _load(self.path)[0].to(self.sums.device)
        longest = max(2, *map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.sums.device)  # (B, T)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        # (B, T) bool, false on padding, which is on the right, where causal attention never reaches it
        mask = torch.arange(longest, device=ids.device) < lengths[:, None]
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
        nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (B, T - 1)
        return (nats * mask[:, 1:]).sum(1)


@functools.lru_cache(maxsize=1)
def _load(path: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, cached over all cells of an evaluation."""
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"no language model in {path!r}: name a local folder with its config, weights and tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a causal language model with a tokenizer: {error}") from error
    return model.eval().requires_grad_(False), tokenizer
