"""What the expert costs a round beyond its drafts: asked while the next chunk is drawn, and, the usual way, afterwards.

    python -m benchmarks.overlap                          one process, replies in half a second, 64 requests at once
    python -m benchmarks.overlap --ranks 2 --latency 2

Three ways to a round, in turn, with new folders each time: `drafts` only draws them; `overlapped` is `run_round`;
`afterwards` draws all and then revises them (the verbs `draft` and `revise`). Told is the time beyond that of the
drafts alone, as a share of it. The model is the base model of the repository, the images are scenes, the expert is the
OpenAI client against a local server in a process of its own that answers each draft with one edit. Every rank draws
with one thread; there must be a core for each rank and one for the server.
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
from src.rounds.drafts import draft_batch, draw_drafts, settings_of
from src.rounds.round import RoundOptions, revise_round, run_round
from src.samplers.sampler import Sampler
from src.scenes.graph import COLOURS
from src.text.tokenizer import Codec
from testing.servers.scripted import Http, Request, Scripted, reply

BASE = Path(__file__).parents[1] / "assets" / "base"
SPEEDS = [1, 4, 8]  # tokens per step
CANVAS = 64


def main() -> None:
    """Print a line for each run, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"drafts": 384, "at-once": 64, "ranks": 1, "runs": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--latency", type=float, default=0.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(options.latency) as url:
        Scenes(out=f"{folder}/scenes", image_size=48, response_length=CANVAS, prompt="Describe the image in detail.",
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
    """One rank."""
    torch.set_num_threads(1)
    if options.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=options.ranks)
    team, bench = Team(), Bench(folder, url, options)
    bench.team = team
    shares: dict[str, list[float]] = {}
    for number in range(options.runs + 1):
        seconds = {}
        for name in ("drafts", "overlapped", "afterwards"):
            way: Callable[[Path], None] = getattr(bench, name)
            team.gather(None)
            began = time.perf_counter()
            way(folder / f"{name}-{number}")
            seconds[name] = max(team.gather(time.perf_counter() - began))
        if not number or not team.first:  # the first one warms up
            continue
        told = []
        for name in ("overlapped", "afterwards"):
            share = seconds[name] / seconds["drafts"] - 1
            shares.setdefault(name, []).append(share)
            told.append(f"{name} {seconds[name]:.1f} s ({share:+.1%})")
        sys.stdout.write(f"drafts {seconds['drafts']:.1f} s, {', '.join(told)}\n")
    if team.first:
        found = (f"{name} {statistics.median(values):+.1%}" for name, values in shares.items())
        sys.stdout.write(
            f"{options.drafts} drafts, {options.ranks} ranks, {options.at_once} at once, {options.latency} s a reply; "
            f"median beyond the drafts: {', '.join(found)}\n"
        )
    if options.ranks > 1:
        dist.destroy_process_group()


class Bench:
    """The three ways."""

    team: Team

    def __init__(self, folder: Path, url: str, options: argparse.Namespace) -> None:
        self.url, self.options, self.codec = url, options, Codec.load(BASE)
        self.data = CaptionData(
            path=str(folder / "scenes"), codec=self.codec, batch_size=24, response_length=CANVAS, image_size=48, seed=0
        )
        self.backbone, self.sampler = from_pretrained(BASE).eval(), Sampler(length=CANVAS, eos_last=True)

    def drafts(self, folder: Path) -> None:
        common = {"tokens_per_step": SPEEDS, "settings": self._settings, "total": self.options.drafts}
        tokenizer = self.codec.fingerprint
        for _ in draw_drafts(folder, self._batches, self._draft, tokenizer=tokenizer, team=self.team, **common):
            pass

    def overlapped(self, folder: Path) -> None:
        common = {"tokens_per_step": SPEEDS, "settings": self._settings, "total": self.options.drafts}
        self._check(run_round(folder, self._batches, self._draft, options=self._round_options, **common))

    def afterwards(self, folder: Path) -> None:
        self.drafts(folder / "drafts")
        self._check(revise_round(folder / "round", folder / "drafts", options=self._round_options))

    def _check(self, made) -> None:
        if made.manifest["counts"]["revised"] != self.options.drafts:
            sys.exit(f"not all drafts were answered: {made.manifest['counts']}, {made.manifest['failures']}")

    @property
    def _batches(self):
        self.data.place = (self.team.rank, self.team.size)
        return self.data.draft_dataloader(1, self.options.drafts)

    @property
    def _settings(self) -> dict:
        fixed = {"tokens_per_step": SPEEDS, "num": self.options.drafts, "round_number": 1, "seed": 1}
        return settings_of(self.backbone, self.sampler, codec=self.codec, data=self.data.draft_settings(), **fixed)

    @property
    def _draft(self):
        return partial(draft_batch, self.backbone, sampler=self.sampler, codec=self.codec, seed=1, fingerprint="f")

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
    """The address of a server in a process of its own."""
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
    """Another colour for the first one that the draft names once; `right` where there is none."""
    draft = request.text.split("Draft:\n")[-1]
    found = next((word for word in COLOURS if len(re.findall(rf"\b{word}\b", draft)) == 1), None)
    edits = [{"org": found, "target": next(c for c in COLOURS if c != found), "kind": "attribute", "reason": ""}]
    return reply(json.dumps({"right": not found, "edits": edits if found else []}), delay=latency)


if __name__ == "__main__":
    main()
