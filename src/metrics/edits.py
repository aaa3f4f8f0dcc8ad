"""Were an expert's edits right? Scored by a second reader of scene captions, independent of the expert and the grammar.

    count_edits("run/rounds/round-0001", codec) -> Counter(truer=812, same=120, falser=9)

An edit is judged in the corrected caption, against the same caption without it: `truer` if a larger share of the claims
is true with it. Edits of grammar change no claim and are the `same`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from src.io.shards import read_manifest, read_shard
from src.scenes.graph import Scene
from src.scenes.second_reader import count_claims
from src.text.align import Span, apply_spans
from src.text.tokenizer import Codec


def count_edits(folder: str | Path, codec: Codec) -> Counter[str]:
    """The placed edits of a finished round, by what they do to the truth; none where the samples have no scenes."""
    counts = Counter[str]()
    for entry in read_manifest(folder)["shards"]:
        for sample in read_shard(Path(folder) / entry["name"]):
            record = sample["json"]
            if "scene" not in record:
                continue
            scene, spans = Scene.from_dict(record["scene"]), [Span(**span) for span in record["spans"]]
            with_all = _share(scene, record["draft_ids"], spans, codec)
            for left_out in spans:
                without = _share(scene, record["draft_ids"], [span for span in spans if span is not left_out], codec)
                counts["truer" if with_all > without else "same" if with_all == without else "falser"] += 1
    return counts


def _share(scene: Scene, ids: list[int], spans: list[Span], codec: Codec) -> float:
    true, claims = count_claims(scene, codec.decode(apply_spans(ids, spans)))
    return true / max(claims, 1)
