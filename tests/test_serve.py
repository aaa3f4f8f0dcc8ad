"""The server, asked by the `openai` package over loopback, and by raw HTTP for what that package never sends."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

import src.draft
import src.revise
import src.serve
from src.generation.captioner import Captioner
from src.io.shards import read_manifest
from src.preparation.scenes import Scenes
from src.serving.app import Limits, Service, build_app
from src.serving.engine import Engine, Job
from src.serving.protocol import read_chat

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets" / "base"
PROMPT = "Describe the picture."
LIMITS = Limits(body_bytes=400_000, image_pixels=10_000, prompt_tokens=2000, steps=10_000)
LONG = {"sampler": "flow", "steps": 10_000, "temperature": 1.0}  # a request that takes a minute, unless it is cancelled


@dataclass
class Server:
    service: Service
    engine: Engine
    captioner: Captioner
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="any", max_retries=0)

    def ask(self, image: bytes | None = None, prompt: str = PROMPT, **fields: Any) -> Any:
        return self.client.chat.completions.create(**request(image, prompt, **fields))

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict, dict[str, str]]:
        """Status, JSON and headers of the answer to raw HTTP."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        connection.putrequest(method, path, skip_host="host" in headers)
        headers = {"content_type": "application/json", "content_length": str(len(body)), **headers}
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content or b"{}"), {name.lower(): value for name, value in answer.getheaders()}


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (40, 56)) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def request(image: bytes | None, prompt: str = PROMPT, *, url: str = "", **fields: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    if image is not None or url:
        content.append({"type": "image_url", "image_url": {"url": url or data_url(image or b"")}})
    ours = {
        name: fields.pop(name) for name in ("sampler", "steps", "tokens_per_step", "trace", "fruit") if name in fields
    }
    return {"model": "base", "messages": [{"role": "user", "content": content}], "extra_body": ours, **fields}


@contextmanager
def running(service: Service, **options: Any) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    app = build_app(service, **{"key": None, "hosts": [], **options})
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", lifespan="off", http="h11"))
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    captioner = Captioner.load(BASE, device="cpu")
    settings = {"tokens_per_step": 8}
    with Engine(captioner, batch_size=16, max_waiting=64) as engine:
        service = Service(captioner, engine, name="base", limits=LIMITS, sampler="refine", settings=settings)
        with running(service) as url:
            yield Server(service, engine, captioner, url)


def test_an_answer_is_that_of_the_python_api(server):
    assert [model.id for model in server.client.models.list()] == ["base"]
    image = picture(0)
    reply = server.ask(image, seed=5, temperature=1.0, steps=4, n=1, user="me")
    (caption,) = server.captioner.caption(image, seed=5, temperature=1.0, steps=4)
    assert reply.choices[0].message.content == caption.text
    usage = reply.usage.model_dump()
    assert (usage["forward_calls"], usage["edits"]) == (caption.forward_calls, caption.edits)
    assert usage["completion_tokens"] == len(caption.ids)
    ids = server.captioner.codec.prompt_ids(PROMPT)
    assert usage["prompt_tokens"] == len(ids) - 1 + 9  # 48 pixels in patches of 16
    other = server.ask(image, seed=6, temperature=1.0, steps=4)
    assert other.choices[0].message.content != caption.text


def test_a_limit_of_tokens_cuts_the_text(server):
    whole = server.ask(picture(1))
    cut = server.ask(picture(1), max_completion_tokens=5)
    assert (whole.choices[0].finish_reason, cut.choices[0].finish_reason) == ("stop", "length")
    assert cut.usage.completion_tokens == 5
    assert 0 < len(cut.choices[0].message.content) < len(whole.choices[0].message.content)
    assert whole.choices[0].message.content.startswith(cut.choices[0].message.content)
    stream = server.ask(picture(1), max_completion_tokens=5, stream=True, sampler="plain", tokens_per_step=2)
    assert server.captioner.codec.encode("".join(c.choices[0].delta.content or "" for c in stream))[0][5:] == []


def test_earlier_turns_and_a_system_text_are_part_of_the_prompt(server):
    def ask(*texts: str) -> int:
        roles = {"S": "system", "U": "user", "A": "assistant"}
        messages: Any = [{"role": roles[text[0]], "content": text[1:]} for text in texts]
        return server.client.chat.completions.create(model="base", messages=messages).usage.prompt_tokens

    codec = server.captioner.codec
    assert ask("UWhy?") == len(codec.prompt_ids("Why?", images=0))
    assert ask("SBe brief.", "UWhy?") == len(codec.with_format(system="Be brief.").prompt_ids("Why?", images=0))
    expected = codec.prompt_ids("A ring?", images=0, turns=[("Why?", "Red.")])
    assert ask("UWhy?", "ARed.", "UA ring?") == len(expected)


@pytest.mark.parametrize(("sampler", "is_gradual"), [("plain", True), ("refine", False)])
def test_a_stream_sends_what_no_later_step_changes(server, sampler, is_gradual):
    """The texts joined are the answer; with a reviser every token may still change until the end."""
    fields = {"sampler": sampler, "tokens_per_step": 2, "seed": 1}
    whole = server.ask(picture(2), **fields)
    chunks = list(server.ask(picture(2), stream=True, stream_options={"include_usage": True}, **fields))
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(texts) == whole.choices[0].message.content
    assert (len(texts) > 1) == is_gradual
    assert [c.choices[0].finish_reason for c in chunks[-2:-1]] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_a_trace_has_every_step(server):
    chunks = list(server.ask(picture(3), stream=True, trace=True, tokens_per_step=8))
    traced = [c.model_extra["trace"] for c in chunks if "trace" in c.model_extra]
    states = list(server.captioner.stream(picture(3), tokens_per_step=8))
    assert [step["text"] for step in traced] == [state.text for state in states[:-1]]
    assert [step["forwards"] for step in traced] == [state.forward_calls for state in states[:-1]]
    assert sum(len(step["rewritten"]) for step in traced) == states[-1].caption.edits > 0
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == states[-1].text


def test_many_at_once_are_answered_together_and_as_one_by_one(server):
    batches, answered = server.engine.counts["batches"], server.engine.counts["answered"]
    ways = [{"tokens_per_step": 16}, {"tokens_per_step": 32, "temperature": 1.0}]
    asked = [(picture(n) if n % 5 else None, f"Describe {'it ' * (n % 3)}.", n, ways[n % 2]) for n in range(32)]

    async def ask_all() -> list:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="any", max_retries=0) as client:
            create = client.chat.completions.create
            return await asyncio.gather(*(create(**request(i, p, seed=s, **way)) for i, p, s, way in asked))

    replies = asyncio.run(ask_all())
    assert server.engine.counts["answered"] == answered + 32
    assert server.engine.counts["batches"] - batches <= 12
    for reply, (image, prompt, seed, way) in zip(replies, asked, strict=True):
        (alone,) = server.captioner.caption([image], prompt=prompt, seed=seed, **way)
        assert reply.choices[0].message.content == alone.text


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_hangs_up_frees_the_sampler(server):
    answered = server.engine.counts["answered"]
    stream = server.ask(picture(4), stream=True, trace=True, **LONG)
    assert [next(stream).model_extra.get("trace", {}).get("step") for _ in range(3)] == [None, 1, 2]
    stream.close()
    with pytest.raises(openai.APITimeoutError):  # and one that waits for a whole answer
        server.client.with_options(timeout=0.3).chat.completions.create(**request(picture(4), **LONG))
    assert server.ask(picture(5)).choices[0].finish_reason == "stop"
    assert server.engine.counts["answered"] == answered + 1


def test_a_stream_closed_before_its_first_step_is_cancelled(server):
    async def cancelled() -> bool:
        chat = read_chat(json.dumps({"model": "base", "messages": [{"role": "user", "content": "a"}]}).encode())
        sampler = server.service.sampler(None, None, None, None)
        job = Job(sample=server.service._read_sample(chat, sampler)[0], sampler=sampler, seed=0, watched=True)
        stream = server.service._stream(chat, job, {}, 1)
        await anext(stream)
        await stream.aclose()
        return job.cancelled

    assert asyncio.run(cancelled())


def test_a_full_queue_is_429(server, monkeypatch):
    monkeypatch.setattr(server.engine, "max_waiting", 1)
    stream = server.ask(picture(6), stream=True, trace=True, **LONG)
    next(stream), next(stream)  # it is in the sampler
    waiting = Thread(target=server.ask, args=(picture(7),))
    waiting.start()
    wait_for(lambda: server.engine.waiting)
    with pytest.raises(openai.RateLimitError, match="1 requests wait already") as refused:
        server.ask(picture(8))
    assert refused.value.code == "queue_full" and refused.value.response.headers["retry-after"] == "1"
    stream.close()
    waiting.join()


BROKEN = picture(0)[:200] + b"\0" * 50
BAD = {
    "a field": (request(None, fruit="apple"), 400, r'fruit="apple" is not supported'),
    "a misspelt field": (request(None) | {"extra_body": {"step": 3}}, 400, "step=3 is not .* did you mean 'steps'"),
    "a value": (request(None, steps=0), 400, "steps: Input should be greater than or equal to 1"),
    "two speeds": (request(None, steps=4, tokens_per_step=4), 400, "give one of tokens_per_step and steps"),
    "too many steps": (request(None, sampler="flow", steps=10_001), 400, "10,001 steps are more than"),
    "no sampler": (request(None, sampler="fancy"), 400, "no sampler 'fancy'"),
    "a path": (request(None, sampler="../../tests/x.yaml"), 400, "no sampler"),
    "a trace of no stream": (request(None, trace=True), 400, "trace is for streams"),
    "another model": (request(None) | {"model": "gpt-4"}, 404, "no model 'gpt-4' here, but 'base'"),
    "a long prompt": (request(None, "word " * 3000), 400, "more than the 2,000 allowed"),
    "two questions": (request(None) | {"messages": [{"role": "user", "content": "a"}] * 2}, 400, "must take turns"),
    "an answer last": (
        request(None) | {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        400,
        "the last message must be the user's",
    ),
    "an image without its place": (
        request(None)
        | {"messages": [{"role": "user", "content": [{"type": "image_url", "url": data_url(picture(0))}]}]},
        400,
        "messages.0.content.0.image_url.image_url: Field required",
    ),
    "a text without text": (
        request(None) | {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "text: Field required",
    ),
    "a file elsewhere": (request(None, url="http://127.0.0.1:1/a.png"), 400, "must be a data: URL"),
    "a local file": (request(None, url="file:///etc/passwd"), 400, "must be a data: URL"),
    "no base64": (request(None, url="data:image/png;base64,!!!"), 400, "the image is not base64"),
    "no image": (request(b"text"), 400, "the image cannot be read"),
    "half an image": (request(BROKEN), 400, "the image cannot be read"),
    "another format": (request(picture(0, "PPM")), 400, "the image cannot be read"),
    "many pixels": (request(picture(0, "JPEG", (101, 100))), 413, "the image has more than the 10,000 pixels allowed"),
    "a large body": (request(picture(0, "BMP", (400, 400))), 413, "the body has more than the 400,000 bytes allowed"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_answered_says_why(server, name):
    fields, status, message = BAD[name]
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        server.client.chat.completions.create(**fields)
    assert refused.value.status_code == status
    assert refused.value.body["type"] == "invalid_request_error" and refused.value.body["code"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{", {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"[1]", {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b'{"model": "base", "messages": []}', {}, 400, "invalid_value"),
        ("POST", "/v1/chat/completions", b"{}", {"content_type": "text/plain"}, 415, "invalid_content_type"),
        ("GET", "/v1/chat/completions", b"", {}, 405, "method_not_allowed"),
        ("OPTIONS", "/v1/chat/completions", b"", {"origin": "http://evil.example"}, 405, "method_not_allowed"),
        ("GET", "/docs", b"", {}, 404, "not_found"),
        ("GET", "/v1/models", b"", {"host": "evil.example"}, 403, "host_not_allowed"),
        ("GET", "/health", b"", {"host": "127.0.0.1.evil.example:80"}, 403, "host_not_allowed"),
        ("GET", "/v1/models", b"", {"host": ""}, 403, "host_not_allowed"),
        ("GET", "/v1/models", b"", {"host": "LOCALHOST:9"}, 200, None),
        ("GET", "/v1/models", b"", {"host": "[::1]:9", "origin": "http://evil.example"}, 200, None),
    ],
)
def test_raw_http(server, method, path, body, headers, status, code):
    answer, content, got = server.send(method, path, body, **headers)
    assert (answer, content.get("error", {}).get("code")) == (status, code)
    assert not [name for name in got if name.startswith("access-control")]


def test_a_key_is_asked_for(server):
    with running(server.service, key="sk-1", hosts=["gpu17"]) as url:
        keyed = Server(server.service, server.engine, server.captioner, url)
        with pytest.raises(openai.AuthenticationError, match="a wrong key, or none"):
            keyed.ask(picture(0))
        assert keyed.send("GET", "/v1/models")[0] == 401
        assert keyed.send("GET", "/v1/models", authorization="Bearer sk-1", host="gpu17:80")[0] == 200
        assert keyed.send("GET", "/health")[:2] == (200, server.send("GET", "/health")[1])


def test_a_batch_that_fails_is_500_and_the_next_is_answered(server, monkeypatch, caplog):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(server.captioner.backbone, "encode_prefix", fail)
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            server.ask(picture(0))
    assert "out of memory" in caplog.text
    assert server.ask(picture(0)).choices[0].finish_reason == "stop"


def test_a_stop_lets_requests_finish(server):
    with running(server.service) as url:
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
        stream = client.chat.completions.create(**request(picture(0), stream=True, trace=True, tokens_per_step=1))
        first = next(stream)  # leaving the block stops the server
    chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason == "stop" and len(chunks) > 40
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_it_is_an_expert_of_a_round(server, tmp_path, capsys):
    """This small model corrects nothing: each reply is a failure of its draft, and the round is finished."""
    Scenes(out=str(tmp_path / "data"), image_size=48, response_length=64, prompt=PROMPT, num_train=3, num_val=1,
           num_test=1, captions_per_image=1, objects=[1, 2], noise=2.0, per_shard=16, vocab_size=400,
           tokenizer=str(BASE)).run()  # fmt: skip
    src.draft.main(["conf=draft", f"model.path={BASE}", f"data.path={tmp_path}/data", f"out={tmp_path}/drafts",
                    "tokens_per_step=[16]", "data.batch_size=4"])  # fmt: skip
    expert = [f"expert.base_url={server.url}", "expert.key_env=null", "expert.model=base", "expert.profile=plain"]
    answered = server.engine.counts["answered"]
    src.revise.main(["conf=revise,expert/openai", *expert, "expert.limits.attempts=1", f"tokenizer={BASE}",
                     f"drafts={tmp_path}/drafts", f"out={tmp_path}/round"])  # fmt: skip
    manifest = read_manifest(tmp_path / "round")
    assert manifest["counts"]["failed"] == sum(manifest["failures"].values()) == 3
    assert manifest["failures"].keys() <= {"malformed", "wrong_schema", "empty", "length"}
    assert server.engine.counts["answered"] == answered + 3
    assert manifest["usage"]["prompt_tokens"] > 3 * 500


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_examples_of_the_page(server, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").write_bytes(picture(9))
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    page = page.replace("http://127.0.0.1:8000/v1", server.url).replace("stage2/model", "base")
    (command,) = [block for block in re.findall(r"```bash\n(.*?)```", page, re.S) if block.startswith("curl ")]
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    text = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert text == server.captioner.caption("photo.png", tokens_per_step=4, seed=1)[0].text
    exec(compile(code, "docs/serving.md", "exec"), {})
    (caption,) = server.captioner.caption("photo.png", sampler="plain", tokens_per_step=2)
    assert capsys.readouterr().out == f"{caption.text}{caption.forward_calls} forward calls\n"


# the verb


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["host=0.0.0.0"], "host=0.0.0.0 can be reached from other machines, so clients need a key"),
        (["host=gpu17.example"], "can be reached from other machines"),
        (["key_env=NO_SUCH_KEY"], "the environment variable NO_SUCH_KEY holds no key"),
        (["port=BUSY"], "choose another host or port"),
        (["port=99999"], "choose another host or port"),
        (["port=0", "sampler=fancy"], "no configuration 'sampler/fancy'"),
        (["port=0", "max_waiting=0"], "batch_size and max_waiting must be at least 1, got 16 and 0"),
        (["port=0", "steps=4", "sampler=released", "tokens_per_step=4"], "give one of tokens_per_step and steps"),
    ],
)
def test_what_the_verb_refuses(settings, message, capsys):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        argv = [f"model.path={BASE}", *(s.replace("BUSY", str(busy.getsockname()[1])) for s in settings)]
        with pytest.raises(SystemExit) as stop:
            src.serve.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
