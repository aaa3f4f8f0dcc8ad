"""The verb `evaluate` on real shards and small models: results, resuming, kills, bounds, mistakes."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from datamodules.captions import CaptionData
from src.cli.config import load_config, load_part
from src.cli.instantiate import build, plain
from src.evaluate import main
from src.evaluation.grid import complete
from src.evaluation.results import Cell, ResultStore, code_hash
from src.generation.run import sampler_of
from src.io.shards import read_manifest, read_shard
from src.metrics.bound import response_nats
from src.metrics.text import ReferenceOverlap
from src.models.hf.folder import from_pretrained, save_pretrained
from src.models.llada_v import LLaDAV
from src.preparation.photos import Photos
from src.samplers.sampler import Sampler
from src.scenes.graph import Scene
from src.scenes.score import score_caption
from src.text.tokenizer import Codec
from testing.files import read_jsonl
from testing.scenes import write_scenes
from testing.verbs import refusal

ROOT = Path(__file__).resolve().parents[1]
LENGTH, NUM, PROMPT = 48, 5, "Describe the picture."
PLAIN = {"target": "src.samplers.sampler.Sampler", "length": LENGTH}
REFINE = {**PLAIN, "reviser": {"target": "src.samplers.rediff.OverwriteAll"}, "post_steps": 2}
PROSECO = {**PLAIN, "reviser": {"target": "src.samplers.proseco.Corrector", "every": 1}}
SWEEP = {  # settings of a sweep: four cells of one model at more than one speed
    "samplers": {"plain": PLAIN, "proseco": PROSECO},
    "grid": {"proseco": {"reviser": {"passes": [1, 2]}}},
    "tokens_per_step": [16, 24],
    "curve": {"metric": "quality"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    sizes = {
        "num_train": 40,
        "num_val": 2,
        "response_length": LENGTH,
        "per_shard": 64,
        "tokenizer": None,
        "prompt": PROMPT,
    }
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", **sizes)


def write_model(path, codec, *, seed=0, vision=True, image_size=48):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    decoder = {"vocab_size": codec.vocab_size, "num_hidden_layers": 1, "attention": "prefix", **sizes}
    tower = {"num_hidden_layers": 1, "image_size": image_size, "patch_size": 16, **sizes} if vision else None
    save_pretrained(LLaDAV(decoder=decoder, vision=tower, image_id=codec.image_id), codec, path)
    return path


@pytest.fixture(scope="module")
def models(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["mask", "stage2"]):
        write_model(folder / name, Codec.load(data / "tokenizer"), seed=seed)
    return folder


@pytest.fixture
def conf(data, models, tmp_path):
    """A function: settings of the evaluation -> the argument for its yaml."""
    base = {
        "models": {name: str(models / name) for name in ("mask", "stage2")},
        "samplers": {"plain": PLAIN, "refine": REFINE},
        "grid": {},
        "tokens_per_step": [32],
        "data": captions_of(data),
        "split": "test",
        "num": NUM,
        "batch_size": 3,
        "metrics": [{"target": "src.metrics.scenes.SceneQuality"}, {"target": "src.metrics.overlap.Bleu"}],
        "headline": ["quality", "syntax"],
        "bound": {"draws": None},
        "looks": {"levels": [0.0, 0.5], "rate": 0.2},
        "curve": None,
        "out": str(tmp_path / "out"),
        "seed": 0,
    }

    def write(**changed) -> str:
        path = tmp_path / "evaluate.yaml"
        path.write_text(yaml.safe_dump({"evaluate": {**base, **changed}}, sort_keys=False))
        return f"conf={path}"

    return write


def captions_of(data) -> dict:
    node = {"target": "datamodules.captions.CaptionData", "path": str(data)}
    return {**node, "response_length": LENGTH, "image_size": 48}


def first_batch(data, codec):
    data = CaptionData(path=str(data), codec=codec, batch_size=NUM, response_length=LENGTH, image_size=48)
    return next(iter(data.test_dataloader()))


def read(tmp_path, name="results") -> dict:
    return json.loads((tmp_path / "out" / f"{name}.json").read_text())


def captions(tmp_path, name) -> list[dict]:
    return read_jsonl(tmp_path / "out" / "captions" / f"{name}.jsonl")


def records(data) -> list[dict]:
    shards = read_manifest(data / "test")["shards"]
    return [sample["json"] for shard in shards for sample in read_shard(data / "test" / shard["name"])]


def inodes(tmp_path) -> dict[str, int]:
    return {path.stem: path.stat().st_ino for path in (tmp_path / "out" / "captions").glob("*.jsonl")}


def test_images_are_cut_as_the_models_take_them(conf, data, models, tmp_path, capsys):
    """Without a size, that of the models; with another one, or for a model of another one, an error before any cell."""
    alone = {"mask": str(models / "mask")}
    main([conf(models=alone)])
    named = captions(tmp_path, "mask-plain-32")
    unnamed = {**captions_of(data), "image_size": None, "tiling": None}
    main([conf(models=alone, data=unnamed, out=str(tmp_path / "null"))])
    assert read_jsonl(tmp_path / "null" / "captions" / "mask-plain-32.jsonl") == named
    error = refusal(main, [conf(models=alone, data={**unnamed, "image_size": 32})], capsys)
    assert "one tile of 32 pixels, model means one tile of 48 pixels; set data.image_size=48" in error
    other = write_model(tmp_path / "other", Codec.load(data / "tokenizer"), image_size=64)
    error = refusal(main, [conf(models={**alone, "other": str(other)}, data=unnamed)], capsys)
    assert "one tile of 48 pixels, model means one tile of 64 pixels" in error


def test_a_split_is_evaluated_whole_and_in_order_whatever_the_batch_size(conf, data, models, tmp_path):
    """The training split, which training shuffles and cuts to whole batches."""
    shards = read_manifest(data / "train")["shards"]
    keys = [s["json"]["key"] for shard in shards for s in read_shard(data / "train" / shard["name"])]
    assert len(keys) == 40
    settings = {"split": "train", "num": 40, "models": {"mask": str(models / "mask")}, "bound": {"draws": 2}}
    tables, bounds = [], []
    for size in (39, 64):
        out = tmp_path / f"out{size}"
        main([conf(**settings, batch_size=size, out=str(out))])
        assert [line["key"] for line in read_jsonl(out / "captions" / "mask-plain-32.jsonl")] == keys
        result = json.loads((out / "results.json").read_text())
        for stats in result["methods"]["mask"].values():
            del stats["32"]["seconds"]
        tables.append([result["methods"], result["meta"]["data"]])
        bounds.append(result["model_stats"]["mask"]["nelbo"]["mean"])
    assert tables[0] == tables[1]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)  # sums in another order


def test_results_are_those_of_the_captions(conf, data, tmp_path, capsys):
    main([conf(tokens_per_step=[16, 32])])
    methods = read(tmp_path)["methods"]
    assert [(m, s, list(cells)) for m, row in methods.items() for s, cells in row.items()] == [
        (m, s, ["16", "32"]) for m in ("mask", "stage2") for s in ("plain", "refine")
    ]
    lines, known = captions(tmp_path, "stage2-refine-16"), records(data)[:NUM]
    assert [line["key"] for line in lines] == [record["key"] for record in known]
    scores = [score_caption(Scene.from_dict(r["scene"]), line["text"]) for line, r in zip(lines, known, strict=True)]
    cell = methods["stage2"]["refine"]["16"]
    for name in ("coverage", "factuality", "syntax", "quality"):
        values = [getattr(score, name) for score in scores]
        assert values == [line["scores"][name] for line in lines]
        assert cell[name]["mean"] == pytest.approx(statistics.mean(values))
        assert cell[name]["se"] == pytest.approx(statistics.stdev(values) / math.sqrt(NUM))
    assert {stat["n"] for name, stat in cell.items() if name != "seconds"} == {NUM}
    assert [methods["mask"]["plain"][n]["forwards"]["mean"] for n in ("16", "32")] == [3, 2]
    assert methods["mask"]["plain"]["16"]["edits"]["mean"] == 0
    looks = read(tmp_path)["model_stats"]["mask"]
    assert list(looks) == ["p_fix at t=0", "p_fix at t=0.5", "p_break at t=0", "p_break at t=0.5"]
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "table.md").read_text()
    assert "forward calls (and seconds) per caption, mask plain: 3.0 (0." in printed
    assert printed.count("| stage2  | refine  |") == 1 and printed.count("| stage2 | refine  |") == 1
    assert f"| mask         | {looks['p_break at t=0']['mean']:.3f} " in printed
    assert "| p_break at t | 0     | 0.5" in printed
    assert "| precision_object | precision_attribute |" in printed and "| stage2-refine-16 | " in printed
    for name in ("quality.png", "captions.png"):
        assert Image.open(tmp_path / "out" / name).size > (400, 300)


def test_the_captions_are_what_the_sampler_writes_in_batches_of_any_size(conf, data, models, tmp_path):
    settings = {"models": {"mask": str(models / "mask")}, "samplers": {"plain": {**PLAIN, "temperature": 1.0}}}
    main([conf(**settings, batch_size=2, seed=3)])
    codec, backbone = Codec.load(data / "tokenizer"), from_pretrained(models / "mask").eval()
    batch = first_batch(data, codec)
    sampler = Sampler(length=LENGTH, tokens_per_step=32, temperature=1.0)
    sampled = sampler(backbone, backbone.encode_prefix(batch.prefix), special=codec.special, keys=batch.keys, seed=3)
    texts = [codec.decode(ids) for ids in sampled.ids.tolist()]
    assert [line["text"] for line in captions(tmp_path, "mask-plain-32")] == texts


def test_damaged_images_are_left_out_and_counted(conf, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data" / "test" / "test-000000.tar"
    second = records(data)[1]["key"]
    with tarfile.open(shard) as tar:
        at = tar.getmember(f"{second}.png").offset_data
    shard.write_bytes(shard.read_bytes()[:at] + bytes(64) + shard.read_bytes()[at + 64 :])
    main([conf(data=captions_of(tmp_path / "data"), num=8)])
    names = [record["key"] for record in records(data) if record["key"] != second]
    assert [line["key"] for line in captions(tmp_path, "mask-plain-32")] == names
    assert read(tmp_path)["meta"]["data"]["left_out"] == 1
    assert read(tmp_path)["methods"]["mask"]["plain"]["32"]["quality"]["n"] == 7


def test_photographs_are_compared_with_their_captions(tmp_path):
    """The shipped configuration, on pictures and captions of this test."""
    lines = []
    for number, split in enumerate(["train"] * 6 + ["val"] * 2 + ["test"] * 4):
        Image.new("RGB", (20, 30), (number * 20, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "captions": ["A red thing.", "One thing."], "split": split})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = {"images": str(tmp_path), "annotations": str(tmp_path / "captions.jsonl")}
    sizes = {"image_size": 48, "vocab_size": 300, "response_length": 64}
    Photos(out=str(tmp_path / "photos"), **files, **sizes, prompt="What is it?").run()
    write_model(tmp_path / "mask", Codec.load(tmp_path / "photos" / "tokenizer"))
    settings = [f"models.mask={tmp_path / 'mask'}", "models.stage1=null", "models.stage2=null"]
    settings += [f"data.path={tmp_path / 'photos'}", "data.image_size=48", f"out={tmp_path / 'out'}"]
    main(["conf=evaluate_photos", *(f"evaluate.{line}" for line in [*settings, "tokens_per_step=[32]"])])
    stats = read(tmp_path)["methods"]["mask"]["refine"]["32"]
    (line, *_) = captions(tmp_path, "mask-refine-32")
    assert stats["word_f1"]["n"] == stats["bleu"]["n"] == 4
    record = {"captions": [{"text": text} for text in lines[0]["captions"]]}
    assert line["scores"]["word_f1"] == ReferenceOverlap().score(line["text"], record)["word_f1"]


def test_a_rerun_does_only_what_is_missing_or_has_changed(conf, data, models, tmp_path, capsys):
    codec, mine = Codec.load(data / "tokenizer"), tmp_path / "mine"
    config = json.loads((write_model(mine, codec, seed=5) / "config.json").read_text())
    weights = load_file(mine / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["lm_head.weight"] * math.inf}, mine / "model.safetensors")
    names = {"models": {"mask": str(models / "mask"), "mine": str(mine)}}
    assert "has NaN or infinite values" in refusal(main, [conf(**names)], capsys)  # after the cells of the first model
    first = inodes(tmp_path)
    assert set(first) == {"mask-plain-32", "mask-refine-32"} and list(read(tmp_path)["methods"]) == ["mask"]
    save_file(weights, mine / "model.safetensors")
    (mine / "config.json").write_text(json.dumps({**config, "decoder": {**config["decoder"], "num_hidden_layers": 2}}))
    assert "does not match its config" in refusal(main, [conf(**names)], capsys)  # before any cell
    (mine / "config.json").write_text(json.dumps(config))
    main([conf(**names)])
    second = inodes(tmp_path)
    write_model(mine, codec, seed=6)
    (tmp_path / "out" / "captions" / "mask-plain-32.jsonl").write_text("")
    main([conf(**names, tokens_per_step=[16, 32])])
    third = inodes(tmp_path)
    assert len(third) == 8
    kept = [first["mask-refine-32"] == cells["mask-refine-32"] for cells in (second, third)]
    assert all(kept) and first["mask-plain-32"] == second["mask-plain-32"]
    assert {name for name in second if second[name] != third[name]} == second.keys() - {"mask-refine-32"}
    main([conf(**names, seed=1), "evaluate.models.mine=null", f"+evaluate.models.more={mine}"])
    assert all(inodes(tmp_path)[name] != third[name] for name in first)
    assert set(read(tmp_path)["meta"]["cells"]) == {*first, "more-plain-32", "more-refine-32"}


def test_code_that_makes_the_numbers_makes_them_stale(tmp_path):
    for package in ("src", "datamodules"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    hashes = [code_hash(tmp_path)]
    assert hashes == [code_hash(ROOT)]
    for path in ("src/evaluate.py", "src/evaluation/cells.py", "src/metrics/text.py", "datamodules/loader.py"):
        with (tmp_path / path).open("a") as file:
            file.write("\n# changed\n")
        hashes.append(code_hash(tmp_path))
    assert len(set(hashes)) == len(hashes)


def test_nan_is_null_on_disk_and_nan_again_for_a_rerun(tmp_path):
    cell, nothing = Cell("m", "plain", 1), {"mean": math.nan, "se": None, "n": 0}
    signatures = {"signatures": {cell: "s"}, "model_signatures": {"m": "b"}}
    store = ResultStore(tmp_path, {}, **signatures)
    store.add(cell, {"rings": nothing}, [{"key": "a", "text": "C\u2028C", "scores": {"rings": math.nan, "valid": 1.0}}])
    store.add_model_stats("m", {"nelbo": nothing})
    strict = lambda text: json.loads(text, parse_constant=pytest.fail)  # noqa: E731
    written = strict((tmp_path / "results.json").read_text())
    assert written["methods"]["m"]["plain"]["1"]["rings"] == {"mean": None, "se": None, "n": 0}
    assert written["model_stats"]["m"]["nelbo"]["mean"] is None
    assert strict((tmp_path / "captions" / f"{cell.file}.jsonl").read_text())["scores"]["rings"] is None
    again = ResultStore(tmp_path, {}, **signatures)
    assert math.isnan(again.table[cell]["rings"]["mean"]) and math.isnan(again.model_stats["m"]["nelbo"]["mean"])
    (line,) = again.captions(cell)
    assert math.isnan(line["scores"]["rings"]) and line["scores"]["valid"] == 1.0 and line["text"] == "C\u2028C"


def settings_of(sampler: Sampler) -> dict:
    """What a sampler does besides its speed, as values that can be compared."""
    reviser = sampler.reviser and (type(sampler.reviser), vars(sampler.reviser))
    return {**vars(sampler), "reviser": reviser, "tokens_per_step": None, "steps": None}


def completed(*argv: str) -> dict:
    return complete(plain(load_config(list(argv)).evaluate))


def test_a_sampler_by_name_is_that_of_generate_with_the_response_length_of_the_data(conf, models):
    for name in ("plain", "refine"):  # the shipped ones stand in full in conf/evaluate.yaml
        shipped = build(completed("conf=evaluate")["samplers"][name])
        assert settings_of(shipped) == settings_of(build(load_part("sampler", name)))
    samplers = completed(conf(), "evaluate.samplers.refine=refine", "+evaluate.samplers.mine=released")["samplers"]
    for name, file in (("refine", "refine"), ("mine", "released")):
        argv = [f"model.path={models / 'mask'}", "images=i", f"sampler={file}", f"length={LENGTH}"]
        generates = sampler_of(load_config(["conf=generate", *argv]))
        assert settings_of(build(samplers[name])) == settings_of(generates)
        assert load_part("sampler", file)["length"] != LENGTH
    assert samplers["plain"] == PLAIN


def test_the_command_line_changes_the_shipped_grid():
    changes = ["evaluate.grid.proseco.reviser.passes=[3]", "evaluate.grid.threshold=null"]
    changes += ["evaluate.samplers.refine=null", "+evaluate.grid.remdm_conf.reviser={compensate: [false, true]}"]
    samplers = completed("conf=sweep", "evaluate.models.model=m", *changes)["samplers"]
    expected = {"remdm_conf[temperature=1.0,compensate=true]", "threshold", "proseco[every=1]", "proseco[every=2]"}
    assert expected <= set(samplers)
    assert samplers["proseco[every=2]"]["reviser"]["passes"] == 3
    assert not [name for name in samplers if name.startswith(("refine", "threshold["))]
    assert {node["length"] for node in samplers.values()} == {64}


GRID = {"samplers": SWEEP["samplers"], "tokens_per_step": [16, 24]}
JUDGE = {"target": "src.metrics.perplexity.GenerativePerplexity", "model": "nowhere"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"models": {"mask": None}}, "evaluate.models and evaluate.samplers: one of each must be left"),
        ({"samplers": {"plain": "plane"}}, "no configuration 'sampler/plane'; did you mean 'sampler/plain'?"),
        ({"samplers": {"plain": {**PLAIN, "reviser": "OverwriteAll"}}}, "samplers.plain.reviser: expected"),
        ({**GRID, "grid": {"prosec": {}}}, "there is no sampler 'prosec'; did you mean 'proseco'"),
        ({**GRID, "grid": {"proseco": {"reviser": {"passe": [1]}}}}, "no option 'reviser.passe'; did you mean 'rev"),
        ({**GRID, "grid": {"plain": {"temperature": 1}}}, "evaluate.grid.plain.temperature: expected a list of plain"),
        ({**GRID, "grid": {"plain": {"temperature": [0, -1]}}}, "temperature must be at least 0, got -1"),
        ({**GRID, "grid": {"plain": {"tokens_per_step": [49]}}}, "or its own speeds in evaluate.grid.plain.tokens_per"),
        ({**GRID, "grid": {"plain": {"steps": [8]}}}, "the steps follow from tokens_per_step"),
        ({"curve": {"metric": "quality", "best": "most"}}, "got {'metric': 'quality', 'best': 'most'}"),
        ({"bound": {"draws": "many"}}, "draws: expected int, got 'many'"),
        ({"metrics": [JUDGE]}, "nowhere is not a causal language model with a tokenizer"),
        ({"metrics": [{"target": "src.metrics.answer.ExactMatch"}]}, "has no answer after ####"),
    ],
)
def test_mistakes_are_one_error_before_anything_runs(changed, words, conf, tmp_path, capsys):
    assert words in refusal(main, [conf(**changed)], capsys)
    assert not (tmp_path / "out").exists()


def test_all_missing_models_are_listed_with_the_command_that_trains_them(conf, models, monkeypatch, tmp_path, capsys):
    folders = {"mine": "elsewhere/model", "mask": str(models / "mask"), "other": "runs/stage1/model"}
    assert refusal(main, [conf(models=folders)], capsys).splitlines() == [
        "error: no model 'mine' in elsewhere/model",
        "  no model 'other' in runs/stage1/model: train it with `python -m src.train conf=stage1`",
        "  or set evaluate.models.NAME to another model folder or to null",
    ]


def test_names_of_metrics_and_cells_and_tokenizers_are_checked(conf, models, tmp_path, capsys):
    argv = [conf(headline=["qualty"])]
    assert "evaluate.headline: no metric qualty; there are coverage" in refusal(main, argv, capsys)
    assert "evaluate.curve: no metric qualty" in refusal(main, [conf(curve={"metric": "qualty"})], capsys)
    names = {"m": str(models / "mask"), "m-x": str(models / "mask")}
    message = refusal(main, [conf(models=names, samplers={"x-y": PLAIN, "y": PLAIN})], capsys)
    assert "two cells of the evaluation have the same name" in message
    other = write_model(tmp_path / "other", Codec.train(["another vocabulary"], vocab_size=40))
    message = refusal(main, [conf(models={"mask": str(models / "mask"), "other": str(other)})], capsys)
    assert "tokenizers: mask, other" in message


def test_the_curve_is_that_of_the_results(conf, models, tmp_path, capsys):
    main([conf(**SWEEP, models={"m": str(models / "mask")})])
    methods, curve = read(tmp_path)["methods"], read(tmp_path, "curve")
    cells = [(s, n) for s in ("plain", "proseco[passes=1]", "proseco[passes=2]") for n in ("16", "24")]
    assert [(p["sampler"], str(p["tokens_per_step"])) for p in curve["points"]] == cells
    for point, (sampler, speed) in zip(curve["points"], cells, strict=True):
        stats = methods["m"][sampler][speed]
        assert [point[name] for name in ("forwards", "seconds", "value")] == [
            stats[name] for name in ("forwards", "seconds", "quality")
        ]
        calls = [line["scores"]["forwards"] for line in captions(tmp_path, f"m-{sampler}-{speed}")]
        assert point["forwards"]["mean"] == statistics.mean(calls) and len(calls) == NUM
    assert [methods["m"][name]["16"]["forwards"]["mean"] for name in ("plain", "proseco[passes=1]")] == [3, 6]
    assert Image.open(tmp_path / "out" / "curve.png").size > (400, 300)
    assert not (tmp_path / "out" / "quality.png").exists()
    assert "| calls up to: best quality | cell " in capsys.readouterr().out


def test_the_bound_of_a_model_is_done_once(conf, data, models, tmp_path, capsys):
    settings = {"models": {"m": str(models / "mask")}, "samplers": {"plain": PLAIN}}
    main([conf(**settings, bound={"draws": 3})])
    codec, backbone = Codec.load(data / "tokenizer"), from_pretrained(models / "mask").eval()
    with torch.no_grad():
        nats = response_nats(backbone, first_batch(data, codec), special=codec.special, draws=3, seed=0)
    bound = read(tmp_path)["model_stats"]["m"]
    assert bound["nelbo"]["mean"] == pytest.approx(float(nats.mean()) / LENGTH, rel=1e-5)
    assert "| bound per token | nelbo " in capsys.readouterr().out
    cells = inodes(tmp_path)
    main([conf(**settings, bound={"draws": 3}, headline=["coverage"])])
    assert read(tmp_path)["model_stats"]["m"] == bound
    main([conf(**settings, bound={"draws": 4})])  # another bound, the same cells
    assert inodes(tmp_path) == cells
    assert read(tmp_path)["model_stats"]["m"]["nelbo"] != bound["nelbo"]
