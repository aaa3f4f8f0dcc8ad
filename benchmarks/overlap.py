"""Time that the expert adds to a round: overlapped with drafting, and after it.

    python -m benchmarks.overlap                          one process, replies in half a second, 64 requests at once
    python -m benchmarks.overlap --ranks 2 --latency 2

Three modes in turn, each with new folders: `drafts` only draws; `overlapped` is `run_round`, which sends a chunk to
the expert while the next one is drawn; `afterwards` draws all drafts and then revises them (the verbs `draft` and
`revise`). Printed is the time beyond that of the drafts alone, as a share of it. The model is the base model of the
repository, the images are scenes, and the expert is the OpenAI client against a local server in its own process that
answers each draft with one edit. Every rank draws with one thread and needs a core; the server needs one more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from datamodules.captions import CaptionData
from src.chat.limits import Limits
from src.distributed.parallel import Team
from src.experts.openai import OpenAIExpert
from src.models.hf.folder import from_pretrained
from src.preparation.scenes import Scenes
from src.rounds.drafts import Drafter, draw_drafts
from src.rounds.round import RoundOptions, revise_round, run_round
from src.samplers.sampler import Sampler
from src.scenes.graph import COLOURS
from src.text.tokenizer import Codec
from src.types import Round
from testing.servers.scripted import Http, Request, Scripted, reply

BASE = Path(__file__).parents[1] / "assets" / "base"
SPEEDS = [1, 4, 8]  # tokens per step
LENGTH = 64  # response length in tokens


def main() -> None:
    """Print one line per run, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"drafts": 384, "at-once": 64, "ranks": 1, "runs": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--latency", type=float, default=0.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(options.latency) as url:
        Scenes(out=f"{folder}/scenes", image_size=48, response_length=LENGTH, prompt="Describe the image in detail.",
               num_train=options.drafts, num_val=8, num_test=8, captions_per_image=1, objects=[1, 2], noise=2.0,
               per_shard=512, vocab_size=400, tokenizer=str(BASE)).run()  # fmt: skip
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=work, args=(n, Path(folder), url, options)) for n in range(options.ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


def work(rank: int, folder: Path, url: str, options: argparse.Namespace) -> None:
    """Run and time the modes on one rank."""
    torch.set_num_threads(1)
    if options.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=options.ranks)
    team, bench = Team(), Bench(folder, url, options)
    bench.team = team
    shares: dict[str, list[float]] = {}
    for number in range(options.runs + 1):
        seconds = {}
        for name in ("drafts", "overlapped", "afterwards"):
            mode: Callable[[Path], None] = getattr(bench, name)
            team.gather(None)
            began = time.perf_counter()
            mode(folder / f"{name}-{number}")
            seconds[name] = max(team.gather(time.perf_counter() - began))
        if not number or not team.is_rank0:  # the first run warms up
            continue
        parts = []
        for name in ("overlapped", "afterwards"):
            share = seconds[name] / seconds["drafts"] - 1
            shares.setdefault(name, []).append(share)
            parts.append(f"{name} {seconds[name]:.1f} s ({share:+.1%})")
        sys.stdout.write(f"drafts {seconds['drafts']:.1f} s, {', '.join(parts)}\n")
    if team.is_rank0:
        medians = (f"{name} {statistics.median(values):+.1%}" for name, values in shares.items())
        sys.stdout.write(
            f"{options.drafts} drafts, {options.ranks} ranks, {options.at_once} at once, "
            f"{options.latency} s per reply; median beyond the drafts: {', '.join(medians)}\n"
        )
    if options.ranks > 1:
        dist.destroy_process_group()


class Bench:
    """The three modes, as methods that take the folder to write."""

    team: Team

    def __init__(self, folder: Path, url: str, options: argparse.Namespace) -> None:
        self.url, self.options, self.codec = url, options, Codec.load(BASE)
        self.data = CaptionData(
            path=str(folder / "scenes"), codec=self.codec, batch_size=24, response_length=LENGTH, image_size=48, seed=0
        )
        self.backbone, self.sampler = from_pretrained(BASE).eval(), Sampler(length=LENGTH, eos_last=True)

    def drafts(self, folder: Path) -> None:
        for _ in draw_drafts(folder, self._batches, self._drafter, team=self.team):
            pass

    def overlapped(self, folder: Path) -> None:
        self._check(run_round(folder, self._batches, self._drafter, options=self._round_options))

    def afterwards(self, folder: Path) -> None:
        self.drafts(folder / "drafts")
        self._check(revise_round(folder / "round", folder / "drafts", options=self._round_options))

    def _check(self, finished: Round) -> None:
        if finished.manifest["counts"]["revised"] != self.options.drafts:
            sys.exit(f"not all drafts were answered: {finished.manifest['counts']}, {finished.manifest['failures']}")

    @property
    def _batches(self):
        self.data.place = (self.team.rank, self.team.size)
        return self.data.draft_dataloader(1, self.options.drafts)

    @property
    def _drafter(self) -> Drafter:
        return Drafter(
            backbone=self.backbone,
            model=str(BASE),
            sampler=self.sampler,
            codec=self.codec,
            tokens_per_step=SPEEDS,
            num=self.options.drafts,
            round_number=1,
            seed=1,
            data=self.data.draft_settings(),
        )

    @property
    def _round_options(self) -> RoundOptions:
        expert = OpenAIExpert(
            codec=self.codec,
            model="m",
            base_url=self.url,
            key_env=None,
            profile="vllm",
            repair=0,
            limits=Limits(concurrency=self.options.at_once),
        )
        return RoundOptions(expert=expert, codec=self.codec, per_shard=512, patience=60.0, team=self.team)


@contextmanager
def served(latency: float):
    """Context with the address of a server in its own process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, latency))
    server.start()
    try:
        yield ours.recv()
    finally:
        ours.send("stop")
        server.join()


def serve(pipe: Connection, latency: float) -> None:
    with Scripted(partial(corrected, latency)) as server:
        pipe.send(server.url)
        pipe.recv()


def corrected(latency: float, request: Request) -> Http:
    """An edit that replaces the first colour that occurs exactly once in the draft; `right` if there is none."""
    draft = request.text.split("Draft:\n")[-1]
    colour = next((word for word in COLOURS if len(re.findall(rf"\b{word}\b", draft)) == 1), None)
    edits = [{"org": colour, "target": next(c for c in COLOURS if c != colour), "kind": "attribute", "reason": ""}]
    return reply(json.dumps({"right": not colour, "edits": edits if colour else []}), delay=latency)


if __name__ == "__main__":
    main()
