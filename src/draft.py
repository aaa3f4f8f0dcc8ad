"""Draft: let a model caption training images, for an expert to revise.

    python -m src.draft conf=draft model.path=runs/stage1/model data.path=data/scenes out=drafts
    python -m src.draft conf=draft model.path=... data.path=... out=drafts num=4096 tokens_per_step=[1,4]
    torchrun --nproc-per-node 8 -m src.draft conf=draft ...          or srun, on many nodes: each draws its share

    model, images -> draw_drafts (src/rounds/drafts.py) -> out/drafts-000000-00.tar, ..., out/index.json

A killed run is continued by the same command; finished shards are not drawn again. The drafts are those that
the online callback draws for the round of the same number and seed. No image is drafted twice in a round, so a `num`
above the number of training images means all of them. At the end it prints the `src.revise` command for the drafts.
"""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from src.cli.config import load_config, path_of
from src.cli.entrypoint import main_guard
from src.cli.instantiate import build, check
from src.distributed.parallel import Team
from src.io.errors import UserError
from src.io.lock import locked
from src.models.inference import warn_if_length_differs
from src.models.tiling import check_layout
from src.rounds.drafts import capped, draft_batch, draw_drafts, settings_of
from src.text.tokenizer import Codec
from src.training.launch import explained, launched_first, together


@main_guard
def main(argv: list[str]) -> None:
    """Draw the drafts that the config asks for."""
    cfg = load_config(argv, verb="src.draft", needs=["data", "num", "round", "sampler"])
    check(cfg, offers=("codec", "seed"))
    if cfg.round < 1:
        raise UserError(f"round must be at least 1, got {cfg.round}")
    lock = locked(path_of(cfg, "out")) if launched_first() else nullcontext()
    with lock, explained(), together() as team:
        found = team.gather(_draw(cfg, team))
    if not team.first:
        return
    num, scenes, damaged = (
        sum(n for n, _, _ in found),
        any(s for _, s, _ in found),
        found[0][2] - sum(n for n, _, _ in found),
    )
    lost = f" ({damaged} images could not be read and have none)" if damaged else ""
    sys.stdout.write(f"{cfg.out}: {num} drafts{lost}\nnext: {_next(cfg, scenes=scenes)}\n")


def _draw(cfg: DictConfig, team: Team) -> tuple[int, bool, int]:
    """How many drafts this process has, whether they are of scenes, and how many all were to draw."""
    codec = Codec.load(cfg.model.path)
    data = build(cfg.data, codec=codec, seed=cfg.seed)
    data.place = (team.rank, team.size)
    device = (
        f"cuda:{os.environ.get('LOCAL_RANK', os.environ.get('SLURM_LOCALID', 0))}"
        if torch.cuda.is_available()
        else "cpu"
    )
    backbone = build(cfg.model).eval().to(device)
    check_layout(data.layout, backbone.layout)
    warn_if_length_differs(backbone, cfg.data.response_length, name="data.response_length")
    num = capped(cfg.num, data.draft_settings()["data_count"], name="num")
    sampler, speeds, seed = build(cfg.sampler), list(cfg.tokens_per_step), cfg.seed + cfg.round
    settings = settings_of(
        backbone,
        sampler,
        codec=codec,
        tokens_per_step=speeds,
        num=num,
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
        data.draft_dataloader(cfg.round, num),
        draft,
        tokens_per_step=speeds,
        tokenizer=codec.fingerprint,
        settings=settings,
        total=num,
        team=team,
    )
    drawn, scenes = 0, False
    for chunk in chunks:  # each is on disk by now
        drawn, scenes = drawn + len(chunk), "scene" in chunk[0].record
    return drawn, scenes, num


def _next(cfg: DictConfig, *, scenes: bool) -> str:
    """The command that revises the drafts; only scenes have an exact expert."""
    conf = "revise" if scenes else "revise,expert/reference"
    named = {"drafts": cfg.out, "out": f"rounds/round-{cfg.round:04d}", "tokenizer": cfg.model.path}
    return shlex.join(["python", "-m", "src.revise", f"conf={conf}", *(f"{k}={v}" for k, v in named.items())])


if __name__ == "__main__":
    main()
