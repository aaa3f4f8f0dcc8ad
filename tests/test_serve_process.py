"""`python -m src.serve` as a user starts it, a process of its own: asked, stopped, and as the expert of Stage II."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import openai
import pytest
import torch
from PIL import Image

import src.train
from src.io.shards import read_manifest
from src.models.hf.folder import from_pretrained
from testing.scenes import BASE, write_scenes

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@contextmanager
def serving(*settings: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process, and its address; the embedded base model is called `base`."""
    command = [sys.executable, "-m", "src.serve", f"model.path={BASE}", "port=0", "name=base", *settings]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    try:
        yield process, re.search(r"http://\S+/v1", process.stdout.readline())[0]  # type: ignore[union-attr, index]
    finally:
        process.kill()
        process.wait()


def test_sigterm_lets_a_request_finish():
    stream = io.BytesIO()
    Image.effect_noise((48, 48), 60).save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    parts = [{"type": "text", "text": "Describe the picture."}, {"type": "image_url", "image_url": {"url": url}}]
    with serving("grace_seconds=600") as (process, address):
        client = openai.OpenAI(base_url=address, api_key="any", max_retries=0)
        chunks = client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": parts}],  # type: ignore[arg-type]
            stream=True,
            temperature=1.0,
            extra_body={"sampler": "flow", "steps": 60, "trace": True},
        )
        received = [next(chunks), next(chunks)]
        process.send_signal(signal.SIGTERM)
        received += chunks
        assert received[-1].choices[0].finish_reason and len(received) > 60
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == "ended: 1 request answered in 1 batch\n"  # type: ignore[union-attr]


def test_stage_2_asks_it_as_its_expert(tmp_path):
    """A small model corrects nothing, so each draft fails; the round says so, and training goes on without it."""
    data = write_scenes(tmp_path / "data", num_train=6, num_val=1, num_test=1)
    run_dir = tmp_path / "run"
    with serving("tokens_per_step=16") as (_, address):
        src.train.main([
            "conf=stage2,expert/openai", f"run_dir={run_dir}", f"model.path={BASE}", f"tokenizer={BASE}",
            f"data.path={data}", "data.batch_size=4", "data.workers=0", "data.epoch_batches=2", "trainer.max_steps=4",
            "trainer.limit_val_batches=0", "optim.warmup_steps=1", "callbacks.samples=null",
            "callbacks.self_correction.drafts_per_round=4", "callbacks.self_correction.tokens_per_step=[16]",
            "callbacks.self_correction.rounds=1", "callbacks.self_correction.allow_empty=true",
            f"expert.base_url={address}", "expert.model=base", "expert.profile=plain", "expert.key_env=null",
            "expert.limits.attempts=1", "expert.repair=0",
        ])  # fmt: skip
        with urlopen(address.replace("/v1", "/health")) as health:
            assert json.load(health)["answered"] == 4
    manifest = read_manifest(run_dir / "rounds" / "round-0001")
    assert (manifest["counts"]["drafted"], manifest["counts"]["failed"]) == (4, 4)
    assert sum(manifest["failures"].values()) == 4
    assert manifest["failures"].keys() <= {"malformed", "wrong_schema", "empty", "length"}
    assert manifest["usage"]["prompt_tokens"] > 4 * 500
    before, after = (from_pretrained(folder).state_dict() for folder in (BASE, run_dir / "model"))
    assert not all(torch.equal(before[name], weight) for name, weight in after.items())
