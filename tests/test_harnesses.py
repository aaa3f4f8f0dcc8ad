"""The adapters to lm-eval and lmms-eval: generation settings, likelihoods, and tasks of theirs on local data."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F

from src.adapters.harness import Harness
from src.generation.captioner import Captioner, Request
from src.io.errors import UserError
from src.scenes.graph import draw_scene
from src.scenes.render import render
from tests.test_generate import LENGTH, backbone, codec, model, photos

__all__ = ["backbone", "codec", "model", "photos"]  # fixtures
ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "base"
PROMPTS = ["Where is the ring?", "Describe the picture.", "A small red ring", "below it."]
FAST = {"length": LENGTH, "tokens_per_step": 4}


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs the extra of {package}")


@pytest.fixture(scope="module")
def harness(model):
    return Harness(model, batch_size="3", **FAST)


@pytest.fixture(scope="module")
def answers(model):
    """The greedy answer to each prompt, one at a time."""
    captioner = Captioner.load(model)
    sampler = captioner.sampler("refine", **FAST)
    return [captioner.answer([Request(image=None, prompt=prompt)], sampler)[0] for prompt in PROMPTS]


def ask(harness, settings):
    return harness.answer([(Request(image=None, prompt=prompt), settings) for prompt in PROMPTS])


def test_settings_of_a_task_reach_the_responses(harness, answers, codec, caplog):
    texts = [answer.text for answer in answers]
    stops = ["", texts[0][5:7], "never"]
    assert len(set(texts)) == len(texts)
    assert ask(harness, {"until": stops, "do_sample": False, "temperature": 0.7}) == [
        t.split(stops[1])[0] for t in texts
    ]
    assert ask(harness, {"until": texts[0][3], "top_p": 1.0})[0] == texts[0].split(texts[0][3])[0]
    assert ask(harness, {"max_new_tokens": 3}) == [codec.decode(answer.ids[:3]) for answer in answers]
    with caplog.at_level(logging.WARNING):
        assert ask(harness, {"max_gen_toks": 256, "num_beams": 4}) == texts
    assert {"responses end after 24 tokens", "num_beams=4 has"} <= {m[:29] for m in caplog.messages} | {
        m[:15] for m in caplog.messages
    }


def test_repeats_of_a_question_are_other_samples(model, answers):
    harness = Harness(model, batch_size=4, seed=5, **FAST)
    request = (Request(image=None, prompt=PROMPTS[0]), {"do_sample": True, "temperature": 1.0})
    texts = harness.answer([request, request, request])
    assert len({*texts, answers[0].text}) == 4
    assert harness.answer([request]) == texts[:1]
    assert Harness(model, seed=6, **FAST).answer([request]) == texts[1:2]


def test_a_likelihood_is_the_bound_by_enumeration(model, codec):
    """The expectation over all sets of masked tokens of a short response; the filler behind its end is part of it."""
    harness = Harness(model, batch_size=2, length=5)
    text = "small"
    ids = torch.tensor([[*codec.encode(text)[0], codec.eot_id, *[codec.eos_id] * 5][:5]])
    backbone, special = harness.captioner.backbone, codec.special
    prefix = backbone.encode_prefix({"prompt_ids": torch.tensor([codec.prompt_ids(PROMPTS[0], images=0)])})
    nats = 0.0
    for count in range(1, 6):
        sets = list(itertools.combinations(range(5), count))
        for places in sets:
            masked = torch.zeros(1, 5, dtype=torch.bool)
            masked[0, list(places)] = True
            with torch.no_grad():
                logits = backbone(prefix, ids.masked_fill(masked, special.mask), positions=masked).float()
            logits[:, special.mask] = logits[:, special.vocab_size :] = -torch.inf
            nats += float(F.cross_entropy(logits, ids[masked], reduction="sum")) * 5 / count / len(sets) / 5
    pairs = [(PROMPTS[0], f" {text}"), (PROMPTS[1], "it"), (PROMPTS[0], text)]
    scores = harness.score(pairs, draws=600)
    assert scores[0][0] == pytest.approx(-nats, rel=0.05) and scores[0][0] != pytest.approx(scores[1][0])
    assert scores[2][0] == pytest.approx(scores[0][0])  # the blank of a choice is no part of it


def test_a_response_is_greedy_if_the_sampler_writes_it():
    harness = Harness(BASE, tokens_per_step=8)
    (written,) = harness.answer([(Request(image=None, prompt=PROMPTS[1]), {})])
    assert [greedy for _, greedy in harness.score([(PROMPTS[1], written), (PROMPTS[1], "A ring.")], draws=1)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("settings", [{"batch_size": "auto"}, {"batch_size": 0}, {"tokens_per_stp": 4}])
def test_mistakes_name_the_setting(model, settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Harness(model, **{"length": LENGTH, **settings})


@pytest.mark.servers
@needs("lm_eval")
def test_tasks_of_lm_eval(model, answers, tmp_path):
    """Their gsm8k and arc_easy on our questions, from the command line: prompts, filters and metrics are theirs."""
    targets = [answer.text.split()[0] if n % 2 else "nothing" for n, answer in enumerate(answers)]
    write_lines(tmp_path / "sums.jsonl", [{"question": p, "answer": t} for p, t in zip(PROMPTS, targets, strict=True)])
    choices = {"text": ["red ring", "zzzz"], "label": ["A", "B"]}
    write_lines(tmp_path / "quiz.jsonl", [{"question": p, "choices": choices, "answerKey": "A"} for p in PROMPTS])
    for name, base, data, more in [
        ("sums", "gsm8k/gsm8k", "sums", {"doc_to_text": "{{question}}", "filter_list": [words_filter()]}),
        ("quiz", "arc/arc_easy", "quiz", {}),
    ]:
        files = dict.fromkeys(("train", "validation", "test"), str(tmp_path / f"{data}.jsonl"))
        base = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / f"{base}.yaml"
        task = {"include": str(base), "task": f"local_{name}", "dataset_path": "json", "dataset_name": None}
        task |= {"dataset_kwargs": {"data_files": files}, "num_fewshot": 0, "tag": "local", **more}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    out = tmp_path / "out"
    args = f"path={model},length={LENGTH},tokens_per_step=4,draws=8"
    command = f"src.adapters.lm_eval run --model rediff --model_args {args} --tasks local_sums,local_quiz --log_samples"
    run(f"{command} --batch_size 3 --include_path {tmp_path} --output_path {out}")
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    assert results["local_sums"]["exact_match,words"] == 0.5
    sums = samples(out, "local_sums")
    assert [s["resps"][0][0] for s in sums] == [answer.text.split("Question:")[0] for answer in answers]
    quiz = samples(out, "local_quiz")
    pairs = [(f"Question: {prompt}\nAnswer:", text) for prompt in PROMPTS for text in choices["text"]]
    scores = iter(Harness(model, **FAST).score(pairs, draws=8))
    bounds = [[next(scores)[0] for _ in choices["text"]] for _ in PROMPTS]
    assert [[float(r[0][0]) for r in s["resps"]] for s in quiz] == [pytest.approx(row, rel=1e-4) for row in bounds]
    assert results["local_quiz"]["acc,none"] == sum(row[0] > row[1] for row in bounds) / len(bounds)


def words_filter() -> dict:
    return {
        "name": "words",
        "filter": [{"function": "regex", "regex_pattern": r"^\s*(\S+)"}, {"function": "take_first"}],
    }


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def samples(folder: Path, task: str) -> list[dict]:
    lines = next(folder.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])


def run(command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.servers
@needs("lmms_eval")
def test_a_task_of_lmms_eval(tmp_path):
    """Their POPE on two scenes, from the command line, by the embedded base model."""
    from datasets import Dataset, DatasetDict

    scenes = [draw_scene(Random(seed), objects=(1, 2)) for seed in range(2)]
    images = [render(scene, Random(0), size=48, noise=0.0) for scene in scenes]
    docs = [
        {"image": image, "question": "Describe the picture.", "answer": "no", "question_id": str(n), "category": "adv"}
        for n, image in enumerate(images)
    ]
    DatasetDict({"test": Dataset.from_list(docs)}).save_to_disk(str(tmp_path / "data"))
    pope = Path(importlib.util.find_spec("lmms_eval").origin).parent / "tasks" / "pope" / "pope.yaml"
    task = {"include": str(pope), "task": "local_pope", "dataset_path": str(tmp_path / "data")}
    task |= {"dataset_kwargs": {"load_from_disk": True}, "lmms_eval_specific_kwargs": {"default": {"post_prompt": ""}}}
    (tmp_path / "local_pope.yaml").write_text(json.dumps(task))
    out = tmp_path / "out"
    command = f"src.adapters.lmms_eval --model rediff --model_args path={BASE},tokens_per_step=4 --tasks local_pope"
    run(f"{command} --batch_size 2 --include_path {tmp_path} --output_path {out} --log_samples")
    captions = Captioner.load(BASE).caption(images, tokens_per_step=4)
    assert len({caption.text for caption in captions}) == 2
    lines = map(json.loads, next(out.rglob("*samples_local_pope.jsonl")).read_text().splitlines())
    written = {line["doc_id"]: line["pope_accuracy"] for line in lines}
    assert [written[n]["prediction"] for n in range(2)] == [caption.text.lower().strip() for caption in captions]
    assert all(written[n]["score"] == 0 for n in range(2))  # a caption is no "no"
