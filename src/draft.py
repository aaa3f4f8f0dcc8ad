"""Draft: caption training images with a model, for an expert to revise.

    python -m src.draft conf=draft model.path=runs/stage1/model data.path=data/scenes out=drafts
    python -m src.draft conf=draft model.path=... data.path=... out=drafts num=4096 tokens_per_step=[1,4]
    torchrun --nproc-per-node 8 -m src.draft conf=draft ...          or srun: each rank draws its share

    model, images -> draw_drafts (src/rounds/drafts.py) -> out/drafts-000000-00.tar, ..., out/index.json

The same command continues a killed run and draws no finished shard again. The drafts equal those of the online
callback for a round of the same number and seed. No image is drafted twice in a round, so a `num` above the number of
training images means all of them. At the end it prints the `src.revise` command for the drafts.
"""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from src.cli.config import load_config, path_of
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import build, check, plain
from src.io.errors import UserError
from src.io.lock import locked
from src.io.words import counted
from src.models.hf.folder import fingerprint
from src.models.inference import warn_if_length_differs, with_layout
from src.models.tiling import check_layout
from src.rounds.drafts import Drafter, cap_num_drafts, draw_drafts
from src.text.tokenizer import Codec
from src.training.build import build_on_meta
from src.training.launch import is_rank0_by_env, process_group, report_lost_ranks


@main_guard
def main(argv: list[str]) -> None:
    """Draw the drafts of one round into `out`."""
    cfg = load_config(argv, verb="src.draft", needs=NEEDS["src.draft"])
    check(cfg, offers=("codec", "seed"))
    if cfg.round < 1:
        raise UserError(f"round must be at least 1, got {cfg.round}")
    lock = locked(path_of(cfg, "out")) if is_rank0_by_env() else nullcontext()
    with lock, report_lost_ranks(), process_group() as team:
        # 1. Build the data and the model.
        codec = Codec.load(cfg.model.path)
        node = with_layout(plain(cfg.data), build_on_meta(cfg.model, codec).layout)
        data = build(node, codec=codec, seed=cfg.seed)
        data.place = (team.rank, team.size)
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
        backbone, sampler = build(cfg.model).eval().to(device), build(cfg.sampler)
        if sampler.compile:
            backbone.compile_blocks()
        check_layout(data.layout, backbone.layout)
        warn_if_length_differs(backbone, cfg.data.response_length, name="data.response_length")
        num = cap_num_drafts(cfg.num, data.draft_settings()["data_count"], name="num")
        drafter = Drafter(
            backbone=backbone,
            model=fingerprint(backbone),
            sampler=sampler,
            codec=codec,
            tokens_per_step=list(cfg.tokens_per_step),
            num=num,
            round_number=cfg.round,
            seed=cfg.seed + cfg.round,
            data=data.draft_settings(),
            device=device,
        )
        # 2. Draw this rank's share. A chunk is on disk when it is yielded.
        num_drawn, has_scenes = 0, False
        for chunk in draw_drafts(Path(cfg.out), data.draft_dataloader(cfg.round, num), drafter, team=team):
            num_drawn, has_scenes = num_drawn + len(chunk), "scene" in chunk[0].record
        per_rank = team.gather((num_drawn, has_scenes))
    if not team.is_rank0:
        return
    # 3. Print the next command: with the exact expert for scenes, else with the reference captions.
    total = sum(count for count, _ in per_rank)
    damaged = f" ({counted(num - total, 'image')} could not be read)" if num > total else ""
    conf = "conf=revise" if any(is_scene for _, is_scene in per_rank) else "conf=revise,expert/reference"
    settings = [f"drafts={cfg.out}", f"out=rounds/round-{cfg.round:04d}", f"tokenizer={cfg.model.path}"]
    command = shlex.join(["python", "-m", "src.revise", conf, *settings])
    sys.stdout.write(f"{cfg.out}: {counted(total, 'draft')}{damaged}\nnext: {command}\n")


if __name__ == "__main__":
    main()
