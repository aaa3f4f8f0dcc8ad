"""A round with a deadline: what the expert has not answered by then is asked about in the next round."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from src.chat.client import ChatError
from src.chat.journal import Journal
from src.chat.limits import Limits
from src.cli.signals import Stop, Stopped
from src.experts.openai import OpenAIExpert
from src.experts.scenes import ScenesExpert
from src.io.shards import read_shard
from src.rounds.drafts import read_drafts
from src.rounds.expert_thread import ExpertThread
from src.types import Expert, Revision
from testing.child import in_child
from testing.files import read_jsonl
from testing.servers.scripted import Http, Request, Scripted, error, reply
from tests.test_rounds import NUM, Case, Diligent, kill_at_rename


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


class Slow(Diligent):
    """Answers the drafts of some keys, and the others never, until it is told to."""

    def __init__(self, log: Path, *, answered: set[str] | None = None) -> None:
        super().__init__(log)
        self.answered = answered

    async def revise(self, drafts):
        for draft in drafts:
            if self.answered is not None and draft.key[:3] not in self.answered:
                await asyncio.sleep(600)
            async for answer in super().revise([draft]):
                yield answer


FIRST = {"s00", "s01", "s04", "s05", "s08"}  # the first drafts of each chunk, so that they wait for no other


def short(case: Case, folder: Path, expert, **changed) -> dict:
    """The manifest of a round that ends early."""
    return case.run(folder / "round-0001", expert, deadline=0.5, **changed).manifest


def following(case: Case, folder: Path, expert) -> dict:
    """The manifest of the round after it, which drafts for other samples."""
    batches = [replace(batch, keys=[f"t{key[1:]}" for key in batch.keys]) for batch in case.batches()]
    changed = {"batches": batches, "settings": {**case.settings, "round": 2}, "late": folder / "round-0001"}
    return case.run(folder / "round-0002", expert, **changed).manifest


def samples(folder: Path) -> list[dict]:
    return [sample["json"] for path in sorted(folder.glob("round-*.tar")) for sample in read_shard(path)]


def requested(log: Path) -> list[str]:
    return log.read_text().split()


def test_a_round_ends_at_its_deadline_and_the_next_one_asks_for_the_rest(case, tmp_path):
    first = short(case, tmp_path, Slow(tmp_path / "asked-1", answered=FIRST))
    answered = requested(tmp_path / "asked-1")
    missing = NUM - len(answered)
    assert 0 < missing < NUM
    assert first["counts"]["unanswered"] == missing == first["again"]["unanswered"]
    assert first["counts"]["drafted"] == NUM

    second = following(case, tmp_path, Slow(tmp_path / "asked-2"))
    assert second["counts"]["late"] == missing
    assert second["counts"]["drafted"] == second["counts"]["revised"] - missing == NUM
    assert second["counts"]["right"] + second["counts"]["written"] == NUM + missing
    again = requested(tmp_path / "asked-2")
    assert len(again) == len({*again}) == NUM + missing
    assert not {*again} & {*answered}

    late = [sample for sample in samples(tmp_path / "round-0002") if sample["key"].endswith("-late")]
    whole = case.run(tmp_path / "whole", Slow(tmp_path / "asked-3"))
    right = {sample["key"]: sample for sample in samples(whole.path)}
    assert len(late) == len(right) - len(samples(tmp_path / "round-0001")) > 0
    for sample in late:
        assert sample == {**right[sample["key"].removesuffix("-late")], "key": sample["key"]}


def test_a_round_that_takes_up_late_drafts_may_be_killed(case, tmp_path):
    """Right before its shards get their names: the journal has all answers, and none is asked for again."""
    for name in ("whole", "killed"):
        short(case, tmp_path / name, Slow(tmp_path / f"{name}-1", answered=FIRST))
    following(case, tmp_path / "whole", Slow(tmp_path / "whole-2"))

    def killed() -> None:
        kill_at_rename(8)  # five chunks of drafts, their settings and index, a shard
        following(case, tmp_path / "killed", Slow(tmp_path / "killed-2"))

    assert in_child(killed) == -signal.SIGKILL
    assert requested(tmp_path / "killed-2") == requested(tmp_path / "whole-2")
    following(case, tmp_path / "killed", Slow(tmp_path / "killed-2"))
    assert requested(tmp_path / "killed-2") == requested(tmp_path / "whole-2")
    assert samples(tmp_path / "killed" / "round-0002") == samples(tmp_path / "whole" / "round-0002")


# --- the OpenAI expert --------------------------------------------------------------------------------------------


def an_expert(case: Case, url: str, **limits) -> OpenAIExpert:
    given = Limits(**{"concurrency": 2, "pause_s": 0.2, **limits})
    return OpenAIExpert(codec=case.codec, model="m", base_url=url, key_env=None, profile="plain", limits=given)


def test_what_is_under_way_at_the_deadline_is_kept_and_nothing_else_is_sent(case, tmp_path):
    """Two at once, half a second each: a few are answered, the rest in the next round; every reply is used."""
    answer = lambda request: reply('{"right": true, "edits": []}', delay=0.5)  # noqa: E731
    with Scripted(answer) as server:
        first = case.run(tmp_path / "round-0001", an_expert(case, server.url), deadline=0.7)
        sent = len(server.requests)
        time.sleep(0.6)
        assert len(server.requests) == sent == first.manifest["counts"]["revised"]
        assert 2 <= sent < NUM
        assert first.manifest["failures"] == {"deadline": NUM - sent} == first.manifest["again"]
        assert first.manifest["usage"]["requests"] == sent
        second = following(case, tmp_path, an_expert(case, server.url, concurrency=64))
        assert len(server.requests) == NUM + NUM == sent + second["usage"]["requests"]
        assert second["counts"]["late"] == NUM - sent


@pytest.mark.parametrize("trouble", ["away", pytest.param("limited", marks=pytest.mark.slow), "slow rate"])
def test_a_deadline_ends_every_kind_of_waiting(case, tmp_path, trouble):
    """For a server that is away, one that refuses all, and a rate of a request in ten minutes."""
    limits = {"give_up_s": 600, "pause_s": 60, "pause_after": 2}
    limits |= {"requests_per_minute": 0.1} if trouble == "slow rate" else {}
    answer = {"away": b"", "limited": error(429, retry_after="50"), "slow rate": reply("right")}[trouble]
    with Scripted(lambda request: answer) as server:
        manifest = case.run(tmp_path / "round-0001", an_expert(case, server.url, **limits), deadline=1.0).manifest
    assert sum(manifest["failures"].values()) + manifest["counts"]["revised"] == NUM
    assert manifest["failures"]["deadline"] >= NUM - 4


# --- the thread ---------------------------------------------------------------------------------------------------


class Bar:
    def update(self, count: int = 1) -> None: ...


def test_many_answers_share_a_sync(case, tmp_path, monkeypatch):
    """Of a disk that takes long: the answers that come meanwhile are written together, and all of them are there."""
    syncs = []

    def slow(handle: int) -> None:
        syncs.append(handle)
        time.sleep(0.2)

    class Quick(Expert):
        name, settings = "quick", {}

        async def revise(self, drafts):
            for draft in drafts:
                await asyncio.sleep(0.005)
                yield draft.key, Revision((), usage={"tokens": 1})

    drafts = [draft for chunk in chunks(case, tmp_path) for draft in chunk]
    monkeypatch.setattr("os.fsync", slow)
    with Journal(tmp_path / "j", expert="e") as journal, ExpertThread(Quick(), journal, Bar(), patience=60) as thread:
        thread.ask(drafts)
    assert 1 < len(syncs) < len(drafts)
    lines = read_jsonl(tmp_path / "j")
    assert sorted(line["key"] for line in lines) == sorted(draft.key for draft in drafts)
    with Journal(tmp_path / "j", expert="e") as journal:
        assert all(journal.is_settled(draft) for draft in drafts)
        assert journal.usage == {"tokens": NUM}


def chunks(case: Case, folder: Path):
    if not (folder / "made").exists():
        case.run(folder / "made", ScenesExpert())
    return read_drafts(folder / "made" / "drafts")


@pytest.mark.parametrize("ending", ["error", "signal"])
def test_what_is_under_way_is_kept_also_while_all_wait(case, tmp_path, ending):
    """All chunks are asked, the first one ends the round, and replies about others take longer."""

    def answer(request: Request) -> Http:
        if ending == "error" and request.number == 0:
            return replace(error(401, "revoked"), delay=0.5)
        return reply("right", delay=2.0)

    def kill_when_all_are_sent() -> None:
        while len(server.requests) < NUM:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with Scripted(answer) as server, Stop() as stop, stop.at_once():
        if ending == "signal":
            threading.Thread(target=kill_when_all_are_sent).start()
        with pytest.raises((ChatError, Stopped)):
            case.run(tmp_path / "round", an_expert(case, server.url, concurrency=64))
    assert len(server.requests) == NUM
    kept = [json.loads(line) for line in next((tmp_path / ".round.partial").glob("journal*")).open()]
    assert len(kept) == NUM - (ending == "error")
    assert all("revision" in line for line in kept)


def test_a_round_taken_up_again_counts_what_it_took(case, tmp_path):
    """Finished, but the checkpoint after it is lost: the same limit then holds for both."""
    with Scripted(lambda request: reply("right")) as server:
        case.run(tmp_path / "round-0001", an_expert(case, server.url))
        expert = an_expert(case, server.url, max_requests=NUM + 3)
        case.run(tmp_path / "round-0001", expert)
        assert following(case, tmp_path, expert)["failures"] == {"budget": NUM - 3}
        assert len(server.requests) == NUM + 3


def test_a_disk_that_is_full_stops_the_questions(case, tmp_path, monkeypatch):
    """At the third sync; what was under way by then is all that was asked beyond."""
    syncs, real = [], os.fsync

    def full(handle: int) -> None:
        syncs.append(handle)
        if len(syncs) > 2:
            raise OSError(28, "No space left on device")
        real(handle)

    drafts = [draft for chunk in chunks(case, tmp_path) for draft in chunk]
    with Scripted(lambda request: reply("right", delay=0.1)) as server:
        monkeypatch.setattr("os.fsync", full)
        with (
            pytest.raises(OSError, match="No space left"),
            Journal(tmp_path / "j", expert="e") as journal,
            ExpertThread(an_expert(case, server.url), journal, Bar(), patience=60) as thread,
        ):
            thread.ask(drafts)
        assert len(server.requests) <= 6 + 2 < NUM


def test_answers_that_nobody_takes_stop_the_questions(case, tmp_path):
    """So that a kill loses few, however slow the disk is: two for each request that may be under way."""

    async def slowly() -> int:
        taken = 0
        async for _ in an_expert(case, server.url, concurrency=2).revise(drafts):
            await asyncio.sleep(0.1)
            taken += 1
            assert len(server.requests) <= taken + 4
        return taken

    drafts = [draft for chunk in chunks(case, tmp_path) for draft in chunk]
    with Scripted(lambda request: reply("right")) as server:
        assert asyncio.run(slowly()) == NUM
