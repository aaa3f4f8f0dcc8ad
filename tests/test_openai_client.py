"""The client alone: what it sends, what a broken connection costs, and that no secret is shown."""

from __future__ import annotations

import asyncio
import base64

import pytest

from src.chat.client import Call, Client, ServerDown
from src.chat.limits import Limits
from testing.servers.scripted import Scripted, reply

KEY = "sk-very-secret-0123456789"
QUICK = Limits(timeout_s=5, attempts=3, pause_s=0.02, give_up_s=0.2, pause_after=3)
MESSAGES = [{"role": "user", "content": "Häuser " * 50_000}]  # more than one packet
NOWHERE = "http://127.0.0.1:9"  # a port where nobody listens


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("EXPERT_KEY", KEY)


def ask(base_url: str | None, call: Call | None = None) -> str:
    """The text of a reply to one request."""
    client = Client(base_url=base_url, key_env="EXPERT_KEY", model="m", parameters={"top_k": 3}, limits=QUICK)

    async def run() -> str:
        async with client.session(), client.slot():
            return await client.ask(MESSAGES, {"prompt_tokens": 10, "completion_tokens": 10}, call or Call())

    return asyncio.run(run())


def test_a_request_and_its_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `base_url` the address comes from where the SDK looks for it."""
    call = Call()
    with Scripted(lambda request: reply("Häuser", tokens=(700, 12))) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/")
        assert ask(None, call) == "Häuser"
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.body == {"model": "m", "messages": MESSAGES, "top_k": 3}
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert (call.replies, call.model, call.usage["requests"]) == (["Häuser"], "served", 1)
    assert call.usage.pop("seconds") > 0
    assert call.usage == {"requests": 1, "prompt_tokens": 700, "completion_tokens": 12}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_proxy_is_used_and_its_password_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with Scripted(lambda request: reply("through")) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://user:word@127.0.0.1:{proxy.port}")
        assert ask("http://expert.invalid/v1") == "through"
    assert proxy.requests[0].headers["proxy-authorization"] == f"Basic {base64.b64encode(b'user:word').decode()}"
    with Scripted(lambda request: b"HTTP/1.1 407 Who are you\r\ncontent-length: 0\r\n\r\n") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:pass%20word@127.0.0.1:{proxy.port}")
        with pytest.raises(ServerDown, match=r"HTTPS_PROXY is set.*407") as error:
            ask("https://expert.invalid/v1")
    assert "authorization" not in proxy.requests[0].headers  # that is not the proxy's business
    assert not [secret for secret in ("pass", KEY) if secret in str(error.value)]


@pytest.mark.parametrize("proxy", [None, NOWHERE])
def test_a_request_that_reached_nobody_is_not_counted(monkeypatch: pytest.MonkeyPatch, proxy: str | None) -> None:
    if proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
    call = Call()
    with pytest.raises(ServerDown, match="connection"):
        ask(f"{NOWHERE}/v1", call)
    assert call.usage["requests"] == call.usage.total() == 0


@pytest.mark.parametrize(
    "answer",
    [
        f"{KEY}\r\n\r\n".encode(),
        f"HTTP/1.1 {KEY} X\r\n\r\n".encode(),
        b"HTTP/1.1 200 X\r\ncontent-length: 1000\r\n\r\n{",
        b"HTTP/1.1 200 X\r\ncontent-length: 5\r\ncontent-length: 7\r\n\r\n{",
        b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 X\r\ncontent-encoding: gzip\r\ncontent-length: 5\r\n\r\nabcde",
        f"HTTP/1.1 307 X\r\nlocation: /v1/{KEY}\r\ncontent-length: 0\r\n\r\n".encode(),
        f"HTTP/1.1 307 X\r\nlocation: ftp://{KEY}/\r\ncontent-length: 0\r\n\r\n".encode(),
        b"",
    ],
)
def test_broken_http_may_have_been_billed_and_tells_no_key(answer: bytes) -> None:
    call = Call()
    with Scripted(lambda request: answer) as server, pytest.raises(ServerDown, match="connection") as error:
        ask(server.url, call)
    assert KEY not in str(error.value)
    assert "\n" not in str(error.value)
    assert call.usage["requests"] >= 3
    assert call.usage["lost_prompt_tokens"] == 10 * call.usage["requests"]
