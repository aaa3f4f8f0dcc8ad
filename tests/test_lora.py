"""Adapters: what they compute, what is stored of them, and that merging, resuming and a next stage lose nothing."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.evaluate import main as evaluate
from src.export import main as export
from src.generate import main as generate
from src.io.errors import UserError
from src.models.hf.folder import fingerprint, from_pretrained, save_pretrained
from src.models.hf.weights import weight_files
from src.models.lora import LoRA
from src.objectives.base import Objective
from src.objectives.mask import MaskPrediction
from src.text.tokenizer import Codec
from src.train import main as train
from tests.adapters import with_adapters
from tests.ranks import ROOT, Ranks
from tests.test_export import config, state
from tests.test_objectives import batch_with_prompt, gradients, make, means, tiny_backbone
from tests.test_processes import scenes as photos  # noqa: F401 - a fixture
from tests.test_processes import stage2
from tests.test_stop import arguments

LAYERS = LoRA(rank=3, alpha=6.0, decoder=("q_proj", "down_proj"), vision=("k_proj", "fc2"), projector=True)


def logits(model, batch, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(model.encode_prefix(batch), tokens)


def disturbed(model):
    """The model with matrices B that are not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def test_a_layer_computes_the_formula_and_trains_nothing_but_its_adapter():
    model = with_adapters(tiny_backbone(), LoRA(rank=2, alpha=6.0, decoder=("up_proj",)), seed=1)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(4, 16)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 3 * (x @ down.T @ up.T))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4 and all(".mlp.up_proj.lora_" in name for name in trained)
    objective: Objective = make(MaskPrediction, backbone=lambda: model)
    means(objective, batch_with_prompt())
    assert gradients(objective).numel() == 2 * (2 * 16 + 2 * 32)
    assert objective.state_dict().keys() == {f"backbone.{name}" for name in trained}
    fresh = with_adapters(tiny_backbone(), LoRA())
    batch, tokens = batch_with_prompt().prefix, batch_with_prompt().response
    assert torch.equal(logits(fresh, batch, tokens), logits(tiny_backbone(), batch, tokens))


def test_peft_reads_the_folder_of_an_adapter(tmp_path):
    """Its own loader, on the base without our code."""
    from peft import PeftModel

    codec = Codec.train(["a red ring user Describe assistant"], vocab_size=60)
    save_pretrained(tiny_backbone(vocab_size=60), codec, tmp_path / "base")
    lora = LoRA(rank=2, decoder=("q_proj", "up_proj"), train=("lm_head",))
    model = disturbed(from_pretrained(tmp_path / "base", lora=lora))
    with torch.no_grad():
        model.lm_head.weight += 0.1
    save_pretrained(model, codec, tmp_path / "adapter")
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert len(names) == 9 and "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight" in names
    batch, tokens = batch_with_prompt().prefix, batch_with_prompt().response
    theirs = PeftModel.from_pretrained(from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")).base_model.model
    expected = logits(theirs, batch, tokens)
    again = from_pretrained(tmp_path / "adapter", codec=codec)
    torch.testing.assert_close(logits(again, batch, tokens), expected)
    assert fingerprint(again) == fingerprint(model) == fingerprint(tmp_path / "adapter")
    assert (expected - logits(tiny_backbone(vocab_size=60), batch, tokens)).abs().max() > 0.05
    # It may be trained further with another dropout.
    further = from_pretrained(tmp_path / "adapter", lora=replace(lora, dropout=0.5))
    assert further.model.layers[0].mlp.up_proj.lora_dropout["default"].p == 0.5
    # The base must be there, and be the same.
    save_pretrained(disturbed(model), codec, tmp_path / "other")
    save_pretrained(tiny_backbone(vocab_size=60, hidden_size=32), codec, tmp_path / "base")
    with pytest.raises(UserError, match=r"other weights than those that are in .*base now"):
        from_pretrained(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="is an adapter, and its base cannot be read"):
        from_pretrained(tmp_path / "other")


def test_an_original_with_a_merged_adapter_computes_the_same_in_every_layout(golden, golden_folder_v, tmp_path):
    vision = golden.meta["vision_config"]
    model = disturbed(from_pretrained(golden_folder_v, vision=vision, dtype="float32", lora=LAYERS))
    adapter = tmp_path / "adapter"
    save_pretrained(model, Codec.load(golden_folder_v), adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    tokens = torch.tensor([[9, 10, 11, 12, 13]])
    expected = logits(model, {"prompt_ids": ids}, tokens)
    for form in ("own", "llada_v"):
        out = tmp_path / form
        export(["conf=export", f"model={adapter}", f"out={out}", f"format={form}", "dtype=float32"])
        merged = from_pretrained(out)
        torch.testing.assert_close(logits(merged, {"prompt_ids": ids}, tokens), expected, rtol=1e-4, atol=1e-5)
        assert merged.lora is None
    assert config(tmp_path / "llada_v") == {
        **config(golden_folder_v),
        "torch_dtype": "float32",
        "vision_config": {k: v for k, v in vision.items() if k in config(tmp_path / "llada_v")["vision_config"]},
    }
    before, after = state(golden_folder_v), state(tmp_path / "llada_v")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor.float(), after[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {
        *("q_proj", "down_proj", "k_proj", "fc2", "0", "2")
    }


def test_rounding_that_loses_an_adapter_is_reported(golden_folder_text, tmp_path, capsys, caplog):
    """The weights are bfloat16, the change is a thousandth of their spacing."""
    model = from_pretrained(golden_folder_text, lora=LoRA(rank=1, alpha=1e-4))
    save_pretrained(disturbed(model), Codec.train(["a"], vocab_size=60), tmp_path / "adapter")
    export(["conf=export", f"model={tmp_path / 'adapter'}", f"out={tmp_path / 'out'}", "format=llada"])
    assert "rounds the weights by 100 % of what the adapter changes: dtype=float32" in caplog.text
    before, after = state(golden_folder_text), state(tmp_path / "out")
    same = torch.cat([(tensor == after[name]).flatten() for name, tensor in before.items()])
    assert same.float().mean() > 0.99


# --- through the command line -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(scenes, finished, tmp_path_factory) -> Path:
    """The folder of a run that has trained adapters, with dropout and an average."""
    run_dir = tmp_path_factory.mktemp("adapters") / "run"
    train(lora_arguments(scenes, finished, run_dir))
    return run_dir


def lora_arguments(scenes: Path, finished: Path, run_dir: Path, *more: str, conf: str = "mask,lora,ema") -> list[str]:
    """A run that starts from the model of another one."""
    argv = [argument for argument in arguments(scenes, run_dir, conf=conf) if not argument.startswith("model.")]
    argv[0] = f"conf={conf}"
    steps = ["trainer.max_steps=4", "data.workers=0", "callbacks.checkpoint.every_n_train_steps=2"]
    settings = ["model.lora.rank=2", "model.lora.dropout=0.3", "model.lora.projector=true"] * ("lora" in conf)
    return [*argv, f"model.path={finished}/model", *steps, *settings, "callbacks.ema.decay=0.5", *more]


def test_checkpoints_and_models_hold_nothing_but_adapters(adapter, finished):
    content = torch.load(adapter / "checkpoints" / "last.ckpt", weights_only=True)
    names = content["state_dict"].keys()
    assert names == content["ema"].keys() and len(content["optimizer_states"][0]["state"]) == len(names)
    assert all(".lora_" in name for name in names) and any("mm_projector" in name for name in names)
    (file,) = weight_files(adapter / "model")
    assert file.name == "adapter_model.safetensors" and len(load_file(file)) == len(names)
    assert config(adapter / "model")["lora"]["base"] == f"{finished}/model"
    assert (adapter / "checkpoints" / "last.ckpt").stat().st_size < 200_000


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(adapter, scenes, finished, tmp_path, monkeypatch):
    step = Objective.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, batch_idx)

    argv = lora_arguments(scenes, finished, tmp_path / "run")
    monkeypatch.setattr(Objective, "training_step", interrupted)
    with pytest.raises(SystemExit):
        train(argv)
    monkeypatch.setattr(Objective, "training_step", step)
    train(argv)
    one, other = (load_file(run / "model" / "adapter_model.safetensors") for run in (adapter, tmp_path / "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_and_its_model_export_the_same(adapter, tmp_path, capsys):
    """The model has the average, as `use_for` has `export`."""
    last = adapter / "checkpoints" / "last.ckpt"
    export(["conf=export", f"model={last}", f"out={tmp_path / 'ema'}", "format=own", "weights=ema"])
    export(["conf=export", f"model={last}", f"out={tmp_path / 'raw'}", "format=own", "weights=raw"])
    export(["conf=export", f"model={adapter / 'model'}", f"out={tmp_path / 'model'}", "format=own"])
    moved = shutil.copy(last, tmp_path / "moved.ckpt")
    like = [f"like={adapter / 'model'}", "format=own", "weights=ema"]
    export(["conf=export", f"model={moved}", f"out={tmp_path / 'moved'}", *like])
    prints = {name: fingerprint(tmp_path / name) for name in ("ema", "raw", "model", "moved")}
    assert prints["ema"] == prints["model"] == prints["moved"] != prints["raw"]


def test_adapters_are_used_like_models(adapter, scenes, finished, tmp_path, capsys):
    """Captions of base, adapter and the same merged; a stage that trains the adapter further; and what is refused."""
    export(["conf=export", f"model={adapter / 'model'}", f"out={tmp_path / 'merged'}", "format=own"])
    texts = []
    for model in (adapter / "model", tmp_path / "merged"):
        out = tmp_path / f"{model.name}.jsonl"
        generate(["conf=generate", f"model.path={model}", f"images={scenes}/test", f"out={out}", "num=3"])
        texts.append([json.loads(line)["text"] for line in out.read_text().splitlines()])
    assert texts[0] == texts[1] and len(texts[0]) == 3
    models = {"base": finished / "model", "one": adapter / "model", "two": tmp_path / "merged"}
    named = [f"+evaluate.models.{name}={folder}" for name, folder in models.items()]
    off = [f"evaluate.models.{name}=null" for name in ("mask", "stage1", "stage2")]
    small = ["evaluate.num=4", "evaluate.tokens_per_step=[8]", "evaluate.looks=null", "evaluate.samplers.refine=null"]
    data = [f"evaluate.data.path={scenes}", "evaluate.data.response_length=40", f"evaluate.out={tmp_path / 'table'}"]
    evaluate(["conf=evaluate", *named, *off, *small, *data])
    captions = {
        name: (tmp_path / "table" / "captions" / f"{name}-plain-8.jsonl").read_text().splitlines() for name in models
    }
    written = {name: [json.loads(line)["text"] for line in lines] for name, lines in captions.items()}
    assert written["one"] == written["two"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(lora_arguments(scenes, adapter, tmp_path / "full", conf="mask,ema"))
    assert "is an adapter: train it further with conf=...,lora" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(lora_arguments(scenes, adapter, tmp_path / "rank", "model.lora.rank=4"))
    assert "other settings than model.lora (rank: 2 in the folder, 4 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.lora.decoder=[query]"], "model.lora.decoder: the model has no query, only down_proj, gate_proj"),
        (["model.lora.train=[head]"], "model.lora.train: the model has no 'head', as it has lm_head or"),
        (["model.lora.train=[vision.mm_projector]"], "vision.mm_projector.0 has an adapter, too"),
        (["model.lora.decoder=[]", "model.lora.projector=false"], "no layer has an adapter"),
        (["model.lora.rank=0"], "rank must be at least 1"),
        (["gap=<|startoftext|>"], "add model.embed_tokens and lm_head to model.lora.train"),
        (["trainer.precision=bf16-true"], "would train adapters in 16 bits: use bf16-mixed"),
        (["model.dtype=bfloat16"], "trainer.precision=32-true: use bf16-mixed, or model.dtype=float32"),
    ],
)
def test_mistakes_are_explained(scenes, finished, tmp_path, capsys, settings, message):
    with pytest.raises(SystemExit):
        train(lora_arguments(scenes, finished, tmp_path / "run", *settings))
    assert message in capsys.readouterr().err


def test_merging_needs_no_rounding_where_the_sum_is_exact():
    lora = LoRA(rank=1, alpha=1.0, decoder=("q_proj",), train=("lm_head",))
    state = {
        "lm_head.weight": torch.ones(2, 2),
        "a.base_layer.weight": torch.eye(2, dtype=torch.bfloat16),
        "a.lora_A.default.weight": torch.tensor([[1.0, 0.0]]),
        "a.lora_B.default.weight": torch.tensor([[2.0], [2.0**-12]]),
    }
    merged, lost = lora.merge(state)
    assert merged["a.weight"].tolist() == [[3.0, 0.0], [2.0**-12, 1.0]] and lost == 0
    assert merged["lm_head.weight"].dtype == torch.bfloat16  # of the base, as a model has one dtype
    exact, _ = replace(lora, alpha=2.0).merge(state, torch.float32)
    assert exact["a.weight"].tolist() == [[5.0, 0.0], [2.0**-11, 1.0]]
    state["a.lora_B.default.weight"] = torch.tensor([[2.0**-12], [0.0]])  # below half the spacing at 1
    assert lora.merge(state)[1] == 1.0


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_that_share_a_bfloat16_base_train_float32_adapters_online(photos, tmp_path):  # noqa: F811
    """Stage II: drafts by base and adapter; a kill loses nothing; one process can go on, and export."""
    base = tmp_path / "base"
    export(["conf=export", f"model={ROOT}/assets/base", f"out={base}", "format=own", "dtype=bfloat16"])
    layers = "stage2,parallel/fsdp2,lora"

    def argv(name: str, *more: str) -> list[str]:
        settings = [f"model.path={base}", "trainer.precision=bf16-mixed", "model.lora.train=[vision.mm_projector]"]
        _, *others = stage2(photos, tmp_path / name, "model.lora.rank=2", *more)
        return [f"conf={layers}", *(s for s in others if not s.startswith("model.path")), *settings]

    with Ranks() as ranks:
        assert ranks.run(argv("whole"), out=tmp_path / "1").codes == [0, 0]
        kill = [(1, "src.objectives.base:Objective.training_step", 5)]
        assert -signal.SIGKILL in ranks.run(argv("killed"), out=tmp_path / "2", kill=kill).codes
        assert ranks.run(argv("killed"), out=tmp_path / "3").codes == [0, 0]
    whole, killed = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in whole.items() if "lora_B" in name)
    last = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    for model in (last, tmp_path / "whole" / "model"):
        export(["conf=export", f"model={model}", f"out={tmp_path / model.name}-out", "format=own", "dtype=float32"])
    assert fingerprint(tmp_path / "last.ckpt-out") == fingerprint(tmp_path / "model-out")
