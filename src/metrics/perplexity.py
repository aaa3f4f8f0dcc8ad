"""Generative perplexity: perplexity of the generated texts under another, causal language model.

    GenerativePerplexity(model="models/gpt2-large")     a local transformers folder with model and tokenizer

WARN: dull, repetitive texts score well; read it together with `src.metrics.variety.Variety`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from src.metrics.bound import NatsPerToken, perplexity_of
from src.metrics.caption import Stat
from src.metrics.pretrained import load_pretrained


class GenerativePerplexity(NatsPerToken):
    """`gen_nll`, the mean negative log-likelihood in nats over all tokens of all texts, and `gen_perplexity`, its exp.

    The model's own tokenizer encodes the texts, after its beginning-of-text token if it has one; otherwise the first
    token of a text is not scored. Texts are truncated to `max_length` tokens.

    model: folder of a causal language model; nothing is downloaded. batch_size: texts per forward call
    """

    def __init__(self, *, model: str, batch_size: int = 16, max_length: int = 1024) -> None:
        super().__init__()
        self.batch_size, self.path = batch_size, model
        config = load_pretrained(model, AutoModelForCausalLM)[0].config
        self.max_length = min(max_length, getattr(config, "max_position_embeddings", max_length))

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        """Add texts; records are ignored."""
        model, tokenizer = load_pretrained(self.path, AutoModelForCausalLM)
        model, device = model.to(self.sums.device), self.sums.device
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        for start in range(0, len(texts), self.batch_size):
            # 1. Ids, padded on the right, where causal attention never reaches: (B, T).
            encoded = [
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[start:][: self.batch_size]
            ]
            rows = [[*begin, *ids][: self.max_length] for ids in encoded]
            longest = max(2, *map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
            lengths = torch.tensor([len(row) for row in rows], device=device)
            mask = torch.arange(longest, device=device) < lengths[:, None]  # false on padding
            # 2. Negative log-likelihoods of each token after the first: (B, T - 1).
            logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
            nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            self.add((nats * mask[:, 1:]).sum(1).double(), (lengths - 1).clamp(min=0))

    def compute(self) -> dict[str, Stat]:
        nll = self.per_token()
        return {"gen_nll": nll, "gen_perplexity": perplexity_of(nll)}
