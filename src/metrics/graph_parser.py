"""Graph strings of sentences and vectors of phrases, by models in local folders: the networks of CAPTURE.

parse(["A dog is on the grass."], folder="flan-t5-base-VG-factual-sg")     ["( dog , on , grass )"]
embed(["dog", "grass"], folder="all-mpnet-base-v2")                        (2, D) float32
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSeq2SeqLM

from src.metrics.pretrained import load_pretrained

TASK = "Generate Scene Graph: "  # what the parsers of FACTUAL were trained with
BEAMS, MAX_INPUT, MAX_OUTPUT = 5, 64, 128  # tokens, as CAPTURE has them
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u201d)]*\s+(?=[\"'\u201c(]*[A-Z0-9])|\n+")


def sentences_of(text: str) -> list[str]:
    """Split at full stops before capitals and at line breaks: simpler than the Punkt tokenizer of the original."""
    return [sentence.strip() for sentence in _SENTENCE_END.split(text) if sentence.strip()]


@torch.no_grad()
def parse(sentences: Sequence[str], *, folder: str, batch_size: int, device: Any = "cpu") -> list[str]:
    """The graph string of each sentence, by beam search. One cut at MAX_OUTPUT loses its broken last triple."""
    model, tokenizer = load_pretrained(folder, AutoModelForSeq2SeqLM)
    graphs: list[str] = []
    for start in range(0, len(sentences), batch_size):
        batch = [TASK + sentence for sentence in sentences[start : start + batch_size]]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=MAX_INPUT, return_tensors="pt").to(device)
        ids = model.to(device).generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            num_beams=BEAMS,
            early_stopping=True,
            max_length=MAX_OUTPUT,
        )
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        graphs += [text if ")" not in text else text[: text.rindex(")") + 1].strip() for text in texts]
    return graphs


@torch.no_grad()
def embed(phrases: Sequence[str], *, folder: str, batch_size: int, device: Any = "cpu") -> Tensor:
    """Mean of the last hidden states over the tokens of each phrase, (N, D) float32, as sentence encoders pool them."""
    model, tokenizer = load_pretrained(folder, AutoModel)
    vectors = []
    for start in range(0, len(phrases), batch_size):
        batch = list(phrases[start : start + batch_size])
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(device)
        states = model.to(device)(**inputs).last_hidden_state.float()  # (B, T, D)
        mask = inputs["attention_mask"][..., None]
        vectors.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(vectors).cpu()
