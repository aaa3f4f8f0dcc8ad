"""Revise: ask an expert about drafts and write the corrected ones as a round to train on.

    python -m src.revise conf=revise drafts=drafts out=rounds/round-0001 tokenizer=runs/stage1/model
    torchrun --nproc-per-node 4 -m src.revise conf=revise ...        or srun: each rank asks about its share

    drafts -> expert -> edits aligned to tokens (src/text/align.py) -> out/round-000000.tar, ... out/index.json

    python -m src.revise ... requests=requests.jsonl      exports the requests for a batch API, and sends none
    python -m src.revise ... results=results.jsonl        imports its results, and writes the round
    python -m src.revise ... reread=true                  parses the stored replies again, and rewrites the round

`dry=true` prints how many requests, tokens and dollars the revision would take, and sends no request.

The same command continues a killed run and asks nothing that was answered. At the end it prints counts of the drafts
and edits, failures by reason, and how to train on the round without drafting further ones:

    python -m src.train conf=stage2 'data.rounds=[rounds/round-0001]' callbacks.self_correction=null

plus model.path, data.path and tokenizer of the drafts where they differ from conf/stage2.yaml.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from src.cli.config import load_config, path_of
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import build, check, with_arguments
from src.io.errors import UserError
from src.io.lock import locked
from src.io.words import counted
from src.rounds.batch_api import read_results, write_requests
from src.rounds.drafts import read_drafts, read_drafts_index
from src.rounds.round import RoundOptions, check_reopens, reopen, revise_round
from src.rounds.stats import yields
from src.text.tokenizer import Codec
from src.training.launch import is_rank0_by_env, process_group, report_lost_ranks
from src.types import Round

HINTS = {
    "budget": "raise max_requests, max_tokens or max_cost of expert.limits first",
    "length": "raise expert.max_completion_tokens first",
}
SAMPLE = 8  # chunks from which a dry run extrapolates


@main_guard
def main(argv: list[str]) -> None:
    """Write the round, or the requests for it, and print the counts."""
    cfg = load_config(argv, verb="src.revise", needs=NEEDS["src.revise"])
    check(cfg, offers=("codec",))
    if cfg.requests and cfg.results:
        raise UserError("requests= exports requests and results= imports answers: give one of them")
    out, drafts = path_of(cfg, "out"), path_of(cfg, "drafts")
    codec = Codec.load(cfg.tokenizer).with_format(gap=cfg.gap)
    asks = not (cfg.dry or cfg.requests or cfg.results or cfg.reread)
    # where nothing is sent, no key is needed
    expert = build(cfg.expert if asks else with_arguments(cfg.expert, key_env=None), codec=codec)
    # 1. What needs no round.
    if cfg.dry:
        total = read_drafts_index(drafts)["counts"]["written"]
        sample = [draft for chunk in islice(read_drafts(drafts), SAMPLE) for draft in chunk]
        sys.stdout.write(f"{expert.estimate(sample, total=total)}\n")
        return
    if cfg.requests:
        with locked(out):
            if out.exists() and not (cfg.again and reopen(out)):
                raise UserError(f"{out} exists already; again=true asks again about its drafts where that may help")
            written, num_skipped = write_requests(Path(cfg.requests), out, drafts, expert)
        skipped = f"; {counted(num_skipped, 'draft')} skipped, as no request could be built" if num_skipped else ""
        sys.stdout.write(f"{cfg.requests}: {counted(written, 'request')}{skipped}\n")
        return
    # 2. The round.
    lock = locked(out) if is_rank0_by_env() else nullcontext()
    with lock, report_lost_ranks(), process_group() as team:
        options = RoundOptions(
            expert=expert,
            codec=codec,
            per_shard=cfg.per_shard,
            patience=60 * cfg.patience_minutes,
            deadline=None if cfg.deadline_minutes is None else 60 * cfg.deadline_minutes,
            team=team,
        )
        if cfg.again or cfg.reread:
            team.on_rank0(lambda: check_reopens(out, drafts, options))
            team.on_rank0(lambda: reopen(out, always=cfg.reread))
        if cfg.results:
            counts = team.on_rank0(lambda: read_results(Path(cfg.results), out, drafts, expert))
            if team.is_rank0:
                listed = ", ".join(f"{count} {name}" for name, count in counts.items())
                sys.stdout.write(f"{cfg.results}: {listed or 'empty'}\n")
        finished_round = revise_round(out, drafts, options=options, ask=asks, reread=cfg.reread)
    if team.is_rank0:
        sys.stdout.write(f"{finished_round.path}: {report(finished_round)}\n")


def report(finished_round: Round) -> str:
    """Counts of drafts and edits, failures by reason, and the next command."""
    manifest = finished_round.manifest
    counts, rejected = manifest["counts"], manifest["rejected"]
    lines = [
        f"{counts['drafted']} drafted: {counts['written']} corrected, {counts['right']} right, {counts['unusable']} "
        f"with no edit that could be placed, {counts['failed']} failed, {counts['unanswered']} unanswered",
        f"edits: {counts['edits']} placed, {sum(rejected.values())} could not be{_reasons(rejected)}",
    ]
    if counts["failed"]:
        lines.insert(1, f"failed: {counts['failed']}{_reasons(manifest['failures'])}")
    if kinds := manifest.get("kinds"):
        lines.append(f"kinds of mistakes: {_reasons(kinds)[2:-1]}")
    shares = yields(manifest)
    if "yield_unrepaired" in shares:
        before, after = (f"{shares[name]:.0%}" for name in ("yield_unrepaired", "yield"))
        lines.append(f"yield: {after} of the edits could be placed; {before} before the expert repaired some")
    if again := manifest.get("again"):
        lines.append(f"again=true asks about {sum(again.values())} of them once more{_reasons(again)}")
        lines += [f"{reason}: {hint}" for reason, hint in HINTS.items() if reason in again]
    if not counts["written"]:
        return "\n".join([*lines, "no draft was corrected: there is nothing to train on"])
    settings = [f"data.rounds=[{finished_round.path}]", "callbacks.self_correction=null"]
    lines.append(f"to look at it: python -m src.prepare show={shlex.quote(str(finished_round.path))}")
    return "\n".join([*lines, f"next: {shlex.join(['python', '-m', 'src.train', 'conf=stage2', *settings])}"])


def _reasons(counts: Mapping[str, int]) -> str:
    """` (reason count, ...)`, the most frequent first; empty without counts."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f" ({', '.join(f'{reason} {count}' for reason, count in ordered)})" if ordered else ""


if __name__ == "__main__":
    main()
