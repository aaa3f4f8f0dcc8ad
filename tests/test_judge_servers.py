"""Judges against servers that we did not write: llmock and `transformers serve`, as in tests/test_openai_servers.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from src.chat.limits import Limits
from src.judges.ask import JudgeModel
from src.judges.base import Item
from src.judges.caparena import CapArena
from src.judges.clair import Clair
from src.judges.reader import Conversation
from src.judges.store import ReplyStore
from testing.servers.real import llmock, missing, tell, tiny_vision_model, transformers_serve

LIMITS = Limits(concurrency=1, timeout_s=60, attempts=8, give_up_s=60)
pytestmark = pytest.mark.servers


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    Image.effect_noise((48, 48), 60).convert("RGB").save(tmp_path / "a.png")
    extra = {"rival": "A dog.", "baseline": 0}
    common = {"image": tmp_path / "a.png", "references": ("A ring.",), "extra": extra}
    return [Item(key=str(n), row=n, caption=f"A ring, number {n}.", **common) for n in range(3)]


def judge_of(url: str, **settings) -> JudgeModel:
    return JudgeModel(base_url=url, key_env=None, profile="plain", limits=LIMITS, **settings)


@pytest.mark.skipif(bool(why := missing("llmock")), reason=why)
def test_llmock_replies_become_verdicts(items, tmp_path):
    """A good reply; a refusal for a moment, then an ambiguous reply and a good one; nothing that can be read."""
    say = lambda text: {"type": "reply", "text": text, "times": 1}  # noqa: E731
    script = [
        say('{"score": 85, "reason": "r"}'), {"type": "fail", "status": 429, "retry_after": 0.2, "times": 1},
        say('{"score": 0.4}'), say("Score: 40/100"), say("no"), say(""), say("none"),
    ]  # fmt: skip
    conversations = [Conversation(Clair(), item) for item in items]
    with llmock() as url:
        tell(url, "scenario", {"behaviors": script})
        judge = judge_of(url, model="gpt-4o-mini")
        with ReplyStore(tmp_path / "replies.jsonl") as store:
            assert judge.ask(conversations, store) == {}
            requests = len(tell(url, "requests")["requests"])
            assert judge.ask(conversations, store) == {}  # nothing is left to ask
        assert requests == len(tell(url, "requests")["requests"]) >= len(script)
    verdicts = [judge.replay(one, ReplyStore(tmp_path / "replies.jsonl")).verdict for one in conversations]
    scores = [(v["score"], v["failed"]) for v in verdicts if v]
    assert scores == [(0.85, 0), (0.4, 0), (0, 1)]


@pytest.mark.skipif(bool(why := missing("fastapi", "uvicorn", "accelerate")), reason=why)
def test_a_real_vision_model_is_asked_about_images_and_its_gibberish_fails(items, tmp_path):
    """Random weights behind `transformers serve`: both orders three times each, then the battle has failed."""
    model = tiny_vision_model(tmp_path / "model")
    with transformers_serve(tmp_path / "log") as url, ReplyStore(tmp_path / "replies.jsonl") as store:
        judge = judge_of(url, model=str(model), max_tokens=16)
        conversation = Conversation(CapArena(), items[0])
        assert judge.ask([conversation], store) == {}
        replay = judge.replay(conversation, store)
    assert replay.verdict is not None
    assert (replay.verdict["as_first"], replay.verdict["as_second"], replay.verdict["orders"]) == (None, None, 2)
    assert len(replay.replies) == 6
    assert all(entry["usage"]["prompt_tokens"] > 100 for entry in replay.replies)
