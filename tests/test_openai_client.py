"""What the client sends, and where to: address, headers, proxies and certificates are those of the `openai` package."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from src.chat.client import Call, Client, ServerDown
from src.chat.limits import Limits
from testing.servers.scripted import Http, Scripted, completion, reply

KEY = "sk-very-secret-0123456789"
QUICK = Limits(timeout_s=5, attempts=3, pause_s=0.02, give_up_s=0.2, pause_after=3)
BODY = {"model": "m", "messages": [{"role": "user", "content": "Häuser " * 50_000}]}  # more than one packet
PATH = "/v1/chat/completions"
NOWHERE = "http://127.0.0.1:9"  # a port where nobody listens


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("EXPERT_KEY", KEY)


def asked(base_url: str | None, call: Call | None = None, *, limits: Limits = QUICK) -> str:
    """The text of a reply to one request."""
    client = Client(base_url=base_url, key_env="EXPERT_KEY", model="m", parameters={}, limits=limits)

    async def ask() -> str:
        async with client.session(), client.slot():
            return await client.ask(BODY["messages"], {"prompt_tokens": 10, "completion_tokens": 10}, call or Call())

    return asyncio.run(ask())


def test_a_request_is_that_of_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Address, key, organisation and project come from where the SDK looks for them."""
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-1")
    with Scripted(lambda request: reply("Häuser")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/")
        assert asked(None) == "Häuser"
    (request,) = server.requests
    assert (request.path, request.body) == (PATH, BODY)
    sent = {name: request.headers[name] for name in ("authorization", "openai-organization", "openai-project")}
    assert sent == {"authorization": f"Bearer {KEY}", "openai-organization": "org-1", "openai-project": "project-1"}
    assert request.headers["content-type"] == "application/json"


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_requests_go_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with Scripted(lambda request: reply("through")) as proxy:
        monkeypatch.setenv(name, f"http://user:word@127.0.0.1:{proxy.port}")
        assert asked("http://expert.invalid/v1") == "through"
    (request,) = proxy.requests
    assert request.path == f"http://expert.invalid{PATH}"
    assert request.headers["host"] == "expert.invalid"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["proxy-authorization"] == f"Basic {base64.b64encode(b'user:word').decode()}"


def test_a_proxy_that_refuses_to_go_on_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = b"HTTP/1.1 407 Who are you\r\ncontent-length: 0\r\n\r\n"
    with Scripted(lambda request: answer) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:pass%20word@127.0.0.1:{proxy.port}")
        with pytest.raises(ServerDown, match="407") as error:
            asked("https://expert.invalid/v1")
    request = proxy.requests[0]
    assert (request.path, request.body) == ("expert.invalid:443", {})
    assert request.headers["proxy-authorization"] == f"Basic {base64.b64encode(b'user:pass word').decode()}"
    assert "authorization" not in request.headers  # that is not the proxy's business
    assert not [secret for secret in ("pass", KEY) if secret in str(error.value)]


def test_hosts_without_a_proxy_are_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", NOWHERE)
    with Scripted(lambda request: reply("direct")) as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert asked(server.url) == "direct"
        monkeypatch.delenv("NO_PROXY")
        with pytest.raises(ServerDown, match="HTTP_PROXY is set"):
            asked(server.url)


@pytest.mark.parametrize("proxy", [None, NOWHERE])
def test_a_request_that_reached_nobody_is_not_counted(monkeypatch: pytest.MonkeyPatch, proxy: str | None) -> None:
    if proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
    call = Call()
    with pytest.raises(ServerDown, match="connection"):
        asked(f"{NOWHERE}/v1", call)
    assert (call.attempts, call.usage) == (0, {"requests": 0})


def test_a_redirect_takes_the_body_along_but_not_the_key_to_another_host() -> None:
    with Scripted(lambda request: reply("there")) as other:
        location = {"location": f"{other.url}/chat/completions"}
        with Scripted(lambda request: Http(307, b"", location)) as server:
            assert asked(server.url) == "there"
    assert other.requests[0].body == BODY
    assert "authorization" in server.requests[0].headers
    assert "authorization" not in other.requests[0].headers


def test_a_reply_may_be_compressed() -> None:
    body = gzip.compress(json.dumps(completion("packed")).encode())
    with Scripted(lambda request: Http(200, body, {"content-encoding": "gzip"})) as server:
        assert asked(server.url) == "packed"


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
def test_broken_http_is_a_trouble_that_tells_no_key(answer: bytes) -> None:
    call = Call()
    with Scripted(lambda request: answer) as server, pytest.raises(ServerDown, match="connection") as error:
        asked(server.url, call)
    assert KEY not in str(error.value)
    assert "\n" not in str(error.value)
    assert call.attempts == call.usage["requests"] >= 3  # they may have to be paid


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate")
def test_certificates_are_checked_against_those_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = [str(tmp_path / name) for name in ("cert.pem", "key.pem")]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*made, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*files)
    with Scripted(lambda request: reply("safe"), tls=context) as server:
        assert server.url.startswith("https://")
        with pytest.raises(ServerDown, match="certificate"):
            asked(server.url)
        monkeypatch.setenv("SSL_CERT_FILE", files[0])
        assert asked(server.url) == "safe"
    assert len(server.requests) == 1
