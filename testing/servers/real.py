"""Third-party servers as context managers: `transformers serve`, llmock, HAProxy.

    with llmock() as url: ...                            url: up to /v1, for `base_url`
    with transformers_serve(log) as url: ...
    with haproxy(folder, rules, to=url) as url: ...      and `read_log(folder)`: its log of the requests

`pip install -e '.[experts-test]'` installs the first two; HAProxy is a system package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 60


def missing(*modules: str, program: str = "") -> str:
    """What is not installed, as the reason to skip a test; "" if nothing is missing."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if program and not find(program):
        absent.append(program)
    return f"not installed: {', '.join(absent)}" if absent else ""


def find(program: str) -> str | None:
    """Path of a program in this Python environment, else on PATH."""
    path = Path(sys.executable).parent / program
    return str(path) if path.exists() else shutil.which(program)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def llmock(*options: str, port: int = 0) -> Iterator[str]:
    """An llmock server. options: arguments of `llmock serve`"""
    port = port or free_port()
    command = [str(find("llmock")), "serve", "-h", "127.0.0.1", "-p", str(port), "--log-level", "warning", *options]
    with _running(command, f"http://127.0.0.1:{port}/_llmock/scenario"):
        yield f"http://127.0.0.1:{port}/v1"


def tell(url: str, path: str, body: dict[str, Any] | None = None, *, method: str = "") -> Any:
    """Call llmock's control interface. url: as yielded by `llmock`"""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url.removesuffix('/v1')}/_llmock/{path}", data, method=method or None)
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


@contextmanager
def transformers_serve(log: Path, *, port: int = 0) -> Iterator[str]:
    """`transformers serve`, which loads the model folder that a request names."""
    port = port or free_port()
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with _running(command, f"http://127.0.0.1:{port}/health", env=env, log=log):
        yield f"http://127.0.0.1:{port}/v1"


HAPROXY = """global
  tune.bufsize 1048576
defaults
  mode http
  retries 0
  option abortonclose
  option http-buffer-request
  timeout connect 2s
  timeout client 30s
  timeout server 30s
  log stdout format raw local0
  log-format "%HM %[date(0,ms)] %Ta %ST %ts %[var(txn.draft)] %[var(txn.fault)]"
frontend front
  bind 127.0.0.1:{port}
  http-request return status 200 if METH_GET
  http-request set-var(txn.draft) 'req.body,regsub("^.*Picture ([0-9]+)[.].*$","\\1")' if METH_POST
{rules}
  default_backend back
backend back
  server one {server}
"""


@contextmanager
def haproxy(folder: Path, rules: str, *, to: str, port: int = 0) -> Iterator[str]:
    """HAProxy in front of a server. rules: lines of its `frontend` section, which may set `txn.fault` for the log"""
    port, server = port or free_port(), to.removeprefix("http://").removesuffix("/v1")
    config = folder / "haproxy.cfg"
    config.write_text(HAPROXY.format(port=port, rules=rules, server=server))
    command = [str(find("haproxy")), "-f", str(config), "-db"]
    with _running(command, f"http://127.0.0.1:{port}/", log=folder / "haproxy.log"):
        yield f"http://127.0.0.1:{port}/v1"


@dataclass(frozen=True)
class Passed:
    """A finished request in HAProxy's log.

    began: seconds of `time.time`
    draft: number in the last `Picture NUMBER.` of its body
    fault: `txn.fault` as set by a rule
    whole: no fault, and by HAProxy's log the client did not hang up
    """

    began: float
    status: int
    draft: str
    fault: str
    whole: bool


def read_log(folder: Path) -> list[Passed]:
    """The requests in the HAProxy log of a folder, in the order of their ends."""
    requests = []
    for line in (folder / "haproxy.log").read_text(encoding="utf-8").splitlines():
        if line.startswith("POST "):
            _, ended_ms, duration_ms, status, termination, draft, fault = line.split(" ")
            began, fault = int(ended_ms) / 1000 - int(duration_ms) / 1000, fault.strip("-")
            requests.append(Passed(began, int(status), draft, fault, whole=not fault and termination == "--"))
    return requests


@contextmanager
def _running(
    command: Sequence[str], ready: str, *, env: dict[str, str] | None = None, log: Path | None = None
) -> Iterator[None]:
    """Context with a running process, entered once it answers at the address `ready`."""
    with open(log or os.devnull, "a", encoding="utf-8") as stream:
        process = subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT)
        try:
            _wait(process, ready, log)
            yield
        finally:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen, address: str, log: Path | None) -> None:
    """Wait until the address answers. Raises RuntimeError if the process exits or takes longer than START_S."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            time.sleep(0.1)
    output = log.read_text(encoding="utf-8")[-2000:] if log else ""
    raise RuntimeError(f"{process.args} did not start (exit code {process.poll()}): {output}")


def tiny_vision_model(folder: Path) -> Path:
    """Write a random Llava of about 300 kB with tokenizer, chat template and image processor. It writes gibberish."""
    import torch
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from src.text.tokenizer import Codec

    tokenizer = Codec.train(
        ["A red ring is in the upper left corner. right wrong"], vocab_size=500, alphabet="bytes"
    ).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}<image>{% endif %}{% endfor %}"
        "{% endif %}\n{% endfor %}assistant:"
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8192,
    )  # fmt: skip
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_id)
    ).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
