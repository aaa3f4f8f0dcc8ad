"""Revise: ask an expert about drafts, and write those with a correction as a round to train on.

    python -m src.revise conf=revise drafts=drafts out=rounds/round-0001 tokenizer=runs/stage1/model

    drafts -> expert -> edits aligned to tokens (src/align.py) -> out/rank-0000-000000.tar, ... out/index.json

A killed run is continued by the same command; nothing that was answered is asked again. To train on the
round, list it in `data.rounds`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from src.components import ConfigError, build, check
from src.config import load_config, main_guard
from src.rounds import revise_round
from src.shards import read_manifest
from src.tokenizer import Codec


@main_guard
def main(argv: list[str]) -> None:
    """Write the round that the config asks for and say what became of the drafts."""
    cfg = load_config(argv)
    check(cfg, offers=("codec",))
    try:
        codec = Codec.load(cfg.tokenizer)
        drafts = Path(cfg.drafts)
        made = revise_round(
            cfg.out,
            drafts,
            expert=build(cfg.expert, codec=codec),
            codec=codec,
            per_shard=cfg.per_shard,
            total=read_manifest(drafts)["counts"]["written"],
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    counts = ", ".join(f"{count} {name}" for name, count in made.manifest["counts"].items())
    sys.stdout.write(f"{made.path}: {counts}\n")


if __name__ == "__main__":
    main()
