"""Drafts, journal and rounds: what is written, what is counted, and what a kill at any moment leaves."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import os
import random
import resource
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import webdataset as wds
from torch import nn

from src.chat.journal import Journal
from src.distributed.parallel import Team
from src.experts.reference import ReferenceExpert
from src.experts.scenes import ScenesExpert
from src.models.hf.folder import fingerprint
from src.rounds.drafts import Drafter, draw_drafts, read_drafts
from src.rounds.round import RoundOptions, read_round, revise_round, run_round
from src.samplers.sampler import Sampler
from src.scenes.grammar import swaps, write_caption
from src.scenes.graph import draw_scene
from src.scenes.render import render
from src.text.tokenizer import Codec
from src.types import Batch, Draft, Edit, Expert, Failure, Prefix, Revision
from testing.child import in_child

NUM, CANVAS, RIGHT = 11, 64, {"s03", "s07"}  # the drafts of RIGHT hold no mistake


class Parrot(nn.Module):
    """A backbone that sees, instead of an image, the ids that it is to say."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(vocab_size) * 9)

    def encode_prefix(self, prefix: dict) -> Prefix:
        return Prefix(prefix["says"][..., None].float())

    def forward(self, prefix: Prefix, tokens, *, attend=None, positions=None):
        logits = self.weight[prefix.embeds[..., 0].long()]  # (B, L, V)
        return logits if positions is None else logits[positions]


class Diligent(Expert):
    """Corrects through the scene graph, answers in reverse order, and notes in a file what it was asked.

    kill_at: this many answers are given before the process is killed.
    """

    name = "diligent"
    settings: ClassVar[dict] = {}  # where it notes what, and when it is killed, does not change its answers

    def __init__(self, log: Path, *, kill_at: int | None = None) -> None:
        self.log, self.kill_at, self.num = log, kill_at, 0

    async def revise(self, drafts):
        for draft in reversed(drafts):
            await asyncio.sleep(0)
            with self.log.open("a") as stream:
                stream.write(f"{draft.key}\n")
            if self.num == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.num += 1
            async for answer in ScenesExpert().revise([draft]):
                yield answer


class Case:
    """Scenes with a flawed caption each, as batches, and everything a round needs."""

    def __init__(self) -> None:
        rng = random.Random(5)
        scenes = [draw_scene(rng) for _ in range(NUM)]
        texts = [write_caption(scene, rng) for scene in scenes]
        self.codec = Codec.train([write_caption(draw_scene(rng), rng) for _ in range(300)], vocab_size=400)
        self.truth, self.samples = {}, []
        for number, (scene, text) in enumerate(zip(scenes, texts, strict=True)):
            key = f"s{number:02d}"
            swap = next(s for s in swaps(scene, text, rng) if s.fact == "attribute" and " " not in s.right)
            draft = text if key in RIGHT else text[: swap.start] + swap.wrong + text[swap.end :]
            record = {
                "key": key, "prompt": "Describe the image.", "captions": [{"text": text, "swaps": []}],
                "scene": scene.to_dict(),
            }  # fmt: skip
            stream = io.BytesIO()
            render(scene, rng).save(stream, "PNG")
            self.truth[key] = text
            self.samples.append((key, draft, record, stream.getvalue()))
        self.backbone = Parrot(self.codec.vocab_size).eval()
        self.sampler = Sampler(length=CANVAS)

    def batches(self, size: int = 4) -> list[Batch]:
        return [self._batch(self.samples[start : start + size]) for start in range(0, NUM, size)]

    def _batch(self, samples: list) -> Batch:
        keys, drafts, records, images = (list(column) for column in zip(*samples, strict=True))
        ids = [[*self.codec.encode(text)[0], self.codec.eot_id] for text in drafts]
        response = torch.tensor([row + [self.codec.eos_id] * (CANVAS - len(row)) for row in ids])
        return Batch(
            prefix={"says": response}, response=response, editable=torch.ones_like(response, dtype=torch.bool),
            flawed=response, span=torch.zeros_like(response), drafted=torch.zeros(len(keys), dtype=torch.bool),
            keys=keys, records=records, images=images,
        )  # fmt: skip

    @property
    def settings(self) -> dict:
        return self.drafter().settings

    def drafter(self, draw=None, **changed) -> Drafter:
        """draw: called for each chunk before it is drawn; changed: settings"""
        common = {
            "backbone": self.backbone,
            "model": fingerprint(self.backbone),
            "sampler": self.sampler,
            "codec": self.codec,
            "num": NUM,
            "seed": 3,
        }
        data = {"data": "d" * 64, "response_length": CANVAS, "image_size": 48, **changed}
        drafter = Drafter(tokens_per_step=[4, 16], round_number=1, data=data, **common)
        if draw:
            plain = drafter.draw
            vars(drafter)["draw"] = lambda batch, **speed: (draw(batch), plain(batch, **speed))[1]
        return drafter

    def options(self, expert, **changed) -> RoundOptions:
        common = {"expert": expert, "codec": self.codec, "per_shard": 4, "patience": 60.0, "team": Team()}
        return RoundOptions(**{**common, **changed})

    def run(self, folder: Path, expert, **changed):
        batches, late = changed.pop("batches", self.batches()), changed.pop("late", None)
        options = self.options(expert, deadline=changed.pop("deadline", None))
        return run_round(folder, enumerate(batches), self.drafter(**changed), options=options, late=late)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture(scope="module")
def whole(case, tmp_path_factory) -> Path:
    """An uninterrupted round."""
    folder = tmp_path_factory.mktemp("whole") / "round-0001"
    case.run(folder, Diligent(folder.parent / "asked"))
    return folder


def read(folder: Path) -> list[dict]:
    """The samples of a data folder, read by webdataset alone."""
    names = sorted(str(path) for path in folder.glob("*.tar"))
    return list(wds.WebDataset(names, shardshuffle=False)) if names else []


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def journaled(folder: Path) -> list[str]:
    lines = [line for path in folder.glob("journal*") for line in path.read_bytes().split(b"\n")[:-1]]
    return [json.loads(line)["key"] for line in lines]


def kill_at_rename(number: int) -> None:
    """Kill this process right before its n-th rename, from 0; the interpreter announces each one."""
    seen = iter(range(10**6))

    def hook(event: str, _: object) -> None:
        if event == "os.rename" and next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


# --- what a round holds -------------------------------------------------------------------------------------------


def test_corrected_drafts_read_as_the_truth(case, whole):
    samples = read(whole)
    assert {s["__key__"].split("@")[0] for s in samples} == case.truth.keys() - RIGHT
    for sample in samples:
        record = json.loads(sample["json"])
        key = sample["__key__"].split("@")[0]
        ids = list(record["draft_ids"])
        for span in record["spans"]:
            assert len(span["target_ids"]) == span["end"] - span["start"]
            ids[span["start"] : span["end"]] = span["target_ids"]
        draft, image = next((s, i) for k, s, _, i in case.samples if k == key)
        assert record["text"] == draft == case.codec.decode(record["draft_ids"])
        assert record["draft_ids"][-1] == case.codec.eot_id
        assert case.codec.decode(ids) == record["reference"] == case.truth[key]
        assert sample["png"] == image
        assert record["key"] == sample["__key__"] == f"{key}@s{record['steps']}"


def test_manifest_adds_up(case, whole):
    manifest = json.loads((whole / "index.json").read_text())
    written = NUM - len(RIGHT)
    assert manifest["counts"] == {
        "drafted": NUM, "late": 0, "revised": NUM, "right": len(RIGHT), "unusable": 0, "failed": 0, "unanswered": 0,
        "edits": written, "written": written,
    }  # fmt: skip
    assert manifest["kind"] == "round"
    assert manifest["tokenizer"] == case.codec.fingerprint
    assert manifest["settings"]["model"] == fingerprint(case.backbone)
    assert {s["name"]: s["sha256"] for s in manifest["shards"]} == digests(whole)
    assert [s["count"] for s in manifest["shards"]] == [4, 4, written - 8]
    assert read_round(whole).manifest == manifest


def test_speeds_share_the_samples(whole):
    """With 4 and 16 tokens a step a response length of 64 takes 16 or 4 steps; each sample is drafted once."""
    keys = [draft.key for chunk in read_drafts(whole / "drafts") for draft in chunk]
    assert len({key.split("@")[0] for key in keys}) == len(keys) == NUM
    slow = sum(key.endswith("@s16") for key in keys)
    assert slow + sum(key.endswith("@s4") for key in keys) == NUM
    assert abs(2 * slow - NUM) <= 1


def test_edits_that_cannot_be_placed_and_failures_are_counted(case, tmp_path):
    class Mixed(Expert):
        name = "mixed"

        async def revise(self, drafts):
            for draft in drafts:
                number = int(draft.key[1:3])
                if number == 0:
                    yield draft.key, Failure("refused")
                elif number == 1:
                    yield draft.key, Revision((Edit("no such words", "at all"),), usage={"tokens": 5})
                elif number == 2:
                    yield draft.key, Revision((), usage={"tokens": 2, "detail": {"cached": 1}})
                elif number != 4:
                    yield draft.key, Failure("timeout", retry=True)

    counts = case.run(tmp_path / "r", Mixed()).manifest
    assert counts["failures"] == {"refused": 1, "timeout": NUM - 4}
    assert counts["rejected"] == {"absent": 1}
    assert counts["usage"] == {"tokens": 7}
    assert counts["counts"] == {
        "drafted": NUM, "late": 0, "revised": 2, "right": 1, "unusable": 1, "failed": NUM - 3, "unanswered": 1,
        "edits": 0, "written": 0,
    }  # fmt: skip


def test_drafting_goes_on_while_the_expert_works(case, tmp_path):
    """The expert holds the first chunk until the second one is being drawn."""
    drawn: list[int] = []
    second = threading.Event()

    class Waiting(Diligent):
        async def revise(self, drafts):
            loop = asyncio.get_running_loop()
            assert await loop.run_in_executor(None, second.wait, 30)
            async for answer in super().revise(drafts):
                yield answer

    def draw(batch):
        drawn.append(len(batch))
        if len(drawn) == 2:
            second.set()

    made = case.run(tmp_path / "r", Waiting(tmp_path / "asked"), draw=draw)
    assert made.manifest["counts"]["revised"] == NUM


# --- kills --------------------------------------------------------------------------------------------------------


def resumed_equals_whole(case: Case, whole: Path, folder: Path, killed: Callable[[Path], object]) -> bool:
    """Kill a round, finish it in another process, and compare; false when the kill came too late."""
    if (code := in_child(lambda: killed(folder))) == 0:
        return False
    assert code == -signal.SIGKILL
    work = folder.with_name(f".{folder.name}.partial")
    finished = folder if folder.exists() else work
    answered = journaled(finished)
    chunks = {path: path.stat().st_mtime_ns for path in (finished / "drafts").glob("*.tar")}
    again = folder.parent / "again"
    assert in_child(lambda: case.run(folder, Diligent(again))) == 0
    repeated = again.read_text().split() if again.exists() else []
    assert sorted(repeated + answered) == sorted(journaled(whole))
    for path, changed in chunks.items():
        assert (folder / "drafts" / path.name).stat().st_mtime_ns == changed, "a finished chunk was drawn again"
    assert digests(folder) == digests(whole)
    assert digests(folder / "drafts") == digests(whole / "drafts")
    assert not [path for path in folder.parent.rglob("*") if "partial" in path.name or "tmp" in path.name]
    drop = {"drawing", "waited"}
    manifests = [json.loads((f / "index.json").read_text()) for f in (folder, whole)]
    first, second = ({k: v for k, v in m.items() if k not in drop} for m in manifests)
    assert first == second
    return True


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_before_any_rename(case, whole, tmp_path):
    """Every file and folder appears by a rename: the state before each of them is a state that a kill can leave."""

    def killed(folder: Path, number: int) -> None:
        kill_at_rename(number)
        case.run(folder, Diligent(folder.parent / "asked"))

    number = 0
    while True:
        folder = tmp_path / f"{number}" / "round-0001"
        folder.parent.mkdir()
        if not resumed_equals_whole(case, whole, folder, partial(killed, number=number)):
            break
        number += 1
    # settings, 6 chunks of drafts, their index, 3 shards, their index, the round
    assert number == 1 + 6 + 1 + 3 + 1 + 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("num_answers", [0, NUM - 1])
def test_killed_between_answers(case, whole, tmp_path, num_answers):
    def killed(folder: Path) -> None:
        case.run(folder, Diligent(folder.parent / "asked", kill_at=num_answers))

    assert resumed_equals_whole(case, whole, tmp_path / "round-0001", killed)


def test_finished_round_is_returned_as_it_is(case, whole, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}

    def draw(batch):
        raise AssertionError("drafted again")

    made = case.run(whole, Diligent(tmp_path / "asked"), draw=draw)
    assert made.path == whole
    assert not (tmp_path / "asked").exists()
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


@pytest.mark.parametrize("name", ["seed", "round", "data", "response_length", "image_size", "tokenizer"])
def test_finished_round_of_other_settings_is_refused(case, whole, tmp_path, name):
    with pytest.raises(ValueError, match=rf"round made with other settings \({name}: .* in the round, another now\);"):
        case.run(whole, Diligent(tmp_path / "asked"), **{name: "another"})


def test_finished_round_of_another_expert_is_refused(case, whole, tmp_path):
    for expert in (ScenesExpert(), ReferenceExpert()):
        message = r"round made with other settings \(expert\.name: .* in the round, \w+ now"
        with pytest.raises(ValueError, match=message):
            case.run(whole, expert)
        with pytest.raises(ValueError, match=message):
            revise_round(whole, whole / "drafts", options=case.options(expert))
    for _ in range(2):
        revise_round(tmp_path / "r", whole / "drafts", options=case.options(ReferenceExpert(max_words=2)))
    with pytest.raises(ValueError, match=r"\(expert\.max_words: 2 in the round, 3 now\); choose another folder"):
        revise_round(tmp_path / "r", whole / "drafts", options=case.options(ReferenceExpert(max_words=3)))


def test_unfinished_round_of_other_weights_is_drafted_again_but_answers_stay(case, tmp_path):
    """The drafts turn out equal here, so that not one question is left."""

    gone: list[bool] = [True]

    class Shaky(Diligent):
        async def revise(self, drafts):
            async for answer in super().revise(drafts):
                if gone[0] and self.num >= 4:
                    raise ConnectionError("the expert is gone")
                yield answer

    with pytest.raises(ConnectionError):
        case.run(tmp_path / "r", Shaky(tmp_path / "asked"))
    gone[0] = False
    answered = journaled(tmp_path / ".r.partial")
    assert len(answered) == 3
    calls = []

    case.run(tmp_path / "r", Shaky(tmp_path / "again"), draw=lambda batch: calls.append(batch.keys), model="new")
    assert sum(map(len, calls)) == NUM
    assert not set((tmp_path / "again").read_text().split()) & set(answered)


def test_expert_that_answers_twice_is_an_error(case, tmp_path):
    class Twice(Expert):
        name = "twice"

        async def revise(self, drafts):
            for _ in range(2):
                yield drafts[0].key, Revision(())

    with pytest.raises(ValueError, match=r"twice answered 's00@s16' twice"):
        case.run(tmp_path / "r", Twice())


# --- drafts and rounds apart, as the verbs use them ---------------------------------------------------------------


def test_online_and_offline_write_the_same(case, whole, tmp_path):
    chunks = list(draw_drafts(tmp_path / "drafts", enumerate(case.batches()), case.drafter(), team=Team()))
    assert sum(map(len, chunks)) == NUM
    revise_round(tmp_path / "r", tmp_path / "drafts", options=case.options(Diligent(tmp_path / "asked")))
    assert digests(tmp_path / "r") == digests(whole)
    for name in ("tokens_per_step", "data", "response_length", "round"):
        drafter = case.drafter(**{name: "another"})
        with pytest.raises(
            ValueError, match=rf"drafts made with other settings \({name}: .* in the drafts, another now\);"
        ):
            next(draw_drafts(tmp_path / "drafts", enumerate(case.batches()), drafter, team=Team()))


def test_unfinished_drafts_are_refused(case, tmp_path):
    next(draw_drafts(tmp_path / "drafts", enumerate(case.batches()), case.drafter(), team=Team()))
    with pytest.raises(ValueError, match=r"drafts is not a finished data folder"):
        revise_round(tmp_path / "r", tmp_path / "drafts", options=case.options(ScenesExpert()))


# --- journal ------------------------------------------------------------------------------------------------------


def a_draft(key: str = "a", **changed) -> Draft:
    values = {
        "key": key, "prompt": "p", "text": "A réd ring.", "token_ids": [1], "steps": 8, "reference": "A red ring.",
        "sampler": {}, "fingerprint": "f", "seed": 0,
    }  # fmt: skip
    return Draft(**{**values, **changed})


def test_journal_returns_what_it_was_given(tmp_path):
    revision = Revision((Edit("réd", "red", 2, "spelling"),), raw='{"x":\n1}', model="m", usage={"in": 3}, attempts=2)
    with Journal(tmp_path / "j", expert="e") as journal:
        journal.add_all([(a_draft("a"), revision)])
        journal.add_all([(a_draft("b"), Failure("refused"))])
        journal.add_all([(a_draft("c"), Failure("timeout", retry=True))])
    with Journal(tmp_path / "j", expert="e") as journal:
        assert journal.answer(a_draft("a")) == revision
        assert journal.answer(a_draft("b")) == Failure("refused")
        assert [journal.is_settled(a_draft(key)) for key in "abcd"] == [True, True, False, False]


@pytest.mark.parametrize("change", [{"text": "x"}, {"reference": "x"}, {"prompt": "x"}, {"key": "x"}])
def test_journal_knows_a_question_by_all_that_matters(tmp_path, change):
    with Journal(tmp_path / "j", expert="e") as journal:
        journal.add_all([(a_draft(), Revision(()))])
        assert journal.answer(a_draft(steps=9, seed=7)) is not None
        assert journal.answer(a_draft(**{"key": "a", **change})) is None
    with Journal(tmp_path / "j", expert="another") as journal:
        assert journal.answer(a_draft()) is None


def test_journal_drops_a_torn_last_line_wherever_it_is_torn(tmp_path):
    path = tmp_path / "j"
    with Journal(path, expert="e") as journal:
        journal.add_all([(a_draft("a"), Revision(()))])
        first = path.stat().st_size
        journal.add_all([(a_draft("b"), Revision((Edit("é", "e"),)))])
    data = path.read_bytes()
    for length in range(first, len(data)):
        path.write_bytes(data[:length])
        with Journal(path, expert="e") as journal:
            assert journal.answer(a_draft("b")) is None
            journal.add_all([(a_draft("b"), Revision((Edit("é", "e"),)))])
        assert path.read_bytes() == data


@pytest.mark.parametrize(
    "line",
    [
        '{"requ',
        "[1, 2]",
        '{"request": "x", "revision": {"edits": [{"target": "b"}]}}',
        '{"request": "x", "revision": {"edits": [], "usage": null}}',
    ],
)
def test_a_broken_line_of_the_journal_is_told_and_asked_again(tmp_path, caplog, line):
    """The line stands between two good ones and a blank one, and answers the draft that is asked about again."""
    path, middle = tmp_path / "j", a_draft("b")
    with Journal(path, expert="e") as journal:
        journal.add_all([(a_draft("a"), Failure("r"))])
        journal.add_all([(a_draft("c"), Revision((Edit("é", "e"),)))])
        line = line.replace('"x"', json.dumps(journal.request(middle)))
    first, last = path.read_text().splitlines()
    path.write_text("\n".join([first, line, "", last, ""]))
    with caplog.at_level(logging.WARNING), Journal(path, expert="e") as journal:
        assert [journal.is_settled(draft) for draft in (a_draft("a"), middle, a_draft("c"))] == [True, False, True]
        journal.add_all([(middle, Revision(()))])
    assert "j: 1 broken lines, the first of them line 2 (" in caplog.text
    with Journal(path, expert="e") as journal:
        assert journal.answer(middle) == Revision(())


def test_an_answer_for_which_the_disk_has_no_room_leaves_nothing(tmp_path):
    """Half a line is written, then nothing; the next answer finds room again, in the same process."""
    with Journal(tmp_path / "j", expert="e") as journal:
        journal.add_all([(a_draft("a"), Revision(()))])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "j").stat().st_size + 20, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                journal.add_all([(a_draft("b"), Revision(()))])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        journal.add_all([(a_draft("c"), Failure("refused"))])
    with Journal(tmp_path / "j", expert="e") as journal:
        assert [journal.answer(a_draft(key)) is not None for key in "abc"] == [True, False, True]
    assert len((tmp_path / "j").read_text().splitlines()) == 2
