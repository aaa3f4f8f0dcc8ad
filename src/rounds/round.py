"""Draft -> revise -> shards on disk: the work of the online loop, for the callback and for the `revise` verb.

    batches -> draw_drafts -> drafts/                        one shard for each chunk (src/rounds/drafts.py)
            -> expert, in a thread while the next chunk is drawn -> journal-rank-0000.jsonl (src/chat/journal.py)
            -> src.text.align.locate -> round-000000.tar, ... -> index.json, the manifest

    how = Revising(expert=expert, codec=codec, ...)
    run_round("rounds/round-0001", batches, partial(draft_batch, ...), how=how, ...)      draft and revise
    revise_round("rounds/round-0001", drafts, how=how)                                    drafts on disk

A round grows in `.round-0001.partial` and gets its name last. The call that was killed is simply repeated: it
draws no finished chunk again, asks nothing that was answered, and returns a finished round as it is.

Drafts that a round has to do without, as the expert was late or failed in a way that may pass, are asked about again
in the next one (`late`), and count there.

Of several ranks each draws and asks about its own drafts; when all answers are there, rank 0 writes the round. Its
shards are those of one process, byte by byte.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src.chat.journal import Answers, Journal
from src.distributed.parallel import Team, world
from src.io.errors import UserError
from src.io.files import publish, write_json
from src.io.settings import describe, differences
from src.io.shards import INDEX, image_name, read_manifest, write_shards
from src.rounds.drafts import DraftsBatch, draw_drafts, drop_stale, read_drafts, read_drafts_index
from src.rounds.expert_thread import ExpertThread
from src.rounds.stats import RoundStats
from src.text.align import Aligned
from src.text.tokenizer import Codec
from src.types import Batch, Draft, Expert, FailedRound, Revision, Round

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Revising:
    """How drafts are revised and written.

    per_shard: samples in a shard of the round
    patience: seconds without any answer after which an expert is given up
    deadline: seconds from the last draft on, after which no more is asked; None: all is
    """

    expert: Expert
    codec: Codec
    per_shard: int
    patience: float
    team: Team
    deadline: float | None = None

    def __post_init__(self) -> None:
        if self.per_shard < 1:
            raise UserError(f"per_shard must be at least 1, got {self.per_shard}")


def run_round(
    folder: str | Path,
    batches: Iterable[tuple[int, Batch]],
    draft: DraftsBatch,
    *,
    how: Revising,
    tokens_per_step: Sequence[int],
    settings: Mapping[str, Any],
    total: int,
    late: Path | None = None,
) -> Round:
    """Draft and revise into `folder`.

    batches: (number, batch) of this rank; settings: what the drafts depend on (model, sampler, seed, ...)
    total: drafts of all ranks; late: the round before, whose late drafts are asked about again
    """
    folder, drafts = Path(folder), _partial(Path(folder)) / "drafts"

    def prepare() -> Round | None:
        if _is_finished(folder):
            return _same_round(folder, settings, how)
        return drop_stale(drafts, settings)

    if made := how.team.on_rank0(prepare):
        charge(how.expert, made.manifest.get("usage", {}), how.team)
        return made
    drawn = draw_drafts(
        drafts, batches, draft,
        tokens_per_step=tokens_per_step, tokenizer=how.codec.fingerprint, settings=settings, total=total, team=how.team,
    )  # fmt: skip
    return _make(folder, drafts, drawn, settings, how, total, late)


def revise_round(folder: str | Path, drafts: Path, *, how: Revising, ask: bool = True, reread: bool = False) -> Round:
    """Ask the expert about the finished folder `drafts` and write the corrected ones as a round.

    ask: false makes do with the answers that are in the journal; reread: their replies are read once more, with the
    code and the tokenizer as they are now
    """
    folder, index = Path(folder), check_drafts(drafts, how.codec)
    settings, total = index["settings"], index["counts"]["written"]
    if made := how.team.on_rank0(lambda: _same_round(folder, settings, how) if _is_finished(folder) else None):
        return made
    drawn = read_drafts(drafts, how.team) if ask else ()
    return _make(folder, drafts, drawn, settings, how, total, reread=reread)


def check_reopens(folder: Path, drafts: Path, how: Revising) -> None:
    """Raise UserError where a round is not there, or not of these drafts and this expert: it would be made without.

    Or where it is a training's, whose drafts lie in it: a training may need it as it is.
    """
    if drafts.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} is a round of a training, which needs it as it is; copy its drafts to revise them")
    settings = check_drafts(drafts, how.codec)["settings"]
    if not folder.exists() and not _partial(folder).exists():
        raise UserError(f"there is no round {folder}")
    changed = _changed(read_round(folder).manifest, settings, how) if _is_finished(folder) else []
    if changed not in ([], ["lengths"]):  # a gap is taken up by reading again
        raise UserError(f"{folder} is a round made with another {', '.join(changed)}; choose another folder")


def reopen(folder: str | Path, *, always: bool = False) -> bool:
    """Make a finished round one under way again, if asking once more may help about some of its drafts, or `always`."""
    folder = Path(folder)
    (_partial(folder) / INDEX).unlink(missing_ok=True)  # of a call of this that was killed
    if not _is_finished(folder) or not (always or read_round(folder).manifest.get("again")):
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
        raise UserError(f"{folder} holds {manifest['kind']!r}, not a round")
    return Round(Path(folder), manifest)


def note(folder: Path, more: Mapping[str, Any]) -> None:
    """Add to the manifest of a finished round what was found out about it since."""
    write_json(folder / INDEX, {**read_round(folder).manifest, **more})


class EmptyRound(FailedRound):
    """A round that holds nothing to train on."""


def _make(
    folder: Path,
    drafts: Path,
    drawn: Iterable[list[Draft]],
    settings: Mapping[str, Any],
    how: Revising,
    total: int,
    late: Path | None = None,
    *,
    reread: bool = False,
) -> Round:
    """Write a round; `drawn` yields the chunks of `drafts` that are this rank's, and may write them as it goes."""
    work, team = _partial(folder), how.team

    def prepare() -> bool:
        work.mkdir(parents=True, exist_ok=True)
        if (work / INDEX).exists() and _changed(read_manifest(work), settings, how):
            (work / INDEX).unlink()
        return (work / INDEX).exists()

    def ask() -> float:
        """Seconds that the answers took beyond the drawing."""
        limits = {"patience": how.patience, "deadline": how.deadline}
        with (
            journal_of(folder, how.expert, team.rank) as answers,
            _bar(total, team) as bar,
            ExpertThread(how.expert, answers, bar, **limits) as thread,
        ):
            charge(how.expert, answers.usage, team)
            for chunk in chain(_late(late, how, team), drawn):
                thread.ask(chunk)
            began = time.monotonic()
        return time.monotonic() - began

    def write(waited: float) -> None:
        with journal_of(folder, how.expert) as answers:
            _write(work, drafts, answers, how, waited=waited, late=late, reread=reread)

    if not team.on_rank0(prepare):
        waited = max(team.gather(ask()))  # rank 0 writes the answers of all
        team.on_rank0(lambda: write(waited))
    team.on_rank0(lambda: publish(work, folder))
    return read_round(folder)


def journal_of(folder: str | Path, expert: Expert, rank: int = 0) -> Journal:
    """The answers about the drafts of a round that is under way; new ones are of this rank."""
    work = _partial(Path(folder))
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"journal-rank-{rank:04d}.jsonl"
    # by name too: a listing of a folder on another machine may be older than what is in it
    known = {work / f"journal-rank-{number:04d}.jsonl" for number in range(world())}
    others = {*work.glob("journal-rank-*.jsonl"), *filter(Path.exists, known)}
    return Journal(path, expert=_told(expert), also=sorted(others))


def _told(expert: Expert) -> str:
    return json.dumps(identity(expert), sort_keys=True)


def identity(expert: Expert) -> dict[str, Any]:
    """What the answers of an expert depend on: its name and its settings."""
    return {"name": expert.name, **describe(expert)}


def charge(expert: Any, usage: Mapping[str, float], team: Team) -> None:
    """Tell an expert that counts what it may spend what the run has used before: of several ranks each its share."""
    if hasattr(expert, "charge"):
        expert.charge({"requests": 0, **{name: value / team.size for name, value in usage.items()}})


def _bar(total: int, team: Team) -> tqdm:
    """Of the answers that rank 0 waits for."""
    return tqdm(total=-(-total // team.size), desc="revise", unit="draft", disable=not team.first)


def _late(folder: Path | None, how: Revising, team: Team | None) -> Iterator[list[Draft]]:
    """The drafts of a finished round about which asking again may help: this rank's, or without a team all.

    None where another expert was asked, who has answered none of them; shards that cannot be read are left out.
    """
    if folder is None or not (folder / "drafts" / INDEX).is_file():
        return
    manifest = read_round(folder).manifest
    if not manifest.get("again") or differences(manifest["expert"], identity(how.expert)):
        return
    known = Answers(sorted(folder.glob("journal-rank-*.jsonl")), expert=_told(how.expert))
    for chunk in read_drafts(folder / "drafts", team, skip=True):
        yield [draft for draft in chunk if not known.is_settled(draft)]


def _write(
    work: Path, drafts: Path, journal: Journal, how: Revising, *, waited: float, late: Path | None, reread: bool
) -> None:
    index, tally = check_drafts(drafts, how.codec), RoundStats()
    write_shards(
        work,
        _samples(drafts, journal, how, tally, late=late, reread=reread),
        prefix="round",
        per_shard=how.per_shard,
        kind="round",
        tokenizer=how.codec.fingerprint,
        counts=tally.counts,
        extra={
            "expert": identity(how.expert),
            "lengths": _lengths(how.codec),
            **tally.manifest,
            "usage": journal.usage,
            "waited": round(waited, 3),  # seconds for the expert, when everything was drawn
            "settings": index["settings"],
            "drawing": index["drawing"],
        },
    )


def _samples(
    drafts: Path, journal: Journal, how: Revising, tally: RoundStats, *, late: Path | None, reread: bool
) -> Iterator[dict[str, Any]]:
    """The drafts that have a placed edit, as samples of a round, in the order of the drafts; late ones last."""
    read = getattr(how.expert, "reread", None) if reread else None
    seen: set[str] = set()
    for is_late, chunks in enumerate((read_drafts(drafts), _late(late, how, None))):
        for draft in chain.from_iterable(chunks):
            if (request := journal.request(draft)) in seen:
                continue  # a late draft that the model has written again
            seen.add(request)
            answer = journal.answer(draft)
            answer = read(draft, answer) if read and answer else answer
            tally.add(answer, late=bool(is_late))
            edits = answer.edits if isinstance(answer, Revision) else ()
            if edits and (aligned := tally.place(how.codec, draft, edits)).spans:
                # the image may have a new draft
                yield _to_sample(draft, aligned, key=f"{draft.key}-late" if is_late else draft.key)
    tally.close()


def _to_sample(draft: Draft, aligned: Aligned, *, key: str) -> dict[str, Any]:
    names = ("prompt", "text", "reference", "steps")
    content = {"key": key, **{name: getattr(draft, name) for name in names}, "draft_ids": aligned.ids}
    content |= {"spans": [asdict(span) for span in aligned.spans], "model": draft.fingerprint}
    content |= {name: draft.record[name] for name in ("scene",) if name in draft.record}
    image = {image_name(draft.image): draft.image} if draft.image else {}
    return {"__key__": key, "json": content, **image}


def check_drafts(drafts: Path, codec: Codec) -> dict:
    """The index of drafts. Raises UserError where they were written with another tokenizer."""
    index = read_drafts_index(drafts)
    if index["tokenizer"] != codec.fingerprint:
        found = index["tokenizer"]
        raise UserError(f"{drafts} was written with tokenizer {found}, not with {codec.fingerprint}")
    return index


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _is_finished(folder: Path) -> bool:
    if folder.exists() and not (folder / INDEX).exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is in the way: it is not a round (no {INDEX})")
    return (folder / INDEX).exists()


def _same_round(folder: Path, settings: Mapping[str, Any], how: Revising) -> Round:
    """A finished round, if it was made with the same settings; other weights alone are only reported."""
    found = read_round(folder)
    changed = _changed(found.manifest, settings, how)
    if changed == ["model"]:
        logger.warning("%s exists already; it was drafted by other weights", folder)
    elif changed:
        raise UserError(f"{folder} is a round made with another {', '.join(changed)}; choose another folder")
    return found


def _changed(manifest: Mapping[str, Any], settings: Mapping[str, Any], how: Revising) -> list[str]:
    """Names of what a round was made with that differs."""
    found = {"expert": manifest["expert"], "lengths": manifest.get("lengths", "same"), **manifest["settings"]}
    return differences(found, {"expert": identity(how.expert), "lengths": _lengths(how.codec), **settings})


def _lengths(codec: Codec) -> str:
    """How edits that change the number of tokens are placed: not at all, or with this token."""
    return codec.prompt_format.gap or "same"
