"""Backbones for the tests of samplers: by arithmetic, and a small random model.

B rows, L response positions, V vocabulary.
"""

from __future__ import annotations

import torch

from src.models.llada_v import LLaDAV
from src.types import Prefix


def rows_of(rows):
    """A prefix that only tells which row is which."""
    return Prefix(torch.tensor(list(rows), dtype=torch.float32)[:, None, None])


def small_model(vocab_size, *, attention="prefix", sharpness=5.0, seed=3):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LLaDAV(decoder={"vocab_size": vocab_size, "attention": attention, **sizes}, vision=None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(sharpness)
    return model


class Recording:
    """A backbone and the texts that it reads: `texts` of (row of the call, ids), one for each row of each call."""

    def __init__(self, model):
        self.model, self.texts = model, []

    def encode_prefix(self, inputs):
        return self.model.encode_prefix(inputs)

    def __call__(self, prefix, tokens, **settings):
        self.texts += enumerate(tokens.tolist())
        return self.model(prefix, tokens, **settings)


class Fixed:
    """Says `logits` (B, L, V) whatever it reads, of one row if there is only one. `texts`: (row, ids) that it reads."""

    def __init__(self, logits):
        self.logits, self.texts = logits, []

    def encode_prefix(self, inputs):  # of guidance: the same rows
        return rows_of(range(len(inputs["prompt_ids"])))

    def __call__(self, prefix, tokens, *, attend=None, positions=None):
        rows = prefix.embeds[:, 0, 0].long() % len(self.logits)
        self.texts += zip(prefix.embeds[:, 0, 0].int().tolist(), tokens.tolist(), strict=True)
        logits = self.logits[rows]
        return logits if positions is None else logits[positions[:, : logits.shape[1]]]


class Table:
    """Logits are sums of what the neighbours, the place and the row say; an unguided row (-1) is the last one.

    sharp, listens: how sure each row is, and how much it listens to its text. `likely`: ids that get `bonus`
    """

    def __init__(self, *, vocab_size, length, seed, sharp, listens, likely, bonus):
        made = torch.Generator().manual_seed(seed)
        self.left, self.right = (torch.randn(vocab_size, vocab_size, generator=made) for _ in range(2))
        self.own = torch.randn(len(sharp), length, vocab_size, generator=made)
        self.own[:, :, likely] += bonus
        self.sharp, self.listens, self.rows = sharp, listens, 0

    def encode_prefix(self, inputs):
        return rows_of([-1] * len(inputs["prompt_ids"]))

    def say(self, row, tokens):
        """(L, V) logits of one row."""
        self.rows += 1
        text = torch.tensor(tokens)
        heard = self.left[text.roll(1)] + self.right[text.roll(-1)] + 0.5 * self.left[text]
        return self.sharp[row] * self.own[row] + self.listens[row] * heard

    def __call__(self, prefix, tokens, *, attend=None, positions=None):
        rows = zip(prefix.embeds[:, 0, 0].int().tolist(), tokens.tolist(), strict=True)
        logits = torch.stack([self.say(row, text) for row, text in rows])
        return logits if positions is None else logits[positions]
