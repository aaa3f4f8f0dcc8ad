"""Draft -> revise -> shards on disk: the work of the online loop, for the callback and for the `revise` verb.

    batches -> draw_drafts -> drafts/                        one shard for each chunk (src/drafting.py)
            -> expert, in a thread while the next chunk is drawn -> journal-rank-0000.jsonl (src/journal.py)
            -> src.align.locate -> round-000000.tar, ... -> index.json, the manifest

    run_round("rounds/round-0001", batches, partial(draft_batch, ...), expert=expert, ...)    draft and revise
    revise_round("rounds/round-0001", drafts, expert=expert, ...)                             drafts on disk

A round grows in `.round-0001.partial` and gets its name last. The call that was killed is simply repeated: it
draws no finished chunk again, asks nothing that was answered, and returns a finished round as it is.

Of several ranks each draws and asks about its own drafts; when all answers are there, rank 0 writes the round. Its
shards are those of one process, byte by byte.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src.align import Span, locate
from src.asking import ExpertThread, FailedRound
from src.batch import Batch, Draft, Edit, Expert, Failure, Revision, Round
from src.drafting import DraftsBatch, describe, differences, draw_drafts, drop_stale, read_drafts, read_drafts_index
from src.journal import Answer, Journal
from src.parallel import Team, world
from src.shards import INDEX, image_name, publish, read_manifest, write_shards
from src.tokenizer import Codec

logger = logging.getLogger(__name__)


def run_round(
    folder: str | Path,
    batches: Iterable[tuple[int, Batch]],
    draft: DraftsBatch,
    *,
    expert: Expert,
    codec: Codec,
    tokens_per_step: Sequence[int],
    per_shard: int,
    settings: Mapping[str, Any],
    total: int,
    patience: float,
    team: Team,
) -> Round:
    """Draft and revise into `folder`.

    batches: (number, batch) of this rank; settings: what the drafts depend on (model, sampler, seed, ...)
    total: drafts of all ranks; patience: seconds without any answer after which an expert is given up
    """
    folder, drafts = Path(folder), _partial(Path(folder)) / "drafts"

    def prepare() -> Round | None:
        if _is_finished(folder):
            return _same_round(folder, settings, expert)
        return drop_stale(drafts, settings)

    if made := team.alone(prepare):
        return made
    drawn = draw_drafts(
        drafts, batches, draft,
        tokens_per_step=tokens_per_step, tokenizer=codec.fingerprint, settings=settings, total=total, team=team,
    )  # fmt: skip
    options = {"codec": codec, "per_shard": per_shard, "total": total, "patience": patience, "team": team}
    return _make(folder, drafts, drawn, settings, expert=expert, **options)


def revise_round(
    folder: str | Path,
    drafts: Path,
    *,
    expert: Expert,
    codec: Codec,
    per_shard: int,
    total: int,
    patience: float,
    team: Team,
    ask: bool = True,
) -> Round:
    """Ask the expert about the finished folder `drafts` and write the corrected ones as a round.

    total: number of drafts, for the progress bar; patience: as for `run_round`; ask: false makes do with the answers
    that are in the journal
    """
    folder = Path(folder)
    settings = _checked(drafts, codec)["settings"]
    if made := team.alone(lambda: _same_round(folder, settings, expert) if _is_finished(folder) else None):
        return made
    options = {"codec": codec, "per_shard": per_shard, "total": total, "patience": patience, "team": team}
    options["questions"] = ask
    return _make(folder, drafts, read_drafts(drafts, team), settings, expert=expert, **options)


def reopen(folder: str | Path) -> bool:
    """Make a finished round one under way again, if asking once more may help about some of its drafts."""
    folder = Path(folder)
    if not _is_finished(folder) or not read_round(folder).manifest.get("again"):
        return False
    work = _partial(folder)
    shutil.rmtree(work, ignore_errors=True)
    folder.replace(work)
    (work / INDEX).unlink()
    return True


def read_round(folder: str | Path) -> Round:
    """A finished round."""
    manifest = read_manifest(folder)
    if manifest["kind"] != "round":
        raise ValueError(f"{folder} holds {manifest['kind']!r}, not a round")
    return Round(Path(folder), manifest)


def summary(manifest: Mapping[str, Any]) -> str:
    """What became of the drafts of a round, in one line: the counts, then why edits and drafts were of no use."""
    told = [", ".join(f"{count} {name}" for name, count in manifest["counts"].items())]
    for kind, what in (("rejected", "edits rejected"), ("failures", "drafts failed")):
        if reasons := manifest[kind]:
            told.append(f"{what}: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items()))
    return "; ".join(told)


class EmptyRound(FailedRound):
    """A round that holds nothing to train on."""


@dataclass
class Tally:
    """What became of the drafts of a round.

    counts: drafted = revised + failed + unanswered, revised = right + written + unusable (no edit placed).
    `edits` counts those that were placed; the others are in `rejected`, by reason.
    """

    counts: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    usage: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # that an answer took, where its expert says so
    again: Counter[str] = field(default_factory=Counter)  # drafts about which asking again may help, by reason
    latency: dict[str, float] = field(default_factory=dict)  # percentiles of these

    def __post_init__(self) -> None:
        names = ("drafted", "revised", "right", "unusable", "failed", "unanswered", "edits")
        self.counts.update(dict.fromkeys(names, 0))

    def add(self, answer: Answer | None) -> None:
        """Count a draft and its answer."""
        self.counts["drafted"] += 1
        if answer is not None:
            numbers = {name: n for name, n in answer.usage.items() if isinstance(n, int | float)}
            self.usage.update(numbers)
            self.seconds += [numbers["seconds"]] if "seconds" in numbers else []
        if isinstance(answer, Revision):
            self.counts["revised"] += 1
            self.counts["right"] += not answer.edits
        elif isinstance(answer, Failure):
            self.counts["failed"] += 1
            self.failures[answer.reason] += 1
            self.again.update([answer.reason] * answer.retry)
        else:
            self.counts["unanswered"] += 1
            self.again["unanswered"] += 1

    def close(self) -> None:
        """Find the percentiles: all answers are in."""
        if len(self.seconds) > 1:
            cuts = statistics.quantiles(self.seconds, n=100, method="inclusive")
            self.latency.update({f"p{number}": round(cuts[number - 1], 3) for number in (50, 90, 99)})

    def place(self, codec: Codec, draft: Draft, edits: Sequence[Edit]) -> list[Span]:
        """The token spans of a draft's edits, counted."""
        aligned = locate(codec, draft.token_ids, edits)
        self.rejected += aligned.rejected
        self.counts["edits"] += len(aligned.spans)
        self.counts["unusable"] += not aligned.spans
        return aligned.spans


def _make(
    folder: Path,
    drafts: Path,
    drawn: Iterable[list[Draft]],
    settings: Mapping[str, Any],
    *,
    expert: Expert,
    codec: Codec,
    per_shard: int,
    total: int,
    patience: float,
    team: Team,
    questions: bool = True,
) -> Round:
    """Write a round; `drawn` yields the chunks of `drafts` that are this rank's, and may write them as it goes."""
    work, asked = _partial(folder), identity(expert)

    def prepare() -> bool:
        work.mkdir(parents=True, exist_ok=True)
        if (work / INDEX).exists() and _changed(read_manifest(work), settings, expert):
            (work / INDEX).unlink()
        return (work / INDEX).exists()

    def ask() -> float:
        """Seconds that the answers took beyond the drawing."""
        with (
            journal_of(folder, expert, team.rank) as answers,
            _bar(total, team) as bar,
            ExpertThread(expert, answers, bar, patience=patience) as thread,
        ):
            charge(expert, _usage(answers), team)
            for chunk in drawn if questions else ():
                thread.ask(chunk)
            began = time.monotonic()
        return time.monotonic() - began

    def write(waited: float) -> None:
        with journal_of(folder, expert) as answers:
            _write(work, drafts, answers, codec, per_shard, expert=asked, waited=waited)

    if not team.alone(prepare):
        waited = max(team.gather(ask()))  # rank 0 writes the answers of all
        team.alone(lambda: write(waited))
    team.alone(lambda: publish(work, folder))
    return read_round(folder)


def journal_of(folder: str | Path, expert: Expert, rank: int = 0) -> Journal:
    """The answers about the drafts of a round that is under way; new ones are of this rank."""
    work = _partial(Path(folder))
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"journal-rank-{rank:04d}.jsonl"
    # by name too: a listing of a folder on another machine may be older than what is in it
    known = {work / f"journal-rank-{number:04d}.jsonl" for number in range(world())}
    others = {*work.glob("journal-rank-*.jsonl"), *filter(Path.exists, known)}
    return Journal(path, expert=json.dumps(identity(expert), sort_keys=True), also=sorted(others))


def charge(expert: Any, usage: Mapping[str, float], team: Team) -> None:
    """Tell an expert that counts what it may spend what the run has used before: of several ranks each its share."""
    if usage and hasattr(expert, "charge"):
        expert.charge({name: value / team.size for name, value in usage.items()})


def _usage(journal: Journal) -> Counter[str]:
    tally = Tally()
    for answer in journal.answers:
        tally.add(answer)
    return tally.usage


def _bar(total: int, team: Team) -> tqdm:
    """Of the answers that rank 0 waits for."""
    return tqdm(total=-(-total // team.size), desc="revise", unit="draft", disable=not team.first)


def identity(expert: Expert) -> dict[str, Any]:
    """What the answers of an expert depend on: its name and its settings."""
    return {"name": expert.name, **describe(expert)}


def _write(
    work: Path,
    drafts: Path,
    journal: Journal,
    codec: Codec,
    per_shard: int,
    *,
    expert: dict[str, Any],
    waited: float,
) -> None:
    index, tally = _checked(drafts, codec), Tally()
    write_shards(
        work,
        _samples(drafts, journal, codec, tally),
        prefix="round",
        per_shard=per_shard,
        kind="round",
        tokenizer=codec.fingerprint,
        counts=tally.counts,
        extra={
            "expert": expert,
            "rejected": tally.rejected,
            "failures": tally.failures,
            "usage": tally.usage,
            "latency": tally.latency,
            "again": tally.again,
            "waited": round(waited, 3),  # seconds for the expert, when everything was drawn
            "settings": index["settings"],
            "drawing": index["drawing"],
        },
    )


def _samples(drafts: Path, journal: Journal, codec: Codec, tally: Tally) -> Iterator[dict[str, Any]]:
    """The drafts that have a placed edit, as samples of a round, in the order of the drafts."""
    for chunk in read_drafts(drafts):
        for draft in chunk:
            answer = journal.answer(draft)
            tally.add(answer)
            edits = answer.edits if isinstance(answer, Revision) else ()
            if edits and (spans := tally.place(codec, draft, edits)):
                yield _to_sample(draft, spans)
    tally.close()


def _to_sample(draft: Draft, spans: Sequence[Span]) -> dict[str, Any]:
    names = ("key", "prompt", "text", "reference", "steps")
    content = {name: getattr(draft, name) for name in names} | {"draft_ids": draft.token_ids}
    content |= {"spans": [asdict(span) for span in spans], "model": draft.fingerprint}
    content |= {name: draft.record[name] for name in ("scene",) if name in draft.record}
    image = {image_name(draft.image): draft.image} if draft.image else {}
    return {"__key__": draft.key, "json": content, **image}


def _checked(drafts: Path, codec: Codec) -> dict:
    """The index of drafts. Raises ValueError where they were written with another tokenizer."""
    index = read_drafts_index(drafts)
    if index["tokenizer"] != codec.fingerprint:
        found = index["tokenizer"]
        raise ValueError(f"{drafts} was written with tokenizer {found}, not with {codec.fingerprint}")
    return index


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _is_finished(folder: Path) -> bool:
    if folder.exists() and not (folder / INDEX).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is in the way: it is not a round (no {INDEX})")
    return (folder / INDEX).exists()


def _same_round(folder: Path, settings: Mapping[str, Any], expert: Expert) -> Round:
    """A finished round, if it was made with the same settings; other weights alone are only reported."""
    found = read_round(folder)
    changed = _changed(found.manifest, settings, expert)
    if changed == ["model"]:
        logger.warning("%s exists already; it was drafted by other weights", folder)
    elif changed:
        raise ValueError(f"{folder} is a round made with another {', '.join(changed)}; choose another folder")
    return found


def _changed(manifest: Mapping[str, Any], settings: Mapping[str, Any], expert: Expert) -> list[str]:
    """Names of what a round was made with that differs."""
    found = {"expert": manifest["expert"], **manifest["settings"]}
    return differences(found, {"expert": identity(expert), **settings})
