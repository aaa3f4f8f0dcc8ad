"""A benchmark's stage `generate`: captions of our models at several speeds, the lines of `src.generate`; a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from src.evaluate import main
from src.generate import main as generate
from src.text.tokenizer import Codec
from testing.files import read_jsonl
from testing.verbs import refusal
from tests.benchmarks import NUM, write_capmas
from tests.test_evaluate import write_model

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Describe: the picture #1."
KILLED = """
import os, signal, sys
import src.generation.writer as writer
write = writer._append
def killed(path, lines):  # within the third line
    if path.exists() and path.read_text().count(chr(10)) == 2:
        with path.open("a") as stream:
            stream.write('{"key": "a')
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, lines)
writer._append = killed
sys.argv = ["x"]
from src.evaluate import main
main(sys.argv_given)
"""


@pytest.fixture
def argv(tmp_path):
    codec = Codec.train(["a small picture of a red ring. Describe: the #1"], vocab_size=120, alphabet="bytes")
    write_model(tmp_path / "model", codec)
    write_capmas(tmp_path / "raw")

    def of(out: str, *more: str) -> list[str]:
        settings = [f"models={{mine: {tmp_path}/model}}", "tokens_per_step=[2,8]", "judge=null", *more]
        judges = [f"evaluate.judges.{name}=null" for name in ("clair", "coverage", "factuality")]
        data = [f"evaluate.data.folder={tmp_path}/raw", f"evaluate.out={tmp_path}/{out}"]
        made = {"prompt": PROMPT, "length": 16, "sampler": "plain", "batch_size": 1}
        return ["conf=eval/capmas", *settings, *judges, *data, f"evaluate.generate={json.dumps(made)}"]

    return of


def test_captions_are_those_of_generate(argv, tmp_path, capsys):
    main(argv("out"))
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(scores) == ["mine-2", "mine-8"]
    assert scores["mine-2"]["stats"]["words"]["n"] == NUM
    assert scores["mine-2"]["protocol"]["prompt"] == PROMPT and scores["mine-2"]["protocol"]["length"] == 16
    assert "| mine-8 |" in capsys.readouterr().out
    images, out = f"images={tmp_path}/raw/images/deep", tmp_path / "direct.jsonl"
    same = [f"prompt={PROMPT}", "length=16", "sampler=plain", "tokens_per_step=8", "batch_size=1"]
    generate(["conf=generate", f"model.path={tmp_path}/model", images, f"out={out}", *same])
    direct = {line.pop("key").removesuffix(".jpg"): line for line in read_jsonl(out)}
    ours = {line.pop("key"): line for line in read_jsonl(tmp_path / "out" / "captions" / "mine-8.jsonl")}
    assert ours == direct


@pytest.mark.slow
@pytest.mark.dist
def test_a_kill_while_generating_loses_only_the_line_it_falls_into(argv, tmp_path):
    main(argv("calm", "stages=[generate]"))
    command = argv("killed", "stages=[generate]")
    code = KILLED.replace("sys.argv_given", repr(command))
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    files = [tmp_path / name / "captions" for name in ("calm", "killed")]
    before = (files[1] / "mine-2.jsonl").read_bytes()
    assert before.endswith(b'\n{"key": "a') and not (files[1] / "mine-8.jsonl").exists()
    main(command)
    for name in ("mine-2.jsonl", "mine-8.jsonl"):
        assert (files[1] / name).read_bytes() == (files[0] / name).read_bytes()
    assert (files[1] / "mine-2.jsonl").read_bytes().startswith(before.rpartition(b"\n")[0])


def test_scoring_before_generating_names_the_stage(argv, tmp_path, capsys):
    assert "mine-2.jsonl: run the stage generate first" in refusal(main, argv("out", "stages=[score]"), capsys)
    assert "stages: there is no 'scores'; a list of generate, judge, score" in refusal(
        main, argv("out", "stages=[generate,scores]"), capsys
    )
    assert "captions and models: both have the name 'mine-8'" in refusal(
        main, argv("out", "captions={mine-8: x.jsonl}"), capsys
    )
