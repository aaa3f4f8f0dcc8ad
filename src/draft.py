"""Draft: let a model caption training images, for an expert to revise.

    python -m src.draft conf=draft model.path=runs/stage1/model data.path=data/scenes out=drafts
    python -m src.draft conf=draft model.path=... data.path=... out=drafts num=4096 tokens_per_step=[1,4]

    model, images -> draw_drafts (src/drafting.py) -> out/drafts-rank-0000-000000.tar, ..., out/index.json

A killed run is continued by the same command; finished shards are not drawn again. The drafts are those that
the online callback draws for the round of the same number and seed. Next: `python -m src.revise`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from src.components import ConfigError, build, check
from src.config import load_config, main_guard
from src.drafting import draft_batch, draw_drafts, settings_of
from src.tokenizer import Codec


@main_guard
def main(argv: list[str]) -> None:
    """Draw the drafts that the config asks for."""
    cfg = load_config(argv)
    check(cfg, offers=("codec", "seed"))
    try:
        _draw(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _draw(cfg: DictConfig) -> None:
    codec = Codec.load(cfg.model.path)
    data = build(cfg.data, codec=codec, seed=cfg.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = build(cfg.model).eval().to(device)
    sampler, speeds, seed = build(cfg.sampler), list(cfg.tokens_per_step), cfg.seed + cfg.round
    settings = settings_of(
        backbone,
        sampler,
        codec=codec,
        tokens_per_step=speeds,
        num=cfg.num,
        round_number=cfg.round,
        seed=seed,
        data=data.draft_settings(),
    )
    draft = partial(
        draft_batch,
        backbone,
        sampler=sampler,
        codec=codec,
        seed=seed,
        fingerprint=settings["model"],
        device=device,
    )
    chunks = draw_drafts(
        Path(cfg.out),
        data.draft_dataloader(cfg.round, cfg.num),
        draft,
        tokens_per_step=speeds,
        tokenizer=codec.fingerprint,
        settings=settings,
        total=cfg.num,
    )
    for _ in chunks:
        pass  # each is on disk by now


if __name__ == "__main__":
    main()
