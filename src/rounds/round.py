"""One round of the online loop, draft -> revise -> shards on disk, for the callback and for the `revise` verb.

    batches -> draw_drafts -> drafts/                        drawn: one shard per chunk (src/rounds/drafts.py)
            -> ExpertThread.ask                              asked: in a thread, while the next chunk is drawn
            -> journal-rank-0000.jsonl                       answered: edits or a failure (src/chat/journal.py)
            -> src.text.align.locate                         placed: edits become token spans
            -> round-000000.tar, ..., index.json             shards and the manifest

A round is built in `.round-0001.partial` and renamed last:

    round-0001/  index.json             the manifest, written last
                 round-000000.tar       samples with corrected spans
                 journal-rank-0000.jsonl
                 drafts/                of the callback; `revise` reads drafts that lie elsewhere

Repeat a call that was killed: it draws no finished chunk again, repeats no final answer, and returns a finished round
unchanged. The next round asks again about drafts without an answer, because of the deadline or a failure that may be
temporary; they count as `late` there. Each rank draws and asks about its own drafts; rank 0 then writes the round,
whose shards are byte for byte those of a single process.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from src.chat.journal import Journal
from src.distributed.parallel import Team, world_size
from src.io.errors import UserError
from src.io.files import publish, write_json
from src.io.progress import Bar
from src.io.settings import changes, describe, differences
from src.io.shards import INDEX, image_name, read_manifest, write_shards
from src.rounds.drafts import Drafter, draw_drafts, read_drafts, read_drafts_index
from src.rounds.expert_thread import ExpertThread
from src.rounds.stats import RoundStats
from src.text.align import Aligned
from src.text.tokenizer import Codec
from src.types import Batch, Draft, Expert, FailedRound, Revision, Round

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RoundOptions:
    """Who revises the drafts, for how long, and how the round is written.

    per_shard: samples in a shard of the round
    patience: seconds without an answer after which the round fails
    deadline: seconds after the last draft was drawn at which asking ends; None: when all drafts are answered
    """

    expert: Expert
    codec: Codec
    per_shard: int
    patience: float
    team: Team
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name in ("per_shard", "patience", "deadline"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:  # nan would switch a deadline off
                raise UserError(f"{name} must be above 0, got {value}")

    @property
    def lengths(self) -> str:
        """The gap token that fills edits of unequal length, or `same` if such edits are rejected."""
        return self.codec.prompt_format.gap or "same"


class EmptyRound(FailedRound):
    """Raised for a round in which no draft was corrected, so there is nothing to train on."""


# A round


def run_round(
    folder: str | Path,
    batches: Iterable[tuple[int, Batch]],
    drafter: Drafter,
    *,
    options: RoundOptions,
    late: Path | None = None,
) -> Round:
    """Draft and revise into `folder`; a finished round is returned unchanged.

    batches: (number, batch) of this rank
    late: folder of the previous round, whose unanswered drafts are asked about again
    """
    folder, team, settings = Path(folder), options.team, drafter.settings
    if finished_round := team.on_rank0(lambda: _finished_round(folder, settings, options)):
        charge(options.expert, finished_round.manifest.get("usage", {}), team)
        return finished_round
    drafts = unfinished(folder) / "drafts"
    chunks = draw_drafts(drafts, batches, drafter, team=team, replace=True)
    return _ask_and_write(folder, drafts, chunks, options, total=drafter.num, late=late)


def revise_round(
    folder: str | Path, drafts: Path, *, options: RoundOptions, ask: bool = True, reread: bool = False
) -> Round:
    """Ask the expert about the finished folder `drafts` and write the corrected ones as a round.

    ask: false uses only the answers in the journal; reread: parse their raw replies again, with the current code
    and tokenizer
    """
    folder, index = Path(folder), read_drafts_index(drafts, options.codec)
    if finished_round := options.team.on_rank0(lambda: _finished_round(folder, index["settings"], options)):
        return finished_round
    chunks = read_drafts(drafts, options.team) if ask else ()
    return _ask_and_write(folder, drafts, chunks, options, total=index["counts"]["written"], reread=reread)


def _ask_and_write(
    folder: Path,
    drafts: Path,
    chunks: Iterable[list[Draft]],
    options: RoundOptions,
    *,
    total: int,
    late: Path | None = None,
    reread: bool = False,
) -> Round:
    """Ask about all drafts, then write the round. chunks: this rank's of `drafts`, possibly drawn while iterating."""
    work, team, expert = unfinished(folder), options.team, options.expert
    # a process that was killed before it renamed the folder may have left an index
    team.on_rank0(lambda: (work / INDEX).unlink(missing_ok=True))
    # 1. Ask about this rank's drafts, those of the previous round first.
    bar = Bar(total=-(-total // team.size), desc="revise", unit="draft", disable=not team.is_rank0)
    with (
        journal_of(work, expert, rank=team.rank) as journal,
        bar,
        ExpertThread(expert, journal, bar, patience=options.patience, deadline=options.deadline) as thread,
    ):
        charge(expert, journal.usage, team)
        for chunk in chain(_late_drafts(late, options, team), chunks):  # iterating draws the drafts
            thread.ask(chunk)
        all_drawn_at = time.monotonic()
    waited = max(team.gather(time.monotonic() - all_drawn_at))
    # 2. Rank 0 writes the round from the answers of all ranks.
    team.on_rank0(lambda: _write(work, drafts, options, waited=waited, late=late, reread=reread))
    team.on_rank0(lambda: publish(work, folder))
    return read_round(folder)


def _write(work: Path, drafts: Path, options: RoundOptions, *, waited: float, late: Path | None, reread: bool) -> None:
    """Write the shards and the manifest. waited: seconds for the expert, after the last draft was drawn."""
    index, stats, codec = read_drafts_index(drafts, options.codec), RoundStats(), options.codec
    journal = journal_of(work, options.expert)

    def samples() -> Iterator[dict[str, Any]]:
        """Drafts with at least one placed edit, in the order of the drafts; late ones last."""
        requests: set[str] = set()
        for is_late, chunks in enumerate((read_drafts(drafts), _late_drafts(late, options, None))):
            for draft in chain.from_iterable(chunks):
                if (request := journal.request(draft)) in requests:
                    continue  # a late draft that the model drew again, word for word
                requests.add(request)
                answer = journal.answer(draft)
                answer = options.expert.reread(draft, answer) if reread and answer else answer
                stats.add(answer, late=bool(is_late))
                edits = answer.edits if isinstance(answer, Revision) else ()
                if edits and (aligned := stats.place(codec, draft, edits)).spans:
                    # the same image may have a new draft, with the plain key
                    yield _to_sample(draft, aligned, key=f"{draft.key}-late" if is_late else draft.key)
        stats.close()

    write_shards(
        work,
        samples(),
        prefix="round",
        per_shard=options.per_shard,
        kind="round",
        tokenizer=codec.fingerprint,
        counts=stats.counts,
        extra={
            "expert": identity(options.expert),
            "lengths": options.lengths,
            **stats.manifest,
            "usage": journal.usage,
            "waited": round(waited, 3),
            "settings": index["settings"],
            "drawing": index["drawing"],
        },
    )


def _late_drafts(folder: Path | None, options: RoundOptions, team: Team | None) -> Iterator[list[Draft]]:
    """The drafts of a finished round about which asking again may help: this rank's, or all without a team.

    Empty if that round had another expert. Unreadable shards are left out.
    """
    if folder is None or not (folder / "drafts" / INDEX).is_file():
        return
    manifest = read_round(folder).manifest
    if not manifest.get("again") or differences(manifest["expert"], identity(options.expert)):
        return
    journal = journal_of(folder, options.expert)
    for chunk in read_drafts(folder / "drafts", team, skip=True):
        yield [draft for draft in chunk if not journal.is_settled(draft)]


def _to_sample(draft: Draft, aligned: Aligned, *, key: str) -> dict[str, Any]:
    names = ("prompt", "text", "reference", "steps")
    content = {"key": key, **{name: getattr(draft, name) for name in names}, "draft_ids": aligned.ids}
    content |= {"spans": [asdict(span) for span in aligned.spans], "model": draft.fingerprint}
    content |= {"unmasked_at": steps_with_gaps(draft, aligned.ids)} if draft.unmasked_at else {}
    content |= {name: draft.record[name] for name in ("scene",) if name in draft.record}
    image = {image_name(draft.image): draft.image} if draft.image else {}
    return {"__key__": key, "json": content, **image}


def steps_with_gaps(draft: Draft, ids: Sequence[int]) -> list[int]:
    """`Draft.unmasked_at` for `ids`, the draft with gaps inserted: a gap came with the token before it."""
    steps, old = list[int](), 0
    for token in ids:
        is_inserted = old == len(draft.token_ids) or token != draft.token_ids[old]
        steps.append((steps or draft.unmasked_at)[-1 if steps else 0] if is_inserted else draft.unmasked_at[old])
        old += not is_inserted
    return steps + draft.unmasked_at[old:]


# The expert's answers and usage


def identity(expert: Expert) -> dict[str, Any]:
    """Name and settings of an expert, on which its answers depend."""
    return {"name": expert.name, **describe(expert)}


def journal_of(work: Path, expert: Expert, *, rank: int | None = None) -> Journal:
    """The answers of all ranks in a round's folder; with a `rank`, answers are appended to the journal of that rank."""
    # NOTE: also by name, since the directory listing of a network file system may be stale
    expected = [work / f"journal-rank-{number:04d}.jsonl" for number in range(world_size())]
    journals = sorted({*work.glob("journal-rank-*.jsonl"), *filter(Path.exists, expected)})
    if rank is not None:
        work.mkdir(parents=True, exist_ok=True)
    path = None if rank is None else work / f"journal-rank-{rank:04d}.jsonl"
    return Journal(path, expert=json.dumps(identity(expert), sort_keys=True), others=journals)


def charge(expert: Expert, usage: Mapping[str, float], team: Team) -> None:
    """Count earlier usage of the run against the budget of an expert that has one; each rank takes an equal share."""
    expert.charge({"requests": 0, **{name: value / team.size for name, value in usage.items()}})


# Rounds and drafts on disk


def unfinished(folder: str | Path) -> Path:
    """Where a round is built until it is complete."""
    return Path(folder).with_name(f".{Path(folder).name}.partial")


def read_round(folder: str | Path) -> Round:
    """Read a finished round. Raises UserError if the folder holds anything else."""
    manifest = read_manifest(folder)
    if manifest["kind"] != "round":
        raise UserError(f"{folder} holds {manifest['kind']!r}, not a round")
    return Round(Path(folder), manifest)


def _finished_round(
    folder: Path, settings: Mapping[str, Any], options: RoundOptions, *, may_differ: str = "model"
) -> Round | None:
    """The round in `folder`, or None where there is none yet.

    Raises UserError if it was made with other settings; a difference only in `may_differ` causes a warning.
    """
    if not (folder / INDEX).exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} already exists and is not a round (no {INDEX})")
        return None
    finished_round = read_round(folder)
    manifest = finished_round.manifest
    stored = {"expert": manifest["expert"], "lengths": manifest.get("lengths", "same"), **manifest["settings"]}
    present = {"expert": identity(options.expert), "lengths": options.lengths, **settings}
    changed = differences(stored, present)
    if changed == [may_differ]:
        logger.warning("%s exists already, and was made with another %s", folder, may_differ)
    elif changed:
        values = changes(stored, present, "in the round")
        raise UserError(f"{folder} is a round made with other settings ({values}); choose another folder")
    return finished_round


def check_reopens(folder: Path, drafts: Path, options: RoundOptions) -> None:
    """Raise UserError if `folder` is not a round of these drafts and this expert, and so cannot be reopened.

    Also raised for a round of a training run (its drafts lie inside it), which that run may need unchanged.
    """
    if drafts.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} belongs to a training run, which may need it; copy its drafts to revise them")
    if not folder.exists() and not unfinished(folder).exists():
        raise UserError(f"there is no round {folder}")
    settings = read_drafts_index(drafts, options.codec)["settings"]
    _finished_round(folder, settings, options, may_differ="lengths")  # rereading applies another gap token


def reopen(folder: str | Path, *, always: bool = False) -> bool:
    """Turn a finished round back into an unfinished one if asking again may help for some drafts, or `always`."""
    folder, work = Path(folder), unfinished(folder)
    if not (folder / INDEX).exists() or not (always or read_round(folder).manifest.get("again")):
        return False
    shutil.rmtree(work, ignore_errors=True)
    folder.replace(work)
    (work / INDEX).unlink()
    return True


def update_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Add entries to the manifest of a finished round."""
    write_json(folder / INDEX, {**read_round(folder).manifest, **entries})
