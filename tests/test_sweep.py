"""Sweeps: grids of sampler settings, a metric against forward calls, likelihood bounds, kills, texts without images."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from src.cli.config import load_config
from src.evaluate import complete, main
from src.evaluation.grid import expand
from src.evaluation.pareto import Point, budget_table, budgets_of, front_of, lines_of, plot_curve, points_of, to_dict
from src.evaluation.results import Cell
from src.io.errors import UserError
from src.metrics.bound import response_nats
from src.models.hf.folder import from_pretrained, save_pretrained
from src.models.llada_v import LLaDAV
from src.preparation.scenes import Scenes
from src.preparation.text import Pairs
from src.text.tokenizer import Codec

ROOT = Path(__file__).resolve().parents[1]
LENGTH, NUM = 48, 4
PLAIN = {"target": "src.samplers.sampler.Sampler", "length": LENGTH}
PROSECO = {**PLAIN, "reviser": {"target": "src.samplers.proseco.Corrector", "every": 1}}
GRID = {"proseco": {"reviser": {"passes": [1, 2]}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "scenes"
    counts = {"num_train": 40, "num_val": 2, "num_test": 6, "captions_per_image": 1, "objects": [1, 2]}
    settings = {
        "image_size": 48,
        "noise": 2.0,
        "vocab_size": 300,
        "response_length": LENGTH,
        "prompt": "Describe the picture.",
    }
    Scenes(out=str(out), **counts, **settings).run()
    return out


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "a", Codec.load(data / "tokenizer"))


def write_model(path, codec, *, seed=0, vision=True):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    decoder = {"vocab_size": codec.vocab_size, "num_hidden_layers": 1, "attention": "prefix", **sizes}
    tower = {"num_hidden_layers": 1, "image_size": 48, "patch_size": 16, **sizes} if vision else None
    save_pretrained(LLaDAV(decoder=decoder, vision=tower, image_id=codec.image_id), codec, path)
    return path


@pytest.fixture
def conf(data, model, tmp_path):
    """A function: settings of the evaluation -> path of its yaml."""
    base = {
        "models": {"m": str(model)},
        "samplers": {"plain": PLAIN, "proseco": PROSECO},
        "grid": GRID,
        "tokens_per_step": [16, 24],
        "data": {
            "target": "datamodules.captions.CaptionData",
            "path": str(data),
            "response_length": LENGTH,
            "image_size": 48,
        },
        "split": "test",
        "num": NUM,
        "batch_size": 4,
        "metrics": [{"target": "src.metrics.scenes.SceneQuality"}],
        "headline": ["quality"],
        "bound": {"draws": None},
        "curve": {"metric": "quality"},
        "out": str(tmp_path / "out"),
        "seed": 0,
    }

    def write(**changed) -> str:
        path = tmp_path / "evaluate.yaml"
        path.write_text(yaml.safe_dump({"evaluate": {**base, **changed}}, sort_keys=False))
        return f"conf={path}"

    return write


def read(tmp_path, name="results") -> dict:
    return json.loads((tmp_path / "out" / f"{name}.json").read_text())


def inodes(tmp_path) -> dict[str, int]:
    return {path.stem: path.stat().st_ino for path in (tmp_path / "out" / "captions").glob("*.jsonl")}


# grids


def test_a_grid_makes_every_combination_in_order():
    grid = {"proseco": {"reviser": {"every": [1, 2], "passes": [1, 4]}, "temperature": [0.5]}}
    found, speeds = expand({"plain": PLAIN, "proseco": PROSECO}, grid, [1, 8], known=set())
    names = [f"proseco[every={e},passes={p}]" for e, p in product([1, 2], [1, 4])]  # the temperature is the same in all
    assert list(found) == ["plain", *names]
    assert found["plain"] == PLAIN
    for name, (every, passes) in zip(names, product([1, 2], [1, 4]), strict=True):
        reviser = {**PROSECO["reviser"], "every": every, "passes": passes}
        assert found[name] == {**PROSECO, "reviser": reviser, "temperature": 0.5}
    assert set(map(tuple, speeds.values())) == {(1, 8)}
    assert PROSECO["reviser"] == {"target": "src.samplers.proseco.Corrector", "every": 1}  # as it was


def test_options_may_be_dotted_null_or_end_alike_and_speeds_are_apart():
    node = {**PROSECO, "unmask": {"target": "src.samplers.unmask.Threshold", "tau": 0.9}}
    node["reviser"] = {"target": "src.samplers.token_edit.ThresholdEdit", "tau": 0.5}
    grid = {"a": {"unmask.tau": [0.5, 1], "reviser": {"tau": [0.2, 0.3]}, "tokens_per_step": [8, 2], "eos_last": None}}
    found, speeds = expand({"a": node, "b": node}, grid, [1], known={"gone"})
    names = [f"a[unmask.tau={a},reviser.tau={b}]" for a, b in product([0.5, 1], [0.2, 0.3])]
    assert list(found) == [*names, "b"]
    assert speeds == {**{name: [2, 8] for name in names}, "b": [1]}
    assert expand({"b": node}, {"gone": {"x": [1]}, "b": None}, [1], known={"gone"})[1] == {"b": [1]}
    assert list(expand({"b": PLAIN}, {"b": {"early_stop": [False, "block"]}}, [1], known=set())[0]) == [
        "b[early_stop=false]",
        "b[early_stop=block]",
    ]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"grid": {"prosec": {"temperature": [1]}}},
            "evaluate.grid: there is no sampler 'prosec'; did you mean 'proseco'",
        ),
        (
            {"grid": {"proseco": {"reviser": {"passe": [1]}}}},
            "evaluate.grid.proseco: the sampler has no option 'reviser.passe'; did you mean 'reviser.passes'?",
        ),
        (
            {"grid": {"plain": {"reviser.passes": [1]}}},
            "evaluate.grid.plain: the sampler has no option 'reviser.passes'",
        ),
        (
            {"grid": {"plain": {"temperature": 1}}},
            "evaluate.grid.plain.temperature: expected a list of different plain",
        ),
        ({"grid": {"plain": {"temperature": []}}}, "expected a list of different plain values, got []"),
        ({"grid": {"plain": {"temperature": [1, 1]}}}, "expected a list of different plain values, got [1, 1]"),
        ({"grid": {"plain": {"temperature": ["hot"]}}}, "samplers.plain.temperature: expected float, got 'hot'"),
        (
            {"grid": {"proseco": {"reviser": {"passes": [1, 2.5]}}}},
            "[passes=2.5].reviser.passes: expected int, got 2.5",
        ),
        ({"grid": {"plain": {"temperature": [0, -1]}}}, "temperature must be at least 0, got -1"),
        ({"grid": {"plain": {"tokens_per_step": [49]}}}, "evaluate.samplers.plain at 49 tokens/step"),
        (
            {"grid": {"plain": {"tokens_per_step": [49], "temperature": [0, 1]}}},
            "leave it out with evaluate.samplers.plain=null, or give it its own speeds in "
            "evaluate.grid.plain.tokens_per_step",
        ),
        ({"grid": {"plain": {"tokens_per_step": 8}}}, "evaluate.grid.plain.tokens_per_step: expected a list"),
        ({"grid": {"plain": {"steps": [8]}}}, "the steps follow from tokens_per_step"),
        ({"grid": [1]}, "evaluate.grid: expected a mapping of samplers to options, got [1]"),
        ({"curve": "quality"}, "evaluate.curve: expected null or {metric: NAME, best: highest or lowest}"),
        ({"curve": {"metric": "quality", "best": "most"}}, "got {'metric': 'quality', 'best': 'most'}"),
        ({"bound": {"draws": "many"}}, "evaluate.bound: expected {draws: NUMBER or null"),
        ({"bound": {"draws": 0}}, "draws must be at least 1, got 0"),
        ({"bound": {"draws": 1, "estimator": "both"}}, "estimator must be one of count, iid, got 'both'"),
    ],
)
def test_mistakes_are_one_error_before_anything_runs(changed, words, conf, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([conf(**changed)])
    assert stop.value.code == 2
    assert words in (said := capsys.readouterr().err)
    assert said.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_the_command_line_changes_the_shipped_grid():
    argv = ["conf=sweep", "evaluate.models.model=m", "evaluate.grid.proseco.reviser.passes=[3]"]
    argv += [
        "evaluate.grid.threshold=null",
        "evaluate.samplers.refine=null",
        "+evaluate.grid.remdm_conf.reviser={compensate: [false, true]}",
    ]
    found = complete(load_config(argv).evaluate)
    names = list(found.samplers)
    expected = {"remdm_conf[temperature=1.0,compensate=true]", "threshold", "proseco[every=1]", "proseco[every=2]"}
    assert expected <= set(names)
    assert found.samplers["proseco[every=2]"].reviser.passes == 3
    assert not [name for name in names if name.startswith(("refine", "threshold["))]
    assert {found.samplers[name].length for name in names} == {64}
    assert list(found.models) == ["model"]


# names of files


def test_file_names_are_safe_and_different():
    nasty = [
        "a/b",
        "../a",
        "a b",
        "a_b",
        ".a",
        "..",
        "a[x=1,y=2]",
        "a[x=1,y=3]",
        "ä",
        "a" * 400,
        "a" * 401,
        "a\nb",
        "*",
        "",
    ]
    cells = [Cell(method, sampler, speed) for method, sampler in product(nasty, nasty) for speed in (1, 16)]
    files = [cell.file for cell in cells]
    assert len(set(files)) == len({cell.name for cell in cells})
    for name in files:
        assert 0 < len(name.encode()) < 200 and name == Path(name).name and not name.startswith(".")
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=-")
    assert Cell("mask", "refine", 8).file == "mask-refine-8"


def test_cells_that_would_share_a_name_are_refused(conf, model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([conf(models={"m": str(model), "m-x": str(model)}, samplers={"x-y": PLAIN, "y": PLAIN}, grid={})])
    assert "two cells of the evaluation have the same name" in capsys.readouterr().err


# the curve


def point(calls, value, *, sampler="plain", speed=1, method="m") -> Point:
    stats = [{"mean": mean, "se": 0.01, "n": 4} for mean in (calls, calls / 100, value)]
    return Point(f"{method}-{sampler}-{speed}", method, sampler, speed, *stats)


def test_the_front_and_the_budgets_by_brute_force():
    generator = random.Random(0)
    for lowest in (False, True):
        for _ in range(60):
            count = generator.randint(1, 9)
            points = [
                point(generator.randint(2, 40), generator.randint(0, 6) / 6, sampler=f"s{i % 2}[x={i}]", speed=i)
                for i in range(count)
            ]
            good = lambda p, sign=(-1 if lowest else 1): sign * p.value["mean"]  # noqa: E731
            best = [
                p for p in points
                if not any((q.calls <= p.calls and good(q) > good(p)) or (q.calls < p.calls and good(q) >= good(p))
                           for q in points)
            ]  # fmt: skip
            front = front_of(points, lowest=lowest)
            assert {(p.calls, p.value["mean"]) for p in front} == {(p.calls, p.value["mean"]) for p in best}
            assert [p.calls for p in front] == sorted({p.calls for p in best})
            budgets = budgets_of(points, lowest=lowest)
            assert budgets[-1].forwards >= max(p.calls for p in points) > budgets[-1].forwards / 2
            assert budgets[0].forwards >= min(p.calls for p in points) > budgets[0].forwards / 2
            for budget in budgets:
                within = [p for p in points if p.calls <= budget.forwards]
                assert good(budget.best) == max(map(good, within))
                assert budget.best.calls == min(p.calls for p in within if good(p) == good(budget.best))
                base = [good(p) for p in within if p.family == points[0].family]
                assert (good(budget.baseline) if budget.baseline else None) == (max(base) if base else None)


def test_lines_join_speeds_or_the_variants_of_one_speed():
    points = [
        point(48, 0.9, speed=1), point(6, 0.5, speed=8), point(20, 0.8, sampler="t[tau=1]"),
        point(9, 0.6, sampler="t[tau=0]"), point(60, 0.9, sampler="p[n=1]"), point(8, 0.7, sampler="p[n=1]", speed=8),
        point(70, 0.9, sampler="p[n=2]"), point(9, 0.7, sampler="p[n=2]", speed=8), point(48, 0.1, method="other"),
    ]  # fmt: skip
    found = {name: [p.calls for p in line] for name, line in lines_of(points).items()}
    assert found == {
        ("m", "plain"): [6, 48], ("m", "t"): [9, 20], ("m", "p[n=1]"): [8, 60], ("m", "p[n=2]"): [9, 70],
        ("other", "plain"): [48],
    }  # fmt: skip


def test_the_table_of_budgets_by_hand():
    points = [point(48, 0.75, speed=1), point(6, 0.5, speed=8), point(12, 0.9, sampler="p[n=1]", speed=8)]
    scores = {points[0].key: {"q": [0.7, 0.8]}, points[1].key: {"q": [0.4, 0.6]}, points[2].key: {"q": [1.0, 0.8]}}
    table = budget_table(points, scores, metric="q", lowest=False)
    assert table[0] == ["calls up to: best q", "cell", "calls", "seconds", "q", "best of m plain", "difference"]
    # 32 calls give what 16 do; paired: 0.6, 0.2 against the plain one of 6 calls, 0.3, 0.0 against that of 48
    assert table[1:] == [
        ["8", "m-plain-8", "6.0", "0.06", "0.500 ±0.010", "0.500 ±0.010", "-"],
        ["16", "m-p[n=1]-8", "12.0", "0.12", "0.900 ±0.010", "0.500 ±0.010", "+0.400 ±0.200"],
        ["64", "m-p[n=1]-8", "12.0", "0.12", "0.900 ±0.010", "0.750 ±0.010", "+0.150 ±0.150"],
    ]


def test_a_plot_of_many_lines_and_one_of_a_single_point(tmp_path):
    points = [point(2**e, 0.1 * e, sampler=f"p[n={n}]", speed=9 - e) for e in range(1, 7) for n in range(20)]
    for some in (points, points[:1]):
        plot_curve(some, tmp_path / "curve.png", metric="q", lowest=False)
        image = Image.open(tmp_path / "curve.png").convert("RGB")
        assert (31, 119, 180) in {colour for _, colour in image.getcolors(1 << 22) or []} or some == points


# the verb


def test_the_curve_is_that_of_the_results(conf, tmp_path, capsys):
    main([conf()])
    methods, curve = read(tmp_path)["methods"], read(tmp_path, "curve")
    cells = [(s, n) for s in ("plain", "proseco[passes=1]", "proseco[passes=2]") for n in ("16", "24")]
    assert [(p["sampler"], str(p["tokens_per_step"])) for p in curve["points"]] == cells
    for found, (sampler, speed) in zip(curve["points"], cells, strict=True):
        stats = methods["m"][sampler][speed]
        assert (found["forwards"], found["seconds"]) == (stats["forwards"], stats["seconds"])
        assert found["value"] == stats["quality"]
        lines = (
            (tmp_path / "out" / "captions" / f"{Cell('m', sampler, int(speed)).file}.jsonl").read_text().splitlines()
        )
        calls = [json.loads(line)["scores"]["forwards"] for line in lines]
        assert found["forwards"]["mean"] == statistics.mean(calls) and len(calls) == NUM
    assert methods["m"]["plain"]["16"]["forwards"]["mean"] == 3
    assert methods["m"]["proseco[passes=1]"]["16"]["forwards"]["mean"] == 6
    assert all({"forwards", "seconds"} <= set(stats) for row in methods["m"].values() for stats in row.values())
    assert Image.open(tmp_path / "out" / "curve.png").size > (400, 300)
    assert not (tmp_path / "out" / "quality.png").exists()
    printed = capsys.readouterr().out
    assert "calls up to: best quality" in printed
    assert f"{'m':7}  proseco[passes=2]" in printed
    assert "| calls up to: best quality | cell |" in (tmp_path / "out" / "table.md").read_text()
    assert to_dict(points_of(read(tmp_path), "quality"), metric="quality", lowest=False) == curve


def test_a_speed_of_its_own_leaves_gaps_in_the_table(conf, tmp_path, capsys):
    main([conf(grid={"proseco": {"tokens_per_step": [48]}}, curve=None)])
    assert {s: list(c) for s, c in read(tmp_path)["methods"]["m"].items()} == {"plain": ["16", "24"], "proseco": ["48"]}
    assert (tmp_path / "out" / "quality.png").exists()
    row = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("m ")]
    assert [cells[2:4] for cells in row if cells[1] == "proseco"] == [["-", "-"]]


def test_a_kill_loses_only_the_cell_it_falls_into(conf, tmp_path):
    """SIGKILL in the middle; the rerun keeps what was done and ends like a run that nothing has disturbed."""
    grid = {"proseco": {"reviser": {"passes": [1, 2, 3, 4]}}}
    argument = conf(grid=grid, tokens_per_step=[1, 2], bound={"draws": 2})
    process = subprocess.Popen([sys.executable, "-m", "src.evaluate", argument], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(inodes(tmp_path)) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first, done = inodes(tmp_path), read(tmp_path)
    known = {Cell("m", s, int(n)).file for s, cells in done["methods"]["m"].items() for n in cells}
    assert 2 <= len(known) < 10
    main([argument])
    again, final = inodes(tmp_path), read(tmp_path)
    assert {name for name in first if first[name] == again[name]} >= known
    assert len(again) == 10
    assert final["bounds"] == done["bounds"]
    main([conf(grid=grid, tokens_per_step=[1, 2], bound={"draws": 2}, out=str(tmp_path / "calm" / "out"))])
    calm = read(tmp_path / "calm")
    for results in (final, calm):
        for stats in (stats for row in results["methods"]["m"].values() for stats in row.values()):
            del stats["seconds"]
    assert (final["methods"], final["bounds"]) == (calm["methods"], calm["bounds"])
    for name in again:
        texts = [
            (folder / "captions" / f"{name}.jsonl").read_bytes() for folder in (tmp_path / "out", tmp_path / "calm/out")
        ]
        assert texts[0] == texts[1]


def test_the_bound_of_a_model_is_done_once(conf, data, model, tmp_path, capsys):
    from datamodules.captions import CaptionData

    main([conf(bound={"draws": 3})])
    codec, backbone = Codec.load(data / "tokenizer"), from_pretrained(model).eval()
    loader = CaptionData(
        path=str(data), codec=codec, batch_size=NUM, response_length=LENGTH, image_size=48
    ).test_dataloader()
    with torch.no_grad():
        nats = response_nats(backbone, next(iter(loader)), special=codec.special, draws=3, seed=0)
    found = read(tmp_path)["bounds"]["m"]
    assert found["nelbo"]["mean"] == pytest.approx(float(nats.mean()) / LENGTH, rel=1e-5)
    assert found["nelbo"]["se"] == pytest.approx(float(nats.std()) / LENGTH / math.sqrt(NUM), rel=1e-4)
    assert found["bits"]["mean"] == pytest.approx(found["nelbo"]["mean"] / math.log(2))
    assert found["perplexity"]["mean"] == pytest.approx(math.exp(found["nelbo"]["mean"]))
    assert "bound per token  nelbo" in capsys.readouterr().out
    assert "| bound per token | nelbo |" in (tmp_path / "out" / "table.md").read_text()
    cells, results = inodes(tmp_path), read(tmp_path)
    main([conf(bound={"draws": 4})])  # another bound, the same cells
    assert inodes(tmp_path) == cells
    assert read(tmp_path)["bounds"]["m"]["nelbo"] != found["nelbo"]
    main([conf(bound={"draws": 3}, grid={})])  # other cells
    main([conf(bound={"draws": 3})])
    assert read(tmp_path)["bounds"] == results["bounds"]
    main([conf(bound=None)])
    assert read(tmp_path)["bounds"] == {}


def test_texts_without_images_are_evaluated(conf, tmp_path, capsys):
    """Prompts with answers: no picture, exact match against the record, the judge's perplexity, variety by tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    lines = [{"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
             for a in range(9) for b in range(9)]  # fmt: skip
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "sums"
    Pairs(
        out=str(folder), files=str(tmp_path / "sums.jsonl"), prompt="question", response="answer", keep=[],
        max_prompt=64, response_length=LENGTH, tokenizer=None, vocab_size=300, prompt_format=None, seed=0,
        overwrite=False,
    ).run()  # fmt: skip
    codec = Codec.load(folder / "tokenizer")
    write_model(tmp_path / "text", codec, vision=False)
    judge = tmp_path / "judge"
    GPT2LMHeadModel(GPT2Config(vocab_size=codec.vocab_size, n_embd=16, n_layer=1, n_head=2)).save_pretrained(judge)
    codec.tokenizer.save_pretrained(judge)
    metrics = [
        {"target": "src.metrics.answer.ExactMatch"},
        {"target": "src.metrics.variety.Variety", "unit": "tokens"},
        {"target": "src.metrics.perplexity.GenerativePerplexity", "model": str(judge)},
    ]
    settings = {"models": {"m": str(tmp_path / "text")}, "metrics": metrics, "headline": ["exact_match", "gen_nll"]}
    node = {"target": "datamodules.text.TextData", "path": str(folder), "response_length": LENGTH}
    curve = {"metric": "gen_nll", "best": "lowest"}
    main([conf(**settings, data=node, split="val", bound={"draws": 2}, curve=curve)])
    stats = read(tmp_path)["methods"]["m"]["proseco[passes=1]"]["16"]
    assert {"exact_match", "token_entropy", "token_distinct_2", "gen_perplexity", "forwards", "seconds"} <= set(stats)
    assert stats["exact_match"]["n"] == min(NUM, read(tmp_path)["meta"]["data"]["taken"])
    assert read(tmp_path)["bounds"]["m"]["nelbo"]["mean"] > 0
    best = min(p["value"]["mean"] for p in read(tmp_path, "curve")["points"])
    assert [p["value"]["mean"] for p in read(tmp_path, "curve")["points"] if p["front"]][-1] >= best
    assert not (tmp_path / "out" / "captions.png").exists()
    assert (tmp_path / "out" / "curve.png").exists()
    assert "exact_match" in capsys.readouterr().out


def test_a_record_that_a_metric_cannot_use_stops_before_the_first_caption(conf, tmp_path, capsys):
    lines = [{"question": f"q{n}", "answer": f"a{n}" + (" #### 1" if n else "")} for n in range(4)]
    for name, some in (("train", lines[2:]), ("val", lines[:2])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "val")}
    folder = tmp_path / "data"
    Pairs(
        out=str(folder), files=files, prompt="question", response="answer", response_length=LENGTH, vocab_size=300
    ).run()
    write_model(tmp_path / "text", Codec.load(folder / "tokenizer"), vision=False)
    node = {"target": "datamodules.text.TextData", "path": str(folder), "response_length": LENGTH}
    settings = {"metrics": [{"target": "src.metrics.answer.ExactMatch"}], "headline": ["answered"], "curve": None}
    with pytest.raises(SystemExit):
        main([conf(models={"m": str(tmp_path / "text")}, data=node, split="val", **settings)])
    assert "the reference of record 'val-000000' has no answer after ####" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_metric_that_cannot_be_built_stops_before_the_first_caption(conf, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([conf(metrics=[{"target": "src.metrics.perplexity.GenerativePerplexity", "model": "nowhere"}])])
    assert "no language model in 'nowhere'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_curve_names_a_metric_that_there_is(conf, capsys):
    with pytest.raises(SystemExit):
        main([conf(curve={"metric": "qualty"}, samplers={"plain": PLAIN}, grid={}, tokens_per_step=[48])])
    assert "error: evaluate.curve: no metric qualty; there are coverage" in capsys.readouterr().err


def test_expand_does_not_accept_the_option_of_another_target():
    with pytest.raises(UserError, match=r"no option 'reviser\.scope\.x'"):
        expand({"p": PROSECO}, {"p": {"reviser.scope.x": [1]}}, [1], known=set())
