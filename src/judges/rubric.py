"""Rubric: the facts of scene graphs as yes-or-no questions about a text, for any local model that reads.

    Rubric(graphs="graphs.jsonl")         graphs by text, of captions and references (`src.metrics.capture` writes them)
    verdict {"recall_object_yes", "recall_object_facts", "recall_object_failed", "precision_object_yes", ...}
            and of each fact, by its words: {"recall: dog is brown": 1, ...}      1 yes, 0 no, None no usable reply

Recall: which facts of the references does the caption state? Precision: which of the caption's do the references? Each
is one request with all facts, repeated for those that stay open. No image is shown, so a true detail that no reference
mentions costs precision. The idea is PoSh's (arXiv 2510.19060): a graph makes a rubric, a reader fills it in.
NOTE: prompt and averaging are ours; agreement with people was not measured, and PoSh's numbers are not comparable.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from src.chat.reading import without_thoughts
from src.io.errors import UserError
from src.judges.base import Dialogue, Item, Judge, Request
from src.judges.numbered import ask_all
from src.text.scene_graphs import merge, read_graphs

SAMPLING = {"temperature": 0.0, "max_tokens": 4096}
KINDS = ("object", "attribute", "relation")
cached_graphs = functools.cache(read_graphs)


class Rubric(Judge):
    """graphs: the file"""

    name = "rubric"

    def __init__(self, *, graphs: str, prompts: str | Path | None = None, attempts: int = 3) -> None:
        super().__init__(prompts=prompts, attempts=attempts)
        self.graphs = graphs

    def verdict(self, item: Item) -> Dialogue:
        # 1. The facts of either side, and the text that may state them.
        references = item.need("references")
        facts = {"recall": self.facts_of(references), "precision": self.facts_of([item.caption or ""])}
        texts = {"recall": item.caption, "precision": "\n\n".join(references)}
        # 2. A request for each side. Without a caption nothing is asked.
        verdict: dict[str, float | None] = {"missing": float(item.caption is None)}
        for side, text in texts.items():
            numbered = dict(enumerate(facts[side])) if item.caption is not None else {}
            check = functools.partial(self._check, text or "")
            given = yield from ask_all(check, numbered, read_yes, attempts=self.attempts)
            answers = {fact: given.get(number) for number, fact in enumerate(facts[side])}
            # 3. Numbers by kind of fact, then each fact by its words.
            for kind in KINDS:
                of_kind = [answers[fact] for fact in answers if facts[side][fact] == kind]
                verdict[f"{side}_{kind}_yes"] = of_kind.count(1)
                verdict[f"{side}_{kind}_facts"] = len(of_kind)
                verdict[f"{side}_{kind}_failed"] = of_kind.count(None)
            verdict |= {f"{side}: {fact}": answer for fact, answer in answers.items()}
        return verdict

    def _check(self, text: str, statements: str) -> Request:
        return self.request("check", {"text": text, "statements": statements}, sampling=SAMPLING)

    def facts_of(self, texts: Sequence[str]) -> dict[str, str]:
        """A sentence for each fact of the graph of the texts, and its kind. Raises UserError for one without graphs."""
        lines = cached_graphs(self.graphs)
        if unknown := [text for text in texts if text.strip() not in lines]:
            raise UserError(f"{self.graphs} has no graphs of {unknown[0][:60]!r}; run conf=eval/capture with it first")
        graph = merge(graph for text in texts for graph in lines[text.strip()]["graphs"])
        objects = {f"There is: {name}": "object" for name in graph.objects if name}
        pairs = ((name, value) for name, values in graph.attributes.items() for value in values)
        attributes = {f"{name} is {value}": "attribute" for name, value in pairs}
        return {**objects, **attributes, **{" ".join(triple): "relation" for triple in graph.relations}}


def read_yes(text: str) -> float | None:
    """1 for yes, 0 for no, None for anything else."""
    word = without_thoughts(text).strip(" \t*_.,;:!\"'`()[]").lower()
    first = word.split()[0].strip(".,;:*_") if word else ""
    return {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}.get(first)
