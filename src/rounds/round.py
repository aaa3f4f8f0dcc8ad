"""One round of the online loop, draft -> revise -> shards on disk, for the callback and for the `revise` verb.

    batches -> draw_drafts -> drafts/                        drawn: one shard per chunk (src/rounds/drafts.py)
            -> ExpertThread.ask                              asked: in a thread, while the next chunk is drawn
            -> journal-rank-0000.jsonl                       answered: edits or a failure (src/chat/journal.py)
            -> src.text.align.locate                         placed: edits become token spans
            -> round-000000.tar, ..., index.json             shards and the manifest

    options = RoundOptions(expert=expert, codec=codec, ...)
    run_round("rounds/round-0001", batches, Drafter(...), options=options)     draft and revise
    revise_round("rounds/round-0001", drafts, options=options)                                   drafts on disk

    round-0001/  index.json             the manifest, written last
                 round-000000.tar       samples with corrected spans
                 journal-rank-0000.jsonl
                 drafts/                of the callback; `revise` reads drafts that lie elsewhere

A round is built in `.round-0001.partial` and renamed last. Repeat a call that was killed: it draws no finished chunk
again, repeats no final answer (a temporary failure is asked about again), and returns a finished round unchanged.

The next round asks again about drafts without an answer, because of the deadline or a failure that may be temporary;
they count as `late` there.

Each rank draws and asks about its own drafts; when all are answered, rank 0 writes the round. Its shards are byte for
byte those of a single process.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src.chat.journal import Answers, Journal
from src.distributed.parallel import Team, world_size
from src.io.errors import UserError
from src.io.files import publish, write_json
from src.io.settings import describe, differences
from src.io.shards import INDEX, image_name, read_manifest, write_shards
from src.rounds.drafts import Drafter, draw_drafts, drop_stale, read_drafts, read_drafts_index
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
        if not (isinstance(self.expert, Expert) and getattr(self.expert, "name", "")):
            raise UserError(
                f"expert: {type(self.expert).__name__} must be a subclass of src.types.Expert with a `name`"
            )
        if self.per_shard < 1:
            raise UserError(f"per_shard must be at least 1, got {self.per_shard}")


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
    folder, drafts, settings = Path(folder), _partial(Path(folder)) / "drafts", drafter.settings

    def prepare() -> Round | None:
        if _is_finished(folder):
            return _same_round(folder, settings, options)
        return drop_stale(drafts, settings)

    if finished_round := options.team.on_rank0(prepare):
        charge(options.expert, finished_round.manifest.get("usage", {}), options.team)
        return finished_round
    chunks = draw_drafts(drafts, batches, drafter, team=options.team)
    return _ask_and_write(folder, drafts, chunks, settings, options, drafter.num, late)


def revise_round(
    folder: str | Path, drafts: Path, *, options: RoundOptions, ask: bool = True, reread: bool = False
) -> Round:
    """Ask the expert about the finished folder `drafts` and write the corrected ones as a round.

    ask: false uses only the answers in the journal; reread: parse their raw replies again, with the current code
    and tokenizer
    """
    folder, index = Path(folder), check_drafts(drafts, options.codec)
    settings, total = index["settings"], index["counts"]["written"]

    def existing() -> Round | None:
        return _same_round(folder, settings, options) if _is_finished(folder) else None

    if finished_round := options.team.on_rank0(existing):
        return finished_round
    chunks = read_drafts(drafts, options.team) if ask else ()
    return _ask_and_write(folder, drafts, chunks, settings, options, total, reread=reread)


def check_reopens(folder: Path, drafts: Path, options: RoundOptions) -> None:
    """Raise UserError if `folder` is not a round of these drafts and this expert, and so cannot be reopened.

    Also raised for a round of a training run (its drafts lie inside it), which that run may need unchanged.
    """
    if drafts.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} belongs to a training run, which may need it; copy its drafts to revise them")
    settings = check_drafts(drafts, options.codec)["settings"]
    if not folder.exists() and not _partial(folder).exists():
        raise UserError(f"there is no round {folder}")
    changed = _changed(read_round(folder).manifest, settings, options) if _is_finished(folder) else []
    if changed not in ([], ["lengths"]):  # rereading applies another gap token
        raise UserError(f"{folder} is a round made with another {', '.join(changed)}; choose another folder")


def reopen(folder: str | Path, *, always: bool = False) -> bool:
    """Turn a finished round back into an unfinished one if asking again may help for some drafts, or `always`."""
    folder = Path(folder)
    if not _is_finished(folder) or not (always or read_round(folder).manifest.get("again")):
        return False
    work = _partial(folder)
    shutil.rmtree(work, ignore_errors=True)
    folder.replace(work)
    (work / INDEX).unlink()
    return True


def read_round(folder: str | Path) -> Round:
    """Read a finished round. Raises UserError if the folder holds anything else."""
    manifest = read_manifest(folder)
    if manifest["kind"] != "round":
        raise UserError(f"{folder} holds {manifest['kind']!r}, not a round")
    return Round(Path(folder), manifest)


def update_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Add entries to the manifest of a finished round."""
    write_json(folder / INDEX, {**read_round(folder).manifest, **entries})


class EmptyRound(FailedRound):
    """Raised for a round in which no draft was corrected, so there is nothing to train on."""


def _ask_and_write(
    folder: Path,
    drafts: Path,
    chunks: Iterable[list[Draft]],
    settings: Mapping[str, Any],
    options: RoundOptions,
    total: int,
    late: Path | None = None,
    *,
    reread: bool = False,
) -> Round:
    """Ask about all drafts, then write the round. chunks: this rank's of `drafts`, possibly drawn while iterating."""
    work, team = _partial(folder), options.team

    def prepare() -> None:
        work.mkdir(parents=True, exist_ok=True)
        (work / INDEX).unlink(missing_ok=True)  # left by a process that was killed before it renamed the folder

    def ask() -> float:
        """Ask about this rank's drafts; returns the seconds waited for answers after the last draft was drawn."""
        limits = {"patience": options.patience, "deadline": options.deadline}
        with (
            journal_of(folder, options.expert, team.rank) as journal,
            _bar(total, team) as bar,
            ExpertThread(options.expert, journal, bar, **limits) as thread,
        ):
            charge(options.expert, journal.usage, team)
            for chunk in chain(_late(late, options, team), chunks):  # iterating draws the drafts
                thread.ask(chunk)
            all_drawn_at = time.monotonic()
        return time.monotonic() - all_drawn_at

    def write(waited: float) -> None:
        with journal_of(folder, options.expert) as journal:
            _write(work, drafts, journal, options, waited=waited, late=late, reread=reread)

    team.on_rank0(prepare)
    waited = max(team.gather(ask()))  # rank 0 then reads the answers of all ranks
    team.on_rank0(lambda: write(waited))
    team.on_rank0(lambda: publish(work, folder))
    return read_round(folder)


def journal_of(folder: str | Path, expert: Expert, rank: int = 0) -> Journal:
    """The journal of an unfinished round: it holds the answers of all ranks and appends to this rank's file."""
    work = _partial(Path(folder))
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"journal-rank-{rank:04d}.jsonl"
    # NOTE: also by name, since the directory listing of a network file system may be stale
    expected = {work / f"journal-rank-{number:04d}.jsonl" for number in range(world_size())}
    journals = {*work.glob("journal-rank-*.jsonl"), *filter(Path.exists, expected)}
    return Journal(path, expert=_identity_json(expert), also=sorted(journals))


def _identity_json(expert: Expert) -> str:
    return json.dumps(identity(expert), sort_keys=True)


def identity(expert: Expert) -> dict[str, Any]:
    """Name and settings of an expert, on which its answers depend."""
    return {"name": expert.name, **describe(expert)}


def charge(expert: Expert, usage: Mapping[str, float], team: Team) -> None:
    """Count earlier usage of the run against the budget of an expert that has one; each rank takes an equal share."""
    expert.charge({"requests": 0, **{name: value / team.size for name, value in usage.items()}})


def _bar(total: int, team: Team) -> tqdm:
    """Progress bar over the drafts of rank 0."""
    return tqdm(total=-(-total // team.size), desc="revise", unit="draft", disable=not team.is_rank0)


def _late(folder: Path | None, options: RoundOptions, team: Team | None) -> Iterator[list[Draft]]:
    """The drafts of a finished round about which asking again may help: this rank's, or all without a team.

    Empty if that round had another expert. Unreadable shards are left out.
    """
    if folder is None or not (folder / "drafts" / INDEX).is_file():
        return
    manifest = read_round(folder).manifest
    if not manifest.get("again") or differences(manifest["expert"], identity(options.expert)):
        return
    answers = Answers(sorted(folder.glob("journal-rank-*.jsonl")), expert=_identity_json(options.expert))
    for chunk in read_drafts(folder / "drafts", team, skip=True):
        yield [draft for draft in chunk if not answers.is_settled(draft)]


def _write(
    work: Path, drafts: Path, journal: Journal, options: RoundOptions, *, waited: float, late: Path | None, reread: bool
) -> None:
    index, stats = check_drafts(drafts, options.codec), RoundStats()
    write_shards(
        work,
        _samples(drafts, journal, options, stats, late=late, reread=reread),
        prefix="round",
        per_shard=options.per_shard,
        kind="round",
        tokenizer=options.codec.fingerprint,
        counts=stats.counts,
        extra={
            "expert": identity(options.expert),
            "lengths": _lengths(options.codec),
            **stats.manifest,
            "usage": journal.usage,
            "waited": round(waited, 3),  # seconds for the expert, after the last draft was drawn
            "settings": index["settings"],
            "drawing": index["drawing"],
        },
    )


def _samples(
    drafts: Path, journal: Journal, options: RoundOptions, stats: RoundStats, *, late: Path | None, reread: bool
) -> Iterator[dict[str, Any]]:
    """Drafts with at least one placed edit as samples of the round, in the order of the drafts; late ones last."""
    seen: set[str] = set()
    for is_late, chunks in enumerate((read_drafts(drafts), _late(late, options, None))):
        for draft in chain.from_iterable(chunks):
            if (request := journal.request(draft)) in seen:
                continue  # a late draft that the model drew again, word for word
            seen.add(request)
            answer = journal.answer(draft)
            answer = options.expert.reread(draft, answer) if reread and answer else answer
            stats.add(answer, late=bool(is_late))
            edits = answer.edits if isinstance(answer, Revision) else ()
            if edits and (aligned := stats.place(options.codec, draft, edits)).spans:
                # the same image may have a new draft, with the plain key
                yield _to_sample(draft, aligned, key=f"{draft.key}-late" if is_late else draft.key)
    stats.close()


def _to_sample(draft: Draft, aligned: Aligned, *, key: str) -> dict[str, Any]:
    names = ("prompt", "text", "reference", "steps")
    content = {"key": key, **{name: getattr(draft, name) for name in names}, "draft_ids": aligned.ids}
    content |= {"spans": [asdict(span) for span in aligned.spans], "model": draft.fingerprint}
    content |= {name: draft.record[name] for name in ("scene",) if name in draft.record}
    image = {image_name(draft.image): draft.image} if draft.image else {}
    return {"__key__": key, "json": content, **image}


def check_drafts(drafts: Path, codec: Codec) -> dict:
    """The index of drafts. Raises UserError if they were written with another tokenizer."""
    index = read_drafts_index(drafts)
    if index["tokenizer"] != codec.fingerprint:
        raise UserError(f"{drafts} was written with tokenizer {index['tokenizer']}, not with {codec.fingerprint}")
    return index


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _is_finished(folder: Path) -> bool:
    if folder.exists() and not (folder / INDEX).exists() and any(folder.iterdir()):
        raise UserError(f"{folder} already exists and is not a round (no {INDEX})")
    return (folder / INDEX).exists()


def _same_round(folder: Path, settings: Mapping[str, Any], options: RoundOptions) -> Round:
    """The finished round. Raises UserError if made with other settings; other weights alone only cause a warning."""
    finished_round = read_round(folder)
    changed = _changed(finished_round.manifest, settings, options)
    if changed == ["model"]:
        logger.warning("%s exists already; its drafts were drawn with other weights", folder)
    elif changed:
        raise UserError(f"{folder} is a round made with another {', '.join(changed)}; choose another folder")
    return finished_round


def _changed(manifest: Mapping[str, Any], settings: Mapping[str, Any], options: RoundOptions) -> list[str]:
    """Names of the settings in which a round on disk differs from the given ones."""
    stored = {"expert": manifest["expert"], "lengths": manifest.get("lengths", "same"), **manifest["settings"]}
    return differences(stored, {"expert": identity(options.expert), "lengths": _lengths(options.codec), **settings})


def _lengths(codec: Codec) -> str:
    """The gap token that fills edits of unequal length, or `same` if such edits are rejected."""
    return codec.prompt_format.gap or "same"
