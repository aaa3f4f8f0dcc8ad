"""What training reads over epochs, rounds and changes of the number of ranks: nothing twice with the same noise."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from src.io.shards import read_shard, write_shard
from src.text.tokenizer import Codec
from src.types import Batch
from tests.test_mixing import SOURCES, codec, describe, folder, keys, module  # noqa: F401  (fixtures)

EVEN = {"vicrit": 1, "sharegpt4v": 1}


def train(folder: Path, codec: Codec, worlds: list[int], *, stop: int | None, **settings: Any) -> list[list[Batch]]:  # noqa: F811
    """The batches of each epoch, on all ranks: one epoch with each number of ranks.

    stop: the number of ranks of an epoch comes after so many batches of it, instead of before the first
    """
    state, epochs, world = None, [], worlds[0]
    for epoch, following in enumerate(worlds):
        batches = list[Batch]()
        for now, first in ((world, True), (following, False)):
            states = []
            if first and (stop is None or epoch == 0):
                continue
            for rank in range(now):
                made = module(folder, codec, place=(rank, now), epoch=epoch, **settings)
                if state:
                    made.load_state_dict(json.loads(json.dumps(state)))
                reading = iter(made.train_dataloader())
                batches += [next(reading) for _ in range(stop or 0)] if first else list(reading)
                states.append(made.state_dict())
            state = states[0]
            assert all(other == state for other in states)
        world = following
        epochs.append(batches)
    return epochs


def noises(epochs: list[list[Batch]]) -> list[tuple[str, int]]:
    return [pair for batches in epochs for batch in batches for pair in zip(batch.keys, batch.passes, strict=True)]


@pytest.mark.parametrize("worlds", [[2, 3, 1, 2, 2], [1, 4, 1, 3]])
@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        (1, {}),
        (None, {"weights": EVEN}),
        (2, {"weights": {"vicrit": 0.3, "sharegpt4v": 2.5}}),
        (3, {"epoch_batches": 7}),
        (None, {"epoch_batches": 23, "weights": EVEN}),
        (None, {"batch_size": 15, "limit": 40}),  # a step of some ranks is more than a pass
    ],
)
def test_no_sample_gets_the_same_noise_twice(
    folder: Path,  # noqa: F811
    codec: Codec,  # noqa: F811
    settings: dict[str, Any],
    worlds: list[int],
    stop: int | None,
) -> None:
    """Whatever the weights, and when the number of ranks changes between epochs and within them."""
    seen = noises(train(folder, codec, worlds, stop=stop, **settings))
    assert len(seen) > 80
    assert len(set(seen)) == len(seen)


def test_with_a_fixed_number_of_steps_nothing_is_left_behind(folder: Path, codec: Codec) -> None:  # noqa: F811
    """Epochs of 5 batches go on where the last one has ended, and fewer ranks leave what they could not read."""
    for stop in (None, 2):
        seen = Counter(
            key for key, _ in noises(train(folder, codec, [3, 2, 1, 2, 3], stop=stop, epoch_batches=5, weights=EVEN))
        )
        whole, rest = divmod(seen.total(), 61)
        assert set(seen.values()) <= {whole, whole + 1}
        assert sum(count > whole for count in seen.values()) == rest


def test_a_round_brings_new_noise_whatever_the_weights(folder: Path, codec: Codec) -> None:  # noqa: F811
    rounds = [str(folder.parent / "round-0001")]
    seen = []
    for added in ([], rounds):
        for epoch in range(4):
            made = module(folder, codec, epoch=epoch, rounds=added, data_share=0.5, batch_size=4, epoch_batches=40)
            seen += noises([list(made.train_dataloader())])
    assert len(set(seen)) == len(seen) == 2 * 4 * 40 * 4


def break_samples(folder: Path, broken: set[str]) -> None:  # noqa: F811
    for shard in (folder / "train").glob("*.tar"):
        samples = [{**some, "png": b"x"} if some["__key__"] in broken else some for some in read_shard(shard)]
        write_shard(shard, samples)


def test_a_stand_in_is_of_the_same_source_and_has_noise_of_its_own(folder: Path, codec: Codec) -> None:  # noqa: F811
    """Sample n is of source n % 3; those of source 1 have weight 0."""
    broken = {f"k{n:03d}" for n in range(0, 61, 4)}
    break_samples(folder, broken)
    weights = {"vicrit": 1.5, "sharegpt4v": 0}
    epochs = train(folder, codec, [1, 2, 2, 1], stop=None, weights=weights)
    for batches in epochs:
        sources = Counter(int(key[1:]) % 3 for batch in batches for key in batch.keys)
        assert 29 <= sources[0] <= 32 and 18 <= sources[2] <= 20 and not sources[1]  # 21 x 1.5 and 20, but for the tail
    seen = noises(epochs)
    assert not broken & {key for key, _ in seen}
    assert len(set(seen)) == len(seen)
    assert sum(number < 0 for _, number in seen) > 20


def test_damage_of_validation_and_drafts_is_counted_apart(folder: Path, codec: Codec) -> None:  # noqa: F811
    (shard, _) = sorted((folder / "val").glob("*.tar"))
    shard.write_bytes(b"")
    made = module(folder, codec, weights=EVEN)
    assert keys(made.val_dataloader()) == [["k008", "k009"]]
    assert (made.notes, sum(made.other_notes.values())) == ({}, 8)
    break_samples(folder, {"k003"})
    list(made.train_dataloader())
    assert sum(made.notes.values()) == 1


@pytest.mark.parametrize("worlds", [(2, 3), (3, 1, 2), (1, 4), (2, 1, 2, 3)])
@pytest.mark.parametrize("rounds", [False, True])
def test_other_ranks_read_what_is_left_of_an_epoch_once(
    folder: Path,  # noqa: F811
    codec: Codec,  # noqa: F811
    worlds: tuple[int, ...],
    rounds: bool,
) -> None:
    """At several moments, one after another; the last ranks finish the epoch."""
    settings: dict[str, Any] = {"epoch": 1, "weights": {"vicrit": 1, "sharegpt4v": 1}, "bucket": 3}
    settings |= {"rounds": [str(folder.parent / "round-0001")], "data_share": 0.5} if rounds else {}
    draws, state, seen = Random(str(worlds)), None, Counter[str]()
    for number, world in enumerate(worlds):
        is_last = number == len(worlds) - 1
        states, lengths, stop = [], set(), draws.randint(1, 2)
        for rank in range(world):
            made = module(folder, codec, place=(rank, world), **settings)
            if state:
                made.load_state_dict(json.loads(json.dumps(state)))
            loader = made.train_dataloader()
            lengths.add(len(loader))
            batches = iter(loader)
            taken = list(batches) if is_last else [next(batches) for _ in range(stop)]
            assert {len(batch.keys) for batch in taken} == {2}
            seen.update(key for batch in taken for key in batch.keys[int(rounds) :])
            states.append(made.state_dict())
        state = states[0]
        assert all(other == state for other in states)
        assert lengths == {state["loader"]["of"]}
    everything = {f"d{n:03d}" for n in range(21)} if rounds else {f"k{n:03d}" for n in range(61)}
    step = worlds[0] * (1 if rounds else 2)
    assert len(set(seen)) == len(everything) - len(everything) % step  # all that the first ranks would have read
    padding = sum(seen.values()) - len(seen)
    assert padding < worlds[-1] * 2 and set(seen.values()) <= {1, 2}


@pytest.mark.parametrize("settings", [{}, {"epoch_batches": 9}])
@pytest.mark.parametrize("worlds", [(2, 5), (3, 2)])
def test_a_process_that_goes_on_reads_what_a_restarted_one_does(
    folder: Path,  # noqa: F811
    codec: Codec,  # noqa: F811
    settings: dict[str, Any],
    worlds: tuple[int, int],
) -> None:
    """Epoch 0 stops after 2 batches and goes on with other ranks. Epoch 1 then follows in the same processes."""
    before, after = worlds
    first = module(folder, codec, place=(0, before), **settings)
    readings = [iter(first.train_dataloader())]
    readings += [
        iter(module(folder, codec, place=(r, before), **settings).train_dataloader()) for r in range(1, before)
    ]
    seen = noises([[next(reading) for _ in range(2)] for reading in readings])
    epochs, restarted = [list[Batch](), list[Batch]()], list[Batch]()
    for rank in range(after):
        made = module(folder, codec, place=(rank, after), **settings)
        made.load_state_dict(first.state_dict())
        epochs[0] += list(made.train_dataloader())
        again = module(folder, codec, place=(rank, after), epoch=1, **settings)
        again.load_state_dict(made.state_dict())
        made.trainer.current_epoch = 1  # type: ignore[union-attr]
        epochs[1] += list(made.train_dataloader())
        restarted += list(again.train_dataloader())
    assert noises([restarted]) == noises([epochs[1]])
    seen += noises(epochs)
    assert len(set(seen)) == len(seen) > 70
