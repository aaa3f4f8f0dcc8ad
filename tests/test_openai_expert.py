"""The expert behind a server, against one that answers as the test says: replies, faults, repair, limits, rounds."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from src.chat.budget import Prices
from src.chat.client import ChatError, ServerDown
from src.chat.limits import Limits
from src.experts.openai import BETWEEN, OpenAIExpert, read_replies
from src.io.settings import describe
from src.text.align import locate
from src.text.tokenizer import Codec
from src.types import Draft, Edit, Failure, Revision
from testing.servers.scripted import Http, Request, Scripted, completion, error, reply

TEXT = "A small red ring is in the upper left. A large blue square is in the upper right. Picture {number}."
KEY = "sk-very-secret-0123456789"
QUICK = Limits(timeout_s=5, attempts=3, pause_s=0.05, give_up_s=0.6, pause_after=5)
RIGHT = '{"right": true, "edits": []}'


def with_edits(*edits: tuple[str, str]) -> str:
    """A reply with these edits."""
    items = [{"org": org, "target": target, "reason": "because"} for org, target in edits]
    return json.dumps({"right": False, "edits": items})


GOOD = with_edits(("red", "blue"))


@pytest.fixture(scope="module")
def codec() -> Codec:
    words = "A Two small red ring is in the upper lower left large blue square green cross . Picture"
    return Codec.train([words, *(TEXT.format(number=n) for n in range(9))] * 9, vocab_size=600, alphabet="bytes")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_KEY", KEY)


def number_of(request: Request) -> int:
    """Of the draft that a request is about."""
    return int(re.findall(r"Picture (\d+)\.", request.text)[-1])


def draft_of(codec: Codec, number: int, **changed) -> Draft:
    text = TEXT.format(number=number)
    ids = [*codec.encode(text)[0], codec.eot_id]
    given = {"reference": "A ring.", "image": b"", **changed}
    return Draft(f"k{number}", "Describe.", text, ids, 8, sampler={}, fingerprint="f", seed=0, **given)


class Run:
    """What became of drafts, and what the server saw."""

    def __init__(self, codec: Codec, script: Callable[[Request], Http | bytes], count: int = 1, **settings) -> None:
        with Scripted(script) as server:
            self.server = server
            common = {"model": "m", "base_url": server.url, "key_env": "EXPERT_KEY", "profile": "plain"}
            self.expert = OpenAIExpert(codec=codec, **{**common, "limits": QUICK, **settings})
            self.drafts = [draft_of(codec, number) for number in range(count)]
            pairs = asyncio.run(collect(self.expert, self.drafts))
        self.requests, self.answers = server.requests, dict(pairs)
        assert sorted(key for key, _ in pairs) == sorted(draft.key for draft in self.drafts)

    @property
    def answer(self) -> Revision | Failure:
        (answer,) = self.answers.values()
        return answer

    @property
    def revision(self) -> Revision:
        assert isinstance(self.answer, Revision)
        return self.answer


async def collect(expert: OpenAIExpert, drafts: list[Draft]) -> list[tuple[str, Revision | Failure]]:
    return [pair async for pair in expert.revise(drafts)]


def test_a_reply_becomes_a_revision(codec) -> None:
    run = Run(
        codec, lambda request: reply(GOOD, tokens=(700, 12)), limits=replace(QUICK, prices=Prices(input=1, output=4))
    )
    revision = run.revision
    assert revision.edits == (Edit("red", "blue", None, "because"),)
    assert (revision.raw, revision.model, revision.attempts) == (GOOD, "served", 1)
    assert revision.usage.pop("seconds") > 0
    assert revision.usage == {
        "requests": 1, "prompt_tokens": 700, "completion_tokens": 12, "cost": pytest.approx(748e-6), "proposed": 1,
    }  # fmt: skip
    assert read_replies(codec, run.drafts[0], revision.raw.split(BETWEEN))[0] == revision.edits


def test_every_draft_is_answered_once_and_with_its_own_answer(codec) -> None:
    """60 drafts, no more than 8 at once, replies out of order, every tenth request refused."""

    def script(request: Request) -> Http:
        if request.number % 10 == 3:
            return error(429, retry_after="0.02")
        edit = {"org": "red", "target": "blue", "reason": str(number_of(request))}
        return reply(json.dumps({"right": False, "edits": [edit]}), delay=0.002 * (request.number % 7))

    run = Run(codec, script, 60, limits=replace(QUICK, concurrency=8))
    for draft in run.drafts:
        answer = run.answers[draft.key]
        assert isinstance(answer, Revision)
        assert [f"k{edit.reason}" for edit in answer.edits] == [draft.key]
    assert 2 <= run.server.most <= 8  # fewer while some are refused
    refused = run.expert.client.counts["rate_limited"]
    assert len(run.requests) == 60 + refused
    assert refused >= 6


# the request


def test_the_key_is_nowhere(codec, caplog, monkeypatch, tmp_path) -> None:
    """Not in settings, attributes, answers, errors or logs, even if the server repeats it."""
    caplog.set_level(logging.DEBUG)
    run = Run(codec, lambda request: error(400, f"bad {KEY}") if request.number else reply(RIGHT), 3)
    kept = [
        *map(repr, run.answers.values()),
        json.dumps(describe(run.expert)),
        json.dumps(run.expert.client.counts),
    ]
    kept.append(repr(vars(run.expert)) + repr(vars(run.expert.client)))
    with pytest.raises(ChatError) as fatal:
        Run(codec, lambda request: error(401, f"Incorrect API key: {KEY}"))
    kept += [str(fatal.value), repr(fatal.value.__cause__), caplog.text]
    assert not [text for text in kept if KEY in text]
    assert "EXPERT_KEY" in str(fatal.value)


# settings

SAME = {"base_url": "http://elsewhere/v1", "max_completion_tokens": 77, "limits": Limits(concurrency=1, max_requests=5)}
OTHER = {
    "model": "n", "image_side": 77, "detail": "low", "temperature": 0.3, "seed": 3, "extra": {"top_k": 1}, "repair": 0,
    "profile": "plain",
}  # fmt: skip


def test_answers_are_kept_when_a_limit_changes_and_not_when_the_question_does(codec) -> None:
    def settings(**changed) -> str:
        given = {"model": "m", "key_env": None, "profile": "chat", **changed}
        return json.dumps(describe(OpenAIExpert(codec=codec, **given)), sort_keys=True)

    first = settings()
    assert {name: settings(**{name: value}) for name, value in SAME.items()} == dict.fromkeys(SAME, first)
    others = [settings(**{name: value}) for name, value in OTHER.items()]
    assert len({first, *others}) == 1 + len(OTHER)


# replies that are none


def why(answer: Failure) -> Failure:
    """A failure without what was paid for it."""
    return Failure(answer.reason, answer.retry)


@pytest.mark.parametrize(
    ("answer", "failure", "requests"),
    [
        (reply(None), Failure("empty", retry=True), 1),
        (reply("no JSON"), Failure("malformed", retry=True), 1),
        (reply('{"answer": 1}'), Failure("wrong_schema", retry=True), 1),
        (reply('{"right": false, "edits": []}'), Failure("contradiction", retry=True), 1),
        (reply(GOOD, finish="length"), Failure("length", retry=True), 1),
        (reply("", finish="content_filter"), Failure("content_filter"), 1),
        (reply(None, refusal="I cannot help"), Failure("refusal"), 1),
        (Http(200, b'{"choices": []}'), Failure("no_choices", retry=True), 3),
        (Http(200, b'{"error": {"message": "upstream"}}'), Failure("server_error", retry=True), 3),
        (Http(200, b'{"choices": [{"mess'), Failure("malformed_body", retry=True), 3),
        (Http(200, b"[" * 100_000), Failure("malformed_body", retry=True), 3),
        (
            Http(200, b'{"choices": [{"message": {"content": 3}}], "usage": "x"}'),
            Failure("malformed_body", retry=True),
            3,
        ),
        (error(500), Failure("server_error", retry=True), 3),
        (error(400, "your image is odd"), Failure("bad_request", retry=True), 1),
        (error(400, "flagged by the content policy", code="content_policy_violation"), Failure("content_filter"), 1),
        (error(400, "maximum context length is 4096 tokens"), Failure("too_long"), 1),
        (b"", Failure("connection", retry=True), 3),
        (reply(GOOD).encoded()[:-20], Failure("connection", retry=True), 3),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", Failure("connection", retry=True), 3),
    ],
    ids=lambda value: str(value)[:40],
)
def test_faults_are_counted_under_their_names(codec, answer, failure, requests) -> None:
    run = Run(codec, lambda request: answer)
    assert why(run.answer) == failure
    assert run.answer.attempts == len(run.requests) == requests
    if failure.reason in ("length", "malformed", "wrong_schema", "contradiction"):  # paid for, so it is kept
        assert run.answer.raw
        assert run.answer.usage["completion_tokens"] > 0


@pytest.mark.parametrize(
    "fault", [error(500), error(503, retry_after="0.01"), b"", Http(200, b"{"), error(429)], ids=str
)
def test_a_fault_that_passes_is_not_seen(codec, fault) -> None:
    run = Run(codec, lambda request: fault if request.number < 2 else reply(GOOD))
    assert (run.revision.attempts, run.revision.usage["requests"], len(run.requests)) == (3, 3, 3)


def test_a_slow_reply_is_a_timeout(codec) -> None:
    limits = replace(QUICK, timeout_s=0.1, attempts=2)
    run = Run(codec, lambda request: reply(GOOD, delay=5), limits=limits)
    assert why(run.answer) == Failure("timeout", retry=True)


def test_a_list_of_parts_and_a_server_that_counts_no_tokens(codec) -> None:
    body = completion([{"type": "text", "text": GOOD[:20]}, {"type": "text", "text": GOOD[20:]}])
    del body["usage"]
    revision = Run(codec, lambda request: Http(200, json.dumps(body).encode())).revision
    assert len(revision.edits) == 1
    assert 500 < revision.usage["prompt_tokens"] < 2000
    assert 0 < revision.usage["completion_tokens"] < 200


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (error(401, "nope"), "the key in EXPERT_KEY is refused by http://127.0.0.1:.*401.*nope"),
        (error(403, "nope"), "the key in EXPERT_KEY is refused"),
        (error(404, "nope"), "there is no model m, or no such address: http://127"),
        (error(402, "nope"), "the account is empty"),
        (error(429, "nope", code="insufficient_quota"), "the account is empty"),
        (error(422, "unknown field seed"), "every request is rejected .*unknown field seed.*see `profile`"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_no_request_can_mend_stops_at_once(codec, answer, message) -> None:
    seen: list[int] = []

    def script(request: Request) -> Http:
        seen.append(request.number)
        return answer

    with pytest.raises(ChatError, match=message):
        Run(codec, script, 200, limits=replace(QUICK, concurrency=2))
    assert len(seen) <= (4 if "rejected" in message else 2)  # those in flight


# repair


def test_unusable_edits_are_sent_back_once_with_the_reason(codec) -> None:
    first = with_edits(("red", "green"), ("purple", "blue"), ("upper", "lower"), ("square", "big green square"))
    second = with_edits(
        ("upper left", "lower left"), ("blue square", "blue ring"), ("large", "small"), ("Picture", "square")
    )
    run = Run(codec, lambda request: reply(second if request.number else first, tokens=(100, 10)))
    revision, draft = run.revision, run.drafts[0]
    assert [(e.org, e.target) for e in revision.edits] == [
        ("red", "green"), ("upper left", "lower left"), ("blue square", "blue ring"), ("large", "small"),
    ]  # fmt: skip
    assert not locate(codec, draft.token_ids, revision.edits).rejected
    counts = {name: revision.usage[name] for name in ("proposed", "returned", "repaired", "requests", "prompt_tokens")}
    assert counts == {"proposed": 4, "returned": 3, "repaired": 3, "requests": 2, "prompt_tokens": 200}
    assert revision.attempts == 2
    problems = run.requests[1].body["messages"]
    assert problems[:2] == run.requests[0].body["messages"]
    assert problems[2] == {"role": "assistant", "content": first}
    for line in (
        "1. `purple` .*not in the draft",
        "2. `upper` .*more than once",
        r"3. `square` .*1 tokens long, `target` \d",
    ):
        assert re.search(line, problems[3]["content"])
    assert read_replies(codec, draft, revision.raw.split(BETWEEN))[0] == revision.edits


@pytest.mark.parametrize(
    "second", [reply("I give up"), reply(RIGHT), reply(with_edits(("purple", "blue"))), error(400), error(401)], ids=str
)
def test_what_stays_unusable_stays_to_be_counted(codec, second) -> None:
    first = with_edits(("red", "blue"), ("purple", "blue"))
    run = Run(codec, lambda request: second if request.number else reply(first))
    revision = run.revision
    assert [e.org for e in revision.edits] == ["red", "purple"]
    assert revision.usage.get("repaired", 0) == 0
    assert locate(codec, run.drafts[0].token_ids, revision.edits).rejected == Counter(absent=1)


# limits


def test_a_budget_of_money_is_used_up_and_not_passed(codec) -> None:
    """What is put aside for the longest reply comes back: far more drafts are answered than at the greatest price."""
    prices = Prices(input=1, output=1)
    limits = replace(QUICK, max_cost=0.01, prices=prices, concurrency=4)  # 10000 tokens
    run = Run(codec, lambda request: reply(GOOD, tokens=(400, 100)), 40, limits=limits, max_completion_tokens=2500)
    revised = sum(isinstance(a, Revision) for a in run.answers.values())
    assert run.expert.client.budget.spent["cost"] == pytest.approx(revised * 500e-6)
    assert 10_000 - 4000 < revised * 500 <= 10_000
    run.expert.charge({"cost": 1.0, "prompt_tokens": 1_000_000})
    assert run.expert.client.budget.spent["cost"] > 1


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_kept_to(codec, status: int) -> None:
    """By the draft that got it; after a 429 by all others too."""
    limits = replace(QUICK, concurrency=2)
    fault = error(status, retry_after="1.5")
    run = Run(codec, lambda request: reply(GOOD, delay=0.05) if request.number else fault, 6, limits=limits)
    refused, *others = run.requests
    again = [request.at - refused.at for request in others if number_of(request) == number_of(refused)]
    assert len(again) == 1
    assert again[0] >= 1.5
    early = [request for request in others if request.at - refused.at < 1.5]
    assert len(early) == (1 if status == 429 else 5)  # the one that was in flight


def test_a_server_that_goes_away_and_comes_back_loses_nothing(codec) -> None:
    served: Counter[int] = Counter()

    def script(request: Request) -> Http:
        served[number_of(request)] += 1
        return reply(GOOD)

    with Scripted(script) as server:
        port, url = server.port, server.url
    limits = replace(QUICK, concurrency=4, attempts=2, pause_s=0.01, give_up_s=30)
    expert = OpenAIExpert(codec=codec, model="m", base_url=url, key_env=None, limits=limits)

    async def interrupted() -> list:
        answers = []
        with Scripted(script, port=port):
            async for pair in expert.revise([draft_of(codec, n) for n in range(40)]):
                answers.append(pair)
                if len(answers) == 10:
                    break
        return answers

    first = asyncio.run(interrupted())
    keys = {key for key, _ in first}
    rest = [draft_of(codec, n) for n in range(40) if f"k{n}" not in keys]

    async def start_late() -> list:
        waiting = asyncio.create_task(collect(expert, rest))
        while expert.client.counts.get("connection", 0) < 40:  # more than all attempts
            await asyncio.sleep(0.01)
        with Scripted(script, port=port):
            return await waiting

    second = asyncio.run(start_late())
    assert sorted(key for key, _ in [*first, *second]) == sorted(f"k{n}" for n in range(40))
    assert all(isinstance(answer, Revision) for _, answer in [*first, *second])


def test_a_draft_waits_no_longer_than_its_deadline(codec) -> None:
    """The server answers others, but never this draft."""

    def script(request: Request) -> Http:
        return error(429, retry_after="0.1") if number_of(request) == 1 else reply(GOOD, delay=0.05)

    run = Run(codec, script, 12, limits=replace(QUICK, concurrency=2, deadline_s=0.4))
    assert why(run.answers["k1"]) == Failure("rate_limited", retry=True)
    assert sum(isinstance(answer, Revision) for answer in run.answers.values()) == 11


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (error(429, retry_after="0.05"), r"has not answered for \d+ s: rate_limited, http.*429"),
        (error(429, retry_after="7200"), "asks to wait 7200 s, longer than limits.deadline_s=900"),
        (error(503), r"has not answered for \d+ s: server_error, http.*503"),
        (b"", r"has not answered for \d+ s: connection, http"),
    ],
    ids=str,
)
def test_a_server_that_refuses_or_stays_away_is_an_error_that_says_so(codec, answer, message: str) -> None:
    with pytest.raises(ServerDown, match=message):
        Run(codec, lambda request: answer, 20, limits=replace(QUICK, give_up_s=0.5))


# in a round


def test_chunks_share_the_limits_and_the_expert_serves_several_rounds(codec) -> None:
    with Scripted(lambda request: reply(GOOD, delay=0.01)) as server:
        limits = replace(QUICK, concurrency=5)
        expert = OpenAIExpert(codec=codec, model="m", base_url=server.url, key_env=None, limits=limits)

        async def chunks() -> list:
            parts = [[draft_of(codec, n) for n in range(start, start + 10)] for start in range(0, 40, 10)]
            answers = await asyncio.gather(*(collect(expert, part) for part in parts))
            return [pair for part in answers for pair in part]

        for _ in range(2):  # each has an event loop of its own
            assert all(isinstance(answer, Revision) for _, answer in asyncio.run(chunks()))
    assert 2 <= server.most <= 5
    assert len(server.requests) == 80
