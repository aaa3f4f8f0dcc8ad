"""Drafts: the model's own responses, on disk as one shard per chunk, so a killed run draws only what is missing.

    batches -> draw_drafts(folder, batches, Drafter(...)) -> lists of `Draft`
            -> drafts-000000-00.tar, ... -> index.json (kind `drafts`), written last
    read_drafts(folder) -> the same chunks again

Samples are split evenly among the speeds in `tokens_per_step`, so no image is drafted twice. A chunk is one speed's
share of a batch and is named by the batch number: the chunks are the same for any number of ranks.
"""

from __future__ import annotations

import logging
import shutil
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from src.distributed.parallel import Team
from src.io.errors import UserError
from src.io.files import read_json, sha256, write_json
from src.io.progress import Bar
from src.io.settings import changes, describe
from src.io.shards import INDEX, image_name, read_manifest, read_shard, shard_entry, write_index, write_shard
from src.io.words import counted
from src.text.tokenizer import Codec
from src.types import Backbone, Batch, Draft, Prefix, Sampled, SpecialIds

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"


class DraftSampler(Protocol):
    """The part of a sampler that drafting uses (see `src/samplers/sampler.py`)."""

    @property
    def schedule(self) -> Any: ...

    def with_steps(self, *, tokens_per_step: int) -> DraftSampler: ...

    def __call__(
        self, backbone: Backbone, prefix: Prefix, *, special: SpecialIds, keys: list[str], seed: int
    ) -> Sampled: ...


class DamagedDrafts(UserError):
    """Raised for a shard of drafts that is unreadable, incomplete or changed."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}); repeat the `src.draft` command, which draws it again")


@dataclass(frozen=True, kw_only=True)
class Drafter:
    """What draws the drafts of a round.

    model: hash of the weights, `fingerprint(backbone)`; of a sharded backbone to be computed before it is gathered
    tokens_per_step: speeds; the samples of a round are split among them
    num: drafts of all ranks; seed: the same (seed, key) gives the same draft, whatever else is in the batch
    data: the datamodule's part of what drafts depend on (`draft_settings`)
    """

    backbone: Any
    model: str
    sampler: DraftSampler
    codec: Codec
    tokens_per_step: Sequence[int]
    num: int
    round_number: int
    seed: int
    data: Mapping[str, Any]
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if not self.tokens_per_step:
            raise UserError("tokens_per_step must name at least one speed, got an empty list")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that the drafts depend on, stored beside them."""
        gap = self.codec.prompt_format.gap
        return {
            "model": self.model,
            "tokenizer": self.codec.fingerprint,
            "sampler": describe(self.sampler),
            "tokens_per_step": list(self.tokens_per_step),
            "num": self.num,
            "round": self.round_number,
            "seed": self.seed,
            **({} if gap is None else {"gap": gap}),
            **self.data,
        }

    @torch.no_grad()
    def draw(self, batch: Batch, *, tokens_per_step: int) -> list[Draft]:
        """One draft per row, cut after its first eot."""
        sampler, codec = self.sampler.with_steps(tokens_per_step=tokens_per_step), self.codec
        prefix = self.backbone.encode_prefix(batch.to(self.device).prefix)
        sampled = sampler(self.backbone, prefix, special=codec.special, keys=batch.keys, seed=self.seed)
        schedule = sampler.schedule
        steps = schedule.steps or schedule.blocks * -(-schedule.block_length // schedule.tokens_per_step)
        drafts, images = [], batch.images or [b""] * len(batch)
        rows = zip(sampled.ids.tolist(), sampled.unmasked_at.tolist(), batch.keys, batch.records, images, strict=True)
        for ids, unmasked_at, key, record, image in rows:
            ids = ids[: ids.index(codec.eot_id) + 1] if codec.eot_id in ids else ids
            captions = record.get("captions") or [{"text": ""}]
            draft = Draft(
                key=f"{key}@s{steps}",
                prompt=record["prompt"],
                text=codec.decode(ids),
                token_ids=ids,
                steps=steps,
                reference=captions[0]["text"],
                sampler=describe(sampler),
                fingerprint=self.model,
                seed=self.seed,
                record=record,
                image=image,
                unmasked_at=unmasked_at,
            )
            drafts.append(draft)
        return drafts


def cap_num_drafts(num: int, count: int, *, name: str) -> int:
    """`num`, but at most the `count` training images. name: the setting that the warning mentions."""
    if num > count:
        logger.warning(
            "%s=%d is more than the %s: each of them is drafted once", name, num, counted(count, "training image")
        )
    return min(num, count)


def draw_drafts(
    folder: Path, batches: Iterable[tuple[int, Batch]], drafter: Drafter, *, team: Team, replace: bool = False
) -> Iterator[list[Draft]]:
    """Draw this rank's drafts chunk by chunk, reading chunks that are already on disk; ends when all ranks are done.

    batches: (number, batch) of this rank
    replace: drafts with other settings, for example of other weights, are removed; otherwise UserError is raised
    """
    # 1. All drafts may be there.
    if team.on_rank0(lambda: _claim(folder, drafter.settings, replace=replace)):
        yield from read_drafts(folder, team)
        return
    # 2. Draw what is missing. Batches are split among the speeds, rotated from batch to batch to even out remainders.
    speeds, shards, num_drawn, seconds = drafter.tokens_per_step, [], 0, 0.0
    with Bar(total=-(-drafter.num // team.size), desc="draft", unit="draft", disable=not team.is_rank0) as bar:
        for number, batch in batches:
            for offset in range(min(len(speeds), len(batch))):
                part = batch.rows(slice(offset, None, len(speeds)))
                path = folder / f"drafts-{number:06d}-{offset:02d}.tar"
                try:
                    drafts = _read_chunk(path) if path.exists() else []
                except DamagedDrafts as error:
                    logger.warning("%s: drawing it again", error)
                    drafts = []
                if [draft.key.rpartition("@")[0] for draft in drafts] == part.keys:
                    shards.append(shard_entry(path, len(drafts)))
                else:
                    start, speed = time.perf_counter(), speeds[(number + offset) % len(speeds)]
                    drafts = drafter.draw(part, tokens_per_step=speed)
                    seconds, num_drawn = seconds + time.perf_counter() - start, num_drawn + len(drafts)
                    shards.append(write_shard(path, map(_to_sample, drafts)))
                bar.update(len(drafts))
                yield drafts
    # 3. Write the index. NOTE: collective; runs when the caller exhausts the iterator
    per_rank = team.gather((shards, num_drawn, seconds))

    def write() -> None:
        shards = sorted((shard for shards, _, _ in per_rank for shard in shards), key=lambda shard: shard["name"])
        if not shards:
            reason = "nothing was drafted, as no training sample could be read; prepare the data again"
            raise UserError(f"{folder}: {reason}")
        # of this run alone: chunks of an earlier, killed one do not count
        drawing = {
            "drawn": sum(drawn for _, drawn, _ in per_rank),
            "seconds": round(max(seconds for _, _, seconds in per_rank), 3),
        }
        extra = {"settings": drafter.settings, "drawing": drawing}
        write_index(folder, shards, kind="drafts", tokenizer=drafter.codec.fingerprint, extra=extra)

    team.on_rank0(write)


def _claim(folder: Path, settings: Mapping[str, Any], *, replace: bool) -> bool:
    """Take a folder for drafts with these settings; returns whether all of them are drawn already."""
    file = folder / SETTINGS
    if file.is_file() and (changed := changes(read_json(file), settings, "in the drafts")):
        if not replace:
            raise UserError(f"{folder} holds drafts made with other settings ({changed}); choose another folder")
        logger.warning("%s: drawing again, settings changed (%s)", folder, changed)
        shutil.rmtree(folder)
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, dict(settings))
    if not (folder / INDEX).exists():
        return False
    hashes = {folder / shard["name"]: shard["sha256"] for shard in read_drafts_index(folder)["shards"]}
    damaged = [path for path, digest in hashes.items() if not path.is_file() or sha256(path) != digest]
    for path in damaged:  # to be drawn again
        path.unlink(missing_ok=True)
        (folder / INDEX).unlink(missing_ok=True)
    return not damaged


def read_drafts_index(folder: Path, codec: Codec | None = None) -> dict:
    """The index.json of a finished folder of drafts. Raises UserError if it holds others, or is of another codec."""
    index = read_manifest(folder)
    if index["kind"] != "drafts":
        raise UserError(f"{folder} holds {index['kind']!r}, not drafts; make drafts with `python -m src.draft`")
    if not all(isinstance(index.get(name), dict) for name in ("settings", "drawing")):
        raise UserError(f"{folder / INDEX} is damaged (settings, drawing or counts are missing); draw the drafts again")
    if codec is not None and index["tokenizer"] != codec.fingerprint:
        raise UserError(f"{folder} was written with tokenizer {index['tokenizer']}, not with {codec.fingerprint}")
    return index


def read_drafts(folder: Path, team: Team | None = None, *, skip: bool = False) -> Iterator[list[Draft]]:
    """The chunks of a finished folder of drafts, in order; with a `team`, this rank's share of them.

    Raises DamagedDrafts for a damaged shard, or with `skip` warns and skips it.
    """
    shards = read_drafts_index(folder)["shards"]
    for shard in shards[team.rank :: team.size] if team else shards:
        try:
            drafts = _read_chunk(folder / shard["name"], digest=shard["sha256"])
        except DamagedDrafts as error:
            if not skip:
                raise
            logger.warning("left out: %s", error)
            continue
        yield drafts


def _read_chunk(path: Path, *, digest: str | None = None) -> list[Draft]:
    """The drafts of a shard. Raises DamagedDrafts if it cannot be read, or has another sha256 than `digest`."""
    try:
        drafts = [Draft(**s["json"], image=s.get("png") or s.get("jpg") or b"") for s in read_shard(path)]
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise DamagedDrafts(path, f"{type(error).__name__}: {error}") from error
    if digest is not None and sha256(path) != digest:
        raise DamagedDrafts(path, "its content is not what was written")
    return drafts


def _to_sample(draft: Draft) -> dict[str, Any]:
    image = {image_name(draft.image): draft.image} if draft.image else {}
    content = {f.name: getattr(draft, f.name) for f in fields(draft) if f.name != "image"}
    return {"__key__": draft.key, "json": content, **image}
