"""Drafts: what a model writes, on disk in shards of one chunk each, so that a killed run draws only the rest.

    batches -> draw_drafts(folder, batches, partial(draft_batch, backbone, ...)) -> lists of `Draft`
            -> drafts-000000-00.tar, ... -> index.json (kind `drafts`), written last
    read_drafts(folder) -> the same chunks again

Samples are shared evenly among the speeds of `tokens_per_step`, so that no image is drafted twice. A chunk is a speed's
share of a batch, and is named by the number of that batch: several ranks, however many, make the same chunks as one.
"""

from __future__ import annotations

import logging
import shutil
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from src.distributed.parallel import Team
from src.io.errors import UserError
from src.io.files import read_json, sha256, write_json
from src.io.settings import as_json, describe, differences
from src.io.shards import INDEX, image_name, read_manifest, read_shard, shard_entry, write_index, write_shard
from src.models.hf.folder import fingerprint
from src.text.tokenizer import Codec
from src.types import Backbone, Batch, Draft, Prefix, Sampled, SpecialIds

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"
NOT_AS_WRITTEN = "it is not as it was written"


class DraftSampler(Protocol):
    """What drafting needs of a sampler (see `src/samplers/sampler.py`)."""

    @property
    def schedule(self) -> Any: ...

    def with_steps(self, *, tokens_per_step: int) -> DraftSampler: ...

    def __call__(
        self, backbone: Backbone, prefix: Prefix, *, special: SpecialIds, keys: list[str], seed: int
    ) -> Sampled: ...


class DraftsBatch(Protocol):
    """Draws the drafts of one batch at one speed."""

    def __call__(self, batch: Batch, *, tokens_per_step: int) -> list[Draft]: ...


def draft_batch(
    backbone: Backbone,
    batch: Batch,
    *,
    sampler: DraftSampler,
    codec: Codec,
    tokens_per_step: int,
    seed: int,
    fingerprint: str,
    device: torch.device | str = "cpu",
) -> list[Draft]:
    """A draft for each row. The same (seed, key) gives the same draft, whatever else is in the batch."""
    chosen = sampler.with_steps(tokens_per_step=tokens_per_step)
    with torch.no_grad():
        prefix = backbone.encode_prefix(batch.to(device).prefix)
        sampled = chosen(backbone, prefix, special=codec.special, keys=batch.keys, seed=seed)
    common = {
        "steps": _num_steps(chosen.schedule),
        "sampler": describe(chosen),
        "fingerprint": fingerprint,
        "seed": seed,
    }
    images = batch.images or [b""] * len(batch)
    rows = zip(sampled.ids.tolist(), batch.keys, batch.records, images, strict=True)
    return [_draft(codec, *row, common) for row in rows]


def capped(num: int, count: int, *, name: str) -> int:
    """`num` drafts, or `count` where there are only so many images. name: of the setting, for the warning."""
    if num > count:
        logger.warning("%s=%d is more than the %d training images: each of them is drafted once", name, num, count)
    return min(num, count)


def settings_of(
    backbone: nn.Module,
    sampler: DraftSampler,
    *,
    codec: Codec,
    tokens_per_step: Sequence[int],
    num: int,
    round_number: int,
    seed: int,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """What drafts depend on; it is kept with them. data: the part that the datamodule knows."""
    return {
        "model": fingerprint(backbone),
        "tokenizer": codec.fingerprint,
        "sampler": describe(sampler),
        "tokens_per_step": list(tokens_per_step),
        "num": num,
        "round": round_number,
        "seed": seed,
        **({} if codec.prompt_format.gap is None else {"gap": codec.prompt_format.gap}),
        **data,
    }


def draw_drafts(
    folder: Path,
    batches: Iterable[tuple[int, Batch]],
    draft: DraftsBatch,
    *,
    tokens_per_step: Sequence[int],
    tokenizer: str,
    settings: Mapping[str, Any],
    total: int,
    team: Team,
) -> Iterator[list[Draft]]:
    """Draw this rank's drafts chunk by chunk, or read those that lie there already; finished when all ranks are.

    batches: (number, batch) of this rank; settings: what the drafts depend on; a folder with other settings is refused
    total: of all ranks, for the progress bar
    """
    if not tokens_per_step:
        raise UserError("tokens_per_step must name at least one speed, got an empty list")
    known, finished = team.on_rank0(lambda: _claim(folder, settings))
    if finished:
        for name in list(known)[team.rank :: team.size]:
            yield _read_chunk(folder / name)
        return
    shards, num_drawn, seconds = [], 0, 0.0
    with tqdm(total=-(-total // team.size), desc="draft", unit="draft", disable=not team.first) as bar:
        for name, part, speed in _parts(batches, tokens_per_step):
            path = folder / f"drafts-{name}.tar"
            drafts = _drawn_before(path, part.keys, known.get(path.name))
            if drafts is not None:
                shards.append(shard_entry(path, len(drafts)))
            else:
                began = time.perf_counter()
                drafts = draft(part, tokens_per_step=speed)
                seconds, num_drawn = seconds + time.perf_counter() - began, num_drawn + len(drafts)
                shards.append(write_shard(path, map(_to_sample, drafts)))
            bar.update(len(drafts))
            yield drafts
    parts = team.gather((shards, num_drawn, seconds))
    team.on_rank0(lambda: _finish(folder, parts, tokenizer=tokenizer, settings=settings))


def _finish(folder: Path, parts: list[tuple[list[dict], int, float]], *, tokenizer: str, settings: Any) -> None:
    """Write the index of the drafts of all ranks."""
    shards = sorted((shard for some, _, _ in parts for shard in some), key=lambda shard: shard["name"])
    if not shards:
        raise UserError(f"{folder}: nothing was drafted, as no training sample could be read; make the data again")
    seconds = round(max(seconds for _, _, seconds in parts), 3)
    drawing = {"drawn": sum(drawn for _, drawn, _ in parts), "seconds": seconds}  # by the processes that finished
    extra = {"settings": dict(settings), "drawing": drawing}
    write_index(folder, shards, kind="drafts", tokenizer=tokenizer, extra=extra)


def read_drafts(folder: Path, team: Team | None = None, *, skip: bool = False) -> Iterator[list[Draft]]:
    """The chunks of a finished folder of drafts, in order; of several ranks each reads its own.

    Raises DamagedDrafts where a shard is not whole, or tells it and goes on (skip).
    """
    shards = read_drafts_index(folder)["shards"]
    for shard in shards[team.rank :: team.size] if team else shards:
        path = folder / shard["name"]
        try:
            drafts = _read_chunk(path)
            if not _is_intact(path, shard):
                raise DamagedDrafts(path, NOT_AS_WRITTEN)
        except DamagedDrafts as error:
            if not skip:
                raise
            logger.warning("left out: %s", error)
            continue
        yield drafts


def read_drafts_index(folder: Path) -> dict:
    """The index.json of a finished folder of drafts. Raises UserError where it holds something else."""
    index = read_manifest(folder)
    if index["kind"] != "drafts":
        raise UserError(f"{folder} holds {index['kind']!r}, not drafts; make drafts with `python -m src.draft`")
    if not all(isinstance(index.get(name), dict) for name in ("settings", "drawing", "counts")):
        raise UserError(f"{folder / INDEX} is damaged (it lacks settings, drawing or counts); make the drafts again")
    return index


class DamagedDrafts(ValueError):
    """A shard of drafts that is not whole."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged ({why}); repeat the `src.draft` command, which draws it again")


def drop_stale(folder: Path, settings: Mapping[str, Any]) -> None:
    """Remove drafts that were drawn with other settings, by other weights for example."""
    found = _settings_in(folder)
    if found is not None and found != as_json(settings):
        logger.warning("%s: drawing again, %s changed", folder, ", ".join(differences(found, settings)))
        shutil.rmtree(folder)


def _parts(batches: Iterable[tuple[int, Batch]], tokens_per_step: Sequence[int]) -> Iterator[tuple[str, Batch, int]]:
    """(name, part, speed): each batch dealt out among the speeds. The first moves on, so that remainders even out."""
    for number, batch in batches:
        for place in range(min(len(tokens_per_step), len(batch))):
            part = batch.rows(slice(place, None, len(tokens_per_step)))
            yield f"{number:06d}-{place:02d}", part, tokens_per_step[(number + place) % len(tokens_per_step)]


def _draft(codec: Codec, ids: list[int], key: str, record: dict, image: bytes, common: dict) -> Draft:
    ids = ids[: ids.index(codec.eot_id) + 1] if codec.eot_id in ids else ids
    captions = record.get("captions") or [{"text": ""}]
    return Draft(
        key=f"{key}@s{common['steps']}",
        prompt=record["prompt"],
        text=codec.decode(ids),
        token_ids=ids,
        reference=captions[0]["text"],
        record=record,
        image=image,
        **common,
    )


def _num_steps(schedule: Any) -> int:
    """Steps that a schedule takes for a response of masks only."""
    return schedule.steps or schedule.blocks * -(-schedule.block_length // schedule.tokens_per_step)


def _to_sample(draft: Draft) -> dict[str, Any]:
    image = {image_name(draft.image): draft.image} if draft.image else {}
    plain = {f.name: getattr(draft, f.name) for f in fields(draft) if f.name != "image"}
    return {"__key__": draft.key, "json": plain, **image}


def _known(folder: Path) -> dict[str, dict]:
    """The entries of the shards of a finished folder, by name; none of one that is not finished."""
    if not (folder / INDEX).exists():
        return {}
    return {entry["name"]: entry for entry in read_drafts_index(folder)["shards"]}


def _is_intact(path: Path, entry: Mapping[str, Any]) -> bool:
    return path.is_file() and sha256(path) == entry["sha256"]


def _drawn_before(path: Path, keys: Sequence[str], entry: Mapping[str, Any] | None) -> list[Draft] | None:
    """The drafts of a shard, which must be of these samples; None where it is not there, or not whole.

    entry: what an index says of it, if there is one
    """
    if not path.exists():
        return None
    try:
        drafts = _read_chunk(path)
        found = [draft.key.rpartition("@")[0] for draft in drafts]
        if (entry and not _is_intact(path, entry)) or (found != keys and found == keys[: len(found)]):
            raise DamagedDrafts(path, NOT_AS_WRITTEN)
    except DamagedDrafts as error:
        logger.warning("%s: drawing it again", error)
        return None
    if found != keys:
        raise UserError(f"{path} holds drafts of other samples; remove {path.parent} to draw again")
    return drafts


def _read_chunk(path: Path) -> list[Draft]:
    """The drafts of a shard. Raises DamagedDrafts where it cannot be read, or holds something else."""
    try:
        return [Draft(**s["json"], image=s.get("png") or s.get("jpg") or b"") for s in read_shard(path)]
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise DamagedDrafts(path, f"{type(error).__name__}: {error}") from error


def _claim(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, dict], bool]:
    """What an index says of the shards, and whether all are there as they were; else the folder counts as unfinished.

    A folder without drafts gets a note of what they will depend on; one that was drawn otherwise is refused.
    """
    found = _settings_in(folder)
    if found is None or not any(folder.glob("*.tar")):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, dict(settings))
    elif changed := differences(found, settings):
        names = ", ".join(changed)
        raise UserError(f"{folder} holds drafts made with another {names}; choose another folder")
    known = _known(folder)
    finished = bool(known) and all(_is_intact(folder / name, entry) for name, entry in known.items())
    if not finished:
        (folder / INDEX).unlink(missing_ok=True)
    return known, finished


def _settings_in(folder: Path) -> dict | None:
    path = folder / SETTINGS
    return read_json(path) if path.is_file() else None
