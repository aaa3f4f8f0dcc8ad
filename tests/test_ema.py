"""The average of the weights: its closed form, where it is used, and that no stop, kill or change of ranks loses it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from callbacks.checkpoint import AtomicCheckpointIO
from callbacks.ema import EMA
from callbacks.stop import SaveAndStop
from src.cli.signals import Stop, Stopped
from src.distributed.checkpoints import read_full
from src.distributed.parallel import Sharding, full_tensor
from src.export import main as export
from src.models.hf.folder import fingerprint
from src.models.hf.weights import model_state
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim
from src.train import main
from tests.test_objectives import QUIET, Flawed, batch_with_prompt, make, tiny_backbone
from tests.test_stop import arguments, stage_two

ROOT = Path(__file__).parents[1]
EVERY = Optim(lr=1e-2, warmup_steps=1, decay=0.0, micro_batch=2, sharding=Sharding(reshard=False))


class Watch(L.Callback):
    """The weights after each step, and the loss of each validation."""

    def __init__(self) -> None:
        self.weights: dict[int, torch.Tensor] = {}
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.weights[trainer.global_step] = flat(pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        self.losses.append(float(trainer.callback_metrics["val/loss"]))


def flat(module) -> torch.Tensor:
    return torch.cat([full_tensor(p.detach()).flatten() for p in module.parameters()])


def fit(objective, ema: EMA, *more: L.Callback, steps: int, rank: int = 0, world: int = 1, ckpt=None, **options):
    """Epochs of two steps, each with a validation, on the rows of one rank. Returns the trainer and the average."""
    rows = batch_with_prompt(8).rows(slice(rank * 8 // world, (rank + 1) * 8 // world))
    train, val = DataLoader([rows] * 2, batch_size=None), DataLoader([rows] * 2, batch_size=None)
    options = {**QUIET, "accelerator": "cpu", "devices": world, "num_sanity_val_steps": 0, **options}
    options |= {"use_distributed_sampler": False, "plugins": [AtomicCheckpointIO()] if world == 1 else None}
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, callbacks=[ema, *more], **options)
    trainer.fit(objective, train, val, ckpt_path=ckpt)
    return trainer, torch.cat([full_tensor(tensor).flatten() for tensor in ema.average.values()])


@pytest.mark.parametrize("decay", [0.9999, 0.22])  # less than the warm-up's from the second step on
def test_the_average_is_that_of_the_closed_form(decay):
    """A weighted sum of the weights after each step that was taken; the second and third batch have no step."""
    watch, ema = Watch(), EMA(decay=decay)
    _, average = fit(make(Flawed, optim=EVERY), ema, watch, steps=4)
    weights = [flat(tiny_backbone(attention="prefix")), *(watch.weights[step] for step in (1, 2, 3, 4))]
    decays = [min(decay, share) for share in (2 / 11, 3 / 12, 4 / 13, 5 / 14)]
    expected = torch.zeros_like(average, dtype=torch.float64)
    for number, values in enumerate(weights):
        share = 1 - decays[number - 1] if number else 1.0
        for later in decays[number:]:
            share *= later
        expected += share * values
    assert ema.num_updates == 4
    torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)
    assert (average - weights[-1]).abs().max() > 1e-3


def test_validation_has_the_average_and_training_does_not():
    """Also a validation that fails."""
    watches = [Watch(), Watch()]
    objectives = [make(MaskPrediction, optim=EVERY) for _ in watches]
    for watch, objective, use_for in zip(watches, objectives, (["evaluate"], []), strict=True):
        trainer, average = fit(objective, EMA(decay=0.9, use_for=use_for), watch, steps=4)
    assert torch.equal(watches[0].weights[4], watches[1].weights[4])
    assert torch.equal(flat(objectives[0]), watches[0].weights[4])
    torch.nn.utils.vector_to_parameters(average, objectives[1].parameters())
    trainer.validate(objectives[1], DataLoader([batch_with_prompt(8)], batch_size=None), verbose=False)
    assert watches[0].losses[-1] == pytest.approx(watches[1].losses[-1], rel=1e-6)  # its last one is that of `validate`
    assert watches[0].losses[-1] != pytest.approx(watches[1].losses[-2], rel=1e-4)

    class Failing(MaskPrediction):
        def validation_step(self, batch, batch_idx):
            raise KeyError("no such thing")

    objective, watch = make(Failing, optim=EVERY), Watch()
    with pytest.raises(KeyError, match="no such thing"):
        fit(objective, EMA(decay=0.9), watch, steps=4)
    assert torch.equal(flat(objective), watch.weights[2])


class Interrupted(MaskPrediction):
    """Gets a signal in its first validation."""

    def validation_step(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return super().validation_step(batch, batch_idx)


def test_a_stop_in_validation_loses_nothing(tmp_path):
    watch = Watch()
    _, whole = fit(make(MaskPrediction, optim=EVERY), EMA(decay=0.9), watch, steps=6)
    with Stop() as stop, pytest.raises(Stopped):
        fit(make(Interrupted, optim=EVERY), EMA(decay=0.9), SaveAndStop(stop=stop, run_dir=tmp_path), steps=6)
    (path,) = (tmp_path / "checkpoints").glob("stopped-step=2.ckpt")
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(torch.cat([tensor.flatten() for tensor in stored.values()]), watch.weights[2])
    objective = make(MaskPrediction, optim=EVERY)
    _, average = fit(objective, EMA(decay=0.9), steps=6, ckpt=path)
    assert torch.equal(flat(objective), watch.weights[6])
    assert torch.equal(average, whole)


# --- several ranks ------------------------------------------------------------------------------------------------


def on_rank(folder: Path, rank: int) -> None:
    """Two ranks that share the model: straight on, over a checkpoint of their own, and over one of a single process."""
    from src.training.strategy import FSDP2

    ends = {}
    for name, steps, ckpt in [
        ("straight", 4, None),
        ("half", 2, None),
        ("resumed", 4, folder / "half.ckpt"),
        ("from-one", 4, folder / "one.ckpt"),
    ]:
        objective, ema = make(MaskPrediction, optim=EVERY), EMA(decay=0.9)
        trainer, average = fit(
            objective, ema, steps=steps, rank=rank, world=2, ckpt=ckpt, strategy=FSDP2(), logger=False
        )
        shard = sum(tensor.to_local().untyped_storage().nbytes() for tensor in ema.average.values())
        ends[name] = {"weights": flat(objective), "average": average, "updates": ema.num_updates, "bytes": shard}
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    torch.save(ends, folder / f"ends-{rank}")


SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_ema import on_rank

on_rank(Path({folder!r}), int(os.environ.get("LOCAL_RANK", 0)))
"""


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_share_the_average_and_checkpoints_go_from_one_to_many_and_back(tmp_path):
    """Parameters stay gathered after the validation (reshard=False), as which training must not take the average."""
    one, half = make(MaskPrediction, optim=EVERY), make(MaskPrediction, optim=EVERY)
    trainer, average = fit(one, EMA(decay=0.9), steps=4)
    trainer, _ = fit(half, EMA(decay=0.9), steps=2)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(root=str(ROOT), folder=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"ends-{rank}") for rank in (0, 1))
    for name in ("straight", "resumed", "from-one"):
        assert first[name]["updates"] == 4
        assert first[name]["bytes"] + second[name]["bytes"] == 4 * average.numel()
        for kind, expected in (("weights", flat(one)), ("average", average)):
            assert torch.equal(first[name][kind], second[name][kind])
            torch.testing.assert_close(first[name][kind], expected, rtol=1e-4, atol=2e-5)
    for kind in ("weights", "average"):
        assert torch.equal(first["resumed"][kind], first["straight"][kind])
    back = make(MaskPrediction, optim=EVERY)
    _, resumed = fit(back, EMA(decay=0.9), steps=4, ckpt=tmp_path / "half.ckpt")
    torch.testing.assert_close(flat(back), flat(one), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(resumed, average, rtol=1e-4, atol=2e-5)
    for weights, kind in (("raw", "weights"), ("ema", "average")):
        state = model_state(tmp_path / "straight.ckpt", weights=weights)
        exported = torch.cat([state[name].flatten() for name, _ in one.backbone.named_parameters()])
        assert torch.equal(exported, first["straight"][kind])
    assert read_full(tmp_path / "straight.ckpt").keys() >= {"ema", "ema_updates"}


# --- through the command line -------------------------------------------------------------------------------------


def layered(argv: list[str]) -> list[str]:
    conf, *settings = argv
    return [conf.replace(",model/tiny", ",ema,model/tiny"), *settings]


def exported(path: Path, out: Path, *settings: str) -> dict[str, torch.Tensor]:
    export(["conf=export", f"model={path}", f"out={out}", "format=own", *settings])
    return load_file(out / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_the_run_and_the_export_verb_write_the_weights_that_they_are_asked_for(scenes, tmp_path, capsys):
    argv = layered(arguments(scenes, tmp_path / "run", "trainer.max_steps=3", "optim.vision_lr=0"))
    main(argv)
    assert f"3 steps done; the model with averaged weights is in {tmp_path}/run/model;" in capsys.readouterr().out
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    raw, average = (exported(last, tmp_path / kind, f"weights={kind}") for kind in ("raw", "ema"))
    assert capsys.readouterr().out.endswith("layout own, ema weights\n")
    assert equal(average, load_file(tmp_path / "run" / "model" / "model.safetensors"))
    for name, tensor in raw.items():
        assert torch.equal(tensor, content["state_dict"][f"backbone.{name}"])
        assert torch.equal(average[name], content["ema"].get(f"backbone.{name}", tensor))
    assert {name for name in raw if f"backbone.{name}" not in content["ema"]} == {
        name for name in raw if "vision_tower" in name
    }
    assert not equal(raw, average)
    main([*argv[:1], f"run_dir={tmp_path}/two", *argv[2:], "callbacks.ema.use_for=[]"])
    assert equal(raw, load_file(tmp_path / "two" / "model" / "model.safetensors"))
    for settings, message in [
        ([], "holds the raw weights and their average: set weights=raw or weights=ema"),
        (["weights=both"], "weights must be raw, ema or null, got 'both'"),
    ]:
        with pytest.raises(SystemExit):
            exported(last, tmp_path / "none", *settings)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*argv, "callbacks.ema.decay=0.5"])
    assert (
        "holds a run with other settings (callbacks.ema.decay: 0.9999 in the run, 0.5 now)" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("use_for", "weights"), [("[draft]", "ema"), pytest.param("[evaluate,export]", "raw", marks=pytest.mark.slow)]
)
def test_rounds_are_drafted_by_the_chosen_weights(scenes, tmp_path, use_for, weights):
    """With train_from=start, weights and average go back to those before the first round."""
    argv = layered(stage_two(scenes, tmp_path / "run"))
    loop = ["callbacks.self_correction.train_from=start", "data.epoch_batches=3", "trainer.max_steps=5"]
    main([*argv, *loop, f"callbacks.ema.use_for={use_for}", "callbacks.looks=null"])
    index = json.loads((tmp_path / "run" / "rounds" / "round-0002" / "index.json").read_text())
    before = tmp_path / "run" / "checkpoints" / "pre-round-0002.ckpt"
    for kind in ("raw", "ema"):
        exported(before, tmp_path / kind, f"weights={kind}")
        assert (index["settings"]["model"] == fingerprint(tmp_path / kind)) == (kind == weights)
    updates = [
        torch.load(tmp_path / "run" / "checkpoints" / name)["ema_updates"] for name in (before.name, "last.ckpt")
    ]
    assert updates == [3, 2]
