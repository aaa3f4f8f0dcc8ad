"""Revise: ask an expert about drafts, and write those with a correction as a round to train on.

    python -m src.revise conf=revise drafts=drafts out=rounds/round-0001 tokenizer=runs/stage1/model
    torchrun --nproc-per-node 4 -m src.revise conf=revise ...        or srun: each asks about its share

    drafts -> expert -> edits aligned to tokens (src/text/align.py) -> out/round-000000.tar, ... out/index.json

    python -m src.revise ... requests=requests.jsonl      writes them for a batch API, and asks nothing
    python -m src.revise ... results=results.jsonl        reads its results, and makes the round
    python -m src.revise ... reread=true                  reads the kept replies again, and makes the round anew

`dry=true` prints how many requests, tokens and dollars it would take, and asks nothing.

A killed run is continued by the same command; nothing that was answered is asked again. At the end it prints what
became of the drafts and edits, by reason, and how to train on the round without drawing further ones:

    python -m src.train conf=stage2 'data.rounds=[rounds/round-0001]' callbacks.self_correction=null

with the model.path, data.path and tokenizer of the drafts, where these are not those of conf/stage2.yaml.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.cli.config import load_config, path_of
from src.cli.entrypoint import main_guard
from src.cli.instantiate import build, check
from src.distributed.parallel import Team
from src.io.errors import UserError
from src.io.lock import locked
from src.rounds.batch_api import read_results, write_requests
from src.rounds.drafts import read_drafts, read_drafts_index
from src.rounds.round import Revising, check_reopens, reopen, revise_round
from src.rounds.stats import yields
from src.text.tokenizer import Codec
from src.training.launch import explained, launched_first, together
from src.types import Round

HINTS = {
    "budget": "raise max_requests, max_tokens or max_cost of expert.limits first",
    "length": "raise expert.max_completion_tokens first",
}
SAMPLE = 8  # chunks that stand for all in a dry run


@main_guard
def main(argv: list[str]) -> None:
    """Write the round that the config asks for and say what became of the drafts."""
    cfg = load_config(argv, verb="src.revise", needs=["drafts", "expert"])
    check(cfg, offers=("codec",))
    out, drafts = path_of(cfg, "out"), path_of(cfg, "drafts")
    codec = Codec.load(cfg.tokenizer).with_format(gap=cfg.gap)
    if cfg.dry:
        sys.stdout.write(expected(build(cfg.expert, codec=codec), drafts))
        return
    if cfg.requests and cfg.results:
        raise UserError("requests= writes questions and results= reads answers: give one of them")
    if cfg.requests:
        with locked(out):
            if out.exists() and not (cfg.again and reopen(out)):
                raise UserError(f"{out} is there already; again=true takes it up where asking again may help")
            written, without = write_requests(Path(cfg.requests), out, drafts, build(cfg.expert, codec=codec))
        lost = f"; {without} drafts cannot be asked about" if without else ""
        sys.stdout.write(f"{cfg.requests}: {written} requests{lost}\n")
        return
    lock = locked(out) if launched_first() else nullcontext()
    with lock, explained(), together() as team:
        how = _how(cfg, codec, team)
        if cfg.again or cfg.reread:
            team.on_rank0(lambda: check_reopens(out, drafts, how))
            team.on_rank0(lambda: reopen(out, always=cfg.reread))
        if cfg.results:
            team.on_rank0(lambda: _read(cfg, out, drafts, codec))
        ask = not (cfg.results or cfg.reread)
        made = revise_round(out, drafts, how=how, ask=ask, reread=cfg.reread)
    if team.first:
        sys.stdout.write(f"{made.path}: {report(made)}\n")


def _how(cfg: DictConfig, codec: Codec, team: Team) -> Revising:
    for name in ("patience_minutes", "deadline_minutes"):
        minutes = cfg[name]
        if minutes is None and name == "deadline_minutes":
            continue
        if not (isinstance(minutes, int | float) and 0 < minutes < math.inf):
            raise UserError(f"{name} must be a number above 0, got {minutes}")
    return Revising(
        expert=build(cfg.expert, codec=codec),
        codec=codec,
        per_shard=cfg.per_shard,
        patience=60 * cfg.patience_minutes,
        deadline=None if cfg.deadline_minutes is None else 60 * cfg.deadline_minutes,
        team=team,
    )


def _read(cfg: DictConfig, out: Path, drafts: Path, codec: Codec) -> None:
    counts = read_results(Path(cfg.results), out, drafts, build(cfg.expert, codec=codec))
    sys.stdout.write(f"{cfg.results}: {', '.join(f'{count} {name}' for name, count in counts.items()) or 'empty'}\n")


def expected(expert: Any, drafts: Path) -> str:
    """What asking about drafts would take, by the first of them."""
    total = read_drafts_index(drafts)["counts"]["written"]
    if not hasattr(expert, "estimate"):
        return f"{total} drafts; expert {expert.name} asks no server\n"
    chunks = islice(read_drafts(drafts), SAMPLE)
    found = expert.estimate([draft for chunk in chunks for draft in chunk], total=total)
    cost, most = (f", {value:.2f} dollars" if value is not None else "" for value in (found.cost, found.most_cost))
    likely = f"{found.requests} requests, {found.prompt_tokens:,} prompt tokens"
    most_of = f"at most {found.most_requests} requests, {found.most_tokens:,} tokens"
    return f"{total} drafts: {likely}, {found.completion_tokens:,} completion tokens{cost}\n{most_of}{most}\n"


def report(made: Round) -> str:
    """What became of the drafts and of the edits, and what to do next."""
    counts, rejected = made.manifest["counts"], made.manifest["rejected"]
    lines = [
        f"{counts['drafted']} drafted: {counts['written']} corrected, {counts['right']} right, {counts['unusable']} "
        f"with no edit that could be placed, {counts['failed']} failed, {counts['unanswered']} unanswered",
        f"edits: {counts['edits']} placed, {sum(rejected.values())} could not be{_reasons(rejected)}",
    ]
    if counts["failed"]:
        lines.insert(1, f"failed: {counts['failed']}{_reasons(made.manifest['failures'])}")
    if kinds := made.manifest.get("kinds"):
        lines.append(f"kinds of mistakes: {_reasons(kinds)[2:-1]}")
    found = yields(made.manifest)
    if "yield_unrepaired" in found:
        before, after = (f"{found[name]:.0%}" for name in ("yield_unrepaired", "yield"))
        lines.append(f"yield: {after} of the edits could be placed; {before} before the expert repaired some")
    if again := made.manifest.get("again"):
        lines.append(f"again=true asks about {sum(again.values())} of them once more{_reasons(again)}")
        lines += [f"{reason}: {hint}" for reason, hint in HINTS.items() if reason in again]
    if not counts["written"]:
        return "\n".join([*lines, "no draft was corrected: there is nothing to train on"])
    settings = [f"data.rounds=[{made.path}]", "callbacks.self_correction=null"]
    return "\n".join([*lines, f"next: {shlex.join(['python', '-m', 'src.train', 'conf=stage2', *settings])}"])


def _reasons(counts: Mapping[str, int]) -> str:
    """The most frequent first."""
    found = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f" ({', '.join(f'{reason} {count}' for reason, count in found)})" if found else ""


if __name__ == "__main__":
    main()
