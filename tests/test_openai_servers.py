"""The expert against servers that we did not write, `transformers serve` and llmock: the extra `experts-test`."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace

import pytest
from PIL import Image

from src.chat.limits import Limits
from src.experts.openai import OpenAIExpert
from src.text.align import locate
from src.text.tokenizer import Codec
from src.types import Draft, Failure, Revision
from testing.servers.real import (
    free_port,
    llmock,
    missing,
    tell,
    tiny_vision_model,
    transformers_serve,
)

TEXT = "A small red ring is in the upper left. A large blue square is in the upper right. Picture {number}."
LIMITS = Limits(concurrency=16, timeout_s=3, attempts=8, pause_after=6, pause_s=0.2, give_up_s=60)
GOOD = '{"right": false, "edits": [{"org": "red", "target": "blue", "reason": "because"}]}'

pytestmark = pytest.mark.servers
needs_llmock = pytest.mark.skipif(bool(why := missing("llmock")), reason=why)
needs_transformers = pytest.mark.skipif(bool(why := missing("fastapi", "uvicorn")), reason=why)


@pytest.fixture(scope="module")
def codec() -> Codec:
    words = "A Two small red ring is in the upper lower left large blue square green cross . Picture"
    return Codec.train([words, *(TEXT.format(number=n) for n in range(9))] * 9, vocab_size=600, alphabet="bytes")


def expert_of(codec: Codec, url: str, **settings) -> OpenAIExpert:
    given = {"model": "gpt-4o-mini", "key_env": None, "profile": "plain", "limits": LIMITS, **settings}
    return OpenAIExpert(codec=codec, base_url=url, **given)


def drafts_of(codec: Codec, count: int) -> list[Draft]:
    stream = io.BytesIO()
    Image.effect_noise((48, 48), 60).convert("RGB").save(stream, "PNG")
    common = {
        "steps": 8,
        "reference": "A ring.",
        "sampler": {},
        "fingerprint": "f",
        "seed": 0,
        "image": stream.getvalue(),
    }
    texts = [TEXT.format(number=number) for number in range(count)]
    return [
        Draft(key=f"k{n}", prompt="Describe.", text=text, token_ids=codec.encode(text)[0], **common)
        for n, text in enumerate(texts)
    ]


async def collect(expert: OpenAIExpert, drafts: list[Draft]) -> list[tuple[str, Revision | Failure]]:
    return [pair async for pair in expert.revise(drafts)]


def ask(expert: OpenAIExpert, drafts: list[Draft]) -> dict[str, Revision | Failure]:
    """Answers by key, each given once."""
    pairs = asyncio.run(collect(expert, drafts))
    assert sorted(key for key, _ in pairs) == sorted(draft.key for draft in drafts)
    return dict(pairs)


def kinds(answers: dict[str, Revision | Failure]) -> Counter[str]:
    return Counter(a.reason if isinstance(a, Failure) else "revised" for a in answers.values())


def say(text: str, times: int | None = 1) -> dict:
    return {"type": "reply", "text": text, "times": times}


@needs_llmock
def test_llmock_scripted_replies(codec) -> None:
    """Valid, absent, ambiguous, unequal, repaired; malformed, wrong schema, empty, cut off, filtered, refused."""
    absent = GOOD.replace('"red"', '"purple"')
    script = [
        say(GOOD), say('{"right": true, "edits": []}'),
        say(absent), say(GOOD),  # repaired
        say(GOOD.replace('"red"', '"upper"')), say("no"),  # ambiguous, and a useless reply to the repair
        say(GOOD.replace('"blue"', '"big bright blue"')), say(absent),  # unequal, and worse
        say("{'right': True}"), say('{"wrong": 1}'), say("  "), say(GOOD) | {"finish_reason": "length"},
        say("") | {"finish_reason": "content_filter"},
    ]  # fmt: skip
    with llmock() as url:
        tell(url, "scenario", {"behaviors": script})
        expert, drafts, answers = expert_of(codec, url), drafts_of(codec, 10), {}
        for draft in drafts:  # one after the other, as the script goes
            answers |= ask(expert, [draft])
        assert len(tell(url, "requests")["requests"]) == len(script)
    found = []
    for draft in drafts:
        answer = answers[draft.key]
        if isinstance(answer, Failure):
            found.append(answer.reason)
        else:
            aligned = locate(codec, draft.token_ids, answer.edits)
            found.append((len(aligned.spans), dict(aligned.rejected), answer.usage.get("repaired", 0)))
    assert found == [
        (1, {}, 0), (0, {}, 0), (1, {}, 1), (0, {"ambiguous": 1}, 0), (0, {"unequal_length": 1}, 0),
        "malformed", "wrong_schema", "empty", "length", "content_filter",
    ]  # fmt: skip


@needs_llmock
def test_llmock_faults_that_pass(codec) -> None:
    """429 with Retry-After, 500, 503, slow: every draft gets its answer, and no 429 is asked again too early."""
    faults = [
        {"type": "fail", "status": 429, "retry_after": 0.4, "times": 5}, {"type": "fail", "status": 500, "times": 4},
        {"type": "fail", "status": 503, "times": 2}, {"type": "delay", "seconds": 5, "times": 2}, say(GOOD, None),
    ]  # fmt: skip
    with llmock() as url:
        tell(url, "scenario", {"behaviors": faults})
        expert = expert_of(codec, url)
        answers = ask(expert, drafts_of(codec, 40))
        verdict, seen = tell(url, "verdict"), tell(url, "requests")["requests"]
    assert kinds(answers) == {"revised": 40}
    assert expert.client.counts == {"answered": 40, "rate_limited": 5, "server_error": 6, "timeout": 2}
    assert len(seen) == 40 + 5 + 6 + 2
    assert verdict["passed"], verdict
    assert verdict["findings"] == []


@needs_llmock
def test_llmock_dies_in_the_middle_and_comes_back(codec) -> None:
    """Killed with requests under way, back three seconds later: all are answered, none of the others asked again."""
    port = free_port()
    expert = expert_of(codec, f"http://127.0.0.1:{port}/v1", limits=replace(LIMITS, attempts=3))
    drafts = drafts_of(codec, 120)

    async def through_a_death() -> tuple[list, int]:
        pairs = []
        async with AsyncExitStack() as stack:
            first = ExitStack()
            url = first.enter_context(llmock("--latency-ms", "50", port=port))
            tell(url, "scenario", {"behaviors": [say(GOOD, None)]})
            async for pair in expert.revise(drafts):
                pairs.append(pair)
                if len(pairs) == 40:
                    first.close()
                    await asyncio.sleep(3)
                    stack.enter_context(llmock("--latency-ms", "50", port=port))
                    tell(url, "scenario", {"behaviors": [say(GOOD, None)]})
            return pairs, len(tell(url, "requests")["requests"])

    pairs, again = asyncio.run(through_a_death())
    assert sorted(key for key, _ in pairs) == sorted(draft.key for draft in drafts)
    assert kinds(dict(pairs)) == {"revised": 120}
    assert again <= 120 - 40 + 5  # a few replies may arrive while the test script is about to end the server


@pytest.fixture(scope="module")
def served_model(tmp_path_factory):
    """(address, name) of a tiny random vision model behind `transformers serve`."""
    folder = tmp_path_factory.mktemp("served")
    model = tiny_vision_model(folder / "model")
    with transformers_serve(folder / "log") as url:
        yield url, str(model)


@needs_transformers
def test_transformers_gibberish_is_counted(codec, served_model) -> None:
    """A real vision model with random weights: each answer is a failure with a name, or edits that say their reason."""
    url, model = served_model
    limits = replace(LIMITS, concurrency=2, timeout_s=60)
    expert = expert_of(codec, url, model=model, max_completion_tokens=30, temperature=1.0, limits=limits)
    answers = ask(expert, drafts_of(codec, 6))
    assert expert.client.counts == {"answered": 6}
    assert set(kinds(answers)) <= {"revised", "length", "malformed", "wrong_schema", "empty", "contradiction"}
    assert expert.client.budget.spent["tokens"] > 6 * 300  # it has counted the prompts
