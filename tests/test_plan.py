"""The plan of memory against closed forms, against what a real step saves, and through the command line."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from src.diffusion import corruption
from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.models.hf.folder import outline
from src.models.llada_v import LLaDAV
from src.models.lora import LoRA
from src.models.tiling import anyres
from src.objectives.base import Setup
from src.objectives.mask import MaskPrediction
from src.objectives.optim import Optim, init_state
from src.objectives.proseco import ProSeCo
from src.objectives.revision import RevisionObjective
from src.text.tokenizer import Codec
from src.train import main
from src.training.memory_plan import (
    ACTIVATIONS,
    ADAPTERS,
    AVERAGE,
    GATHERED,
    GRADIENTS,
    IN_USE,
    LOGITS,
    PARAMETERS,
    PHASES,
    RAW,
    REDUCED,
    STATES,
    TEMPORARY,
    Plan,
    measure,
)
from src.types import Batch, SpecialIds
from tests.adapters import with_adapters
from tests.test_objectives import means

ROOT = Path(__file__).parents[1]
VOCABULARY, WIDTH, MLP, LAYERS, HEADS, KEY_HEADS = 50, 24, 40, 3, 4, 2
DECODER_SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": MLP}
DECODER_SIZES |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 7}
IMAGE, PROMPT, LENGTH = -200, 9, 12
SPECIAL = SpecialIds(mask=0, eos=1, eot=2, banned=(0, 1), vocab_size=VOCABULARY)
# the shapes of the weights, from the architecture
KEYS, HEAD = (WIDTH * KEY_HEADS // HEADS, WIDTH), (VOCABULARY, WIDTH)
LAYER = [(WIDTH, WIDTH), KEYS, KEYS, (WIDTH, WIDTH), (MLP, WIDTH), (MLP, WIDTH), (WIDTH, MLP), (WIDTH,), (WIDTH,)]
SHAPES = [HEAD, *LAYER * LAYERS, (WIDTH,), HEAD]  # the embedding has the shape of the head


def size(shapes: list[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def make_model(*, vision: bool = False, attention: str = "full") -> LLaDAV:
    sees = {"vision": VISION, "tiling": anyres(28).to_dict()} if vision else {"vision": None}
    return LLaDAV(decoder={**DECODER_SIZES, "attention": attention}, image_id=IMAGE, **sees)


def make_objective(model: LLaDAV, **training) -> RevisionObjective:
    options = Optim(lr=1e-3, **training)
    return RevisionObjective(Setup(backbone=lambda: model, special=SPECIAL, optim=options), hallucination="none")


def make_batch(rows: int = 1, *, vision: bool = False, prompt: int = PROMPT) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (rows, prompt), generator=generator)
    prefix = {"prompt_ids": ids}
    if vision:
        ids[:, 4] = IMAGE
        tiles = anyres(28).num_tiles((40, 30))
        prefix["pixel_values"] = torch.zeros(rows, tiles, 3, 28, 28, dtype=torch.uint8)
        prefix |= {"num_tiles": torch.full((rows, 1), tiles), "image_sizes": torch.tensor([[[40, 30]]] * rows)}
    response = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
    there, none = torch.ones_like(response, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool)
    return Batch(prefix, response, there, response, torch.zeros_like(response), none, [str(row) for row in range(rows)])


def plan_of(model: LLaDAV, batch: Batch, *, gpus: int = 1, precision: str = "32-true", **training) -> Plan:
    return measure(make_objective(model, **training), batch, gpus=gpus, precision=precision)


# what lasts


def test_what_lasts_is_that_of_the_closed_form():
    plan = plan_of(make_model(), make_batch())
    num = size(SHAPES)
    assert plan.parameters == plan.trained == num
    assert all(plan.phases[phase][PARAMETERS] == 4 * num for phase in PHASES)
    assert all(plan.phases[phase][STATES] == 8 * num + 4 * len(SHAPES) for phase in PHASES)  # 4: a count of steps
    assert plan.phases["forward"].get(GRADIENTS, 0) == 0
    assert plan.phases["optimizer"][GRADIENTS] == 4 * num
    assert plan.phases["optimizer"][TEMPORARY] == pytest.approx(4 * num, rel=0.01)  # the root of the second moments


@pytest.mark.parametrize(("gpus", "precision"), [(1, "32-true"), (2, "bf16-true")])
def test_an_average_takes_four_bytes_for_each_trained_parameter(gpus, precision):
    """In any precision; a frozen tower has none."""
    objective = make_objective(make_model(vision=True), vision_lr=0.0)
    plan = measure(objective, make_batch(vision=True), gpus=gpus, precision=precision, ema=True)
    assert plan.trained < plan.parameters
    assert {plan.phases[phase][AVERAGE] for phase in PHASES} == {4 * plan.trained // gpus}
    size = 2 if precision == "bf16-true" else 4
    in_use = plan.phases[IN_USE]  # gradients stay until the next step begins
    assert (
        in_use[RAW] == in_use[GRADIENTS] == size * plan.trained // gpus and in_use[AVERAGE] == 4 * plan.trained // gpus
    )
    assert in_use[PARAMETERS] == size * plan.parameters // gpus and IN_USE in plan.table()


def measured(objective: RevisionObjective, batch: Batch) -> dict[str, int]:
    """Bytes of what lasts over real steps."""
    optimizer = objective.make_optimizer()
    init_state(optimizer)
    means(objective, batch)
    parameters = dict(objective.named_parameters())
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    parts = [getattr(tensor, "codes", tensor) for tensor in states]
    quantized = [tensor for tensor in states if hasattr(tensor, "codes")]
    return {
        PARAMETERS: sum(p.nbytes for name, p in parameters.items() if ".lora_" not in name),
        ADAPTERS: sum(p.nbytes for name, p in parameters.items() if ".lora_" in name),
        GRADIENTS: sum(p.grad.nbytes for p in parameters.values() if p.grad is not None),
        STATES: sum(part.nbytes for part in parts) + sum(t.scale.nbytes + t.qmap.nbytes for t in quantized),
    }


LOWBIT = pytest.mark.skipif(not find_spec("torchao"), reason="needs the extra lowbit")


@pytest.mark.parametrize(
    ("lora", "dtype", "training"),
    [
        (LoRA(rank=2, alpha=4.0), torch.bfloat16, {}),
        (LoRA(rank=2, decoder=("q_proj",), vision=("fc1",), projector=True), torch.float32, {"vision_lr": 1e-4}),
        pytest.param(None, torch.bfloat16, {"states": "8bit", "rounding": "stochastic"}, marks=LOWBIT),
        pytest.param(None, torch.float32, {"states": "8bit"}, marks=LOWBIT),
    ],
)
def test_what_lasts_is_what_a_real_step_has(lora, dtype, training):
    """Parameters, adapters, gradients and states, to the byte."""

    def model() -> LLaDAV:
        base = make_model(vision=True).to(dtype)
        if lora is None:
            return base
        adapted = with_adapters(base, lora)
        for name, parameter in adapted.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if lora.is_float32(name) else dtype)
        return adapted

    batch = make_batch(vision=True)
    precision = "bf16-mixed" if lora else "32-true"
    plan = plan_of(model(), batch, precision=precision, **training)
    with torch.autocast("cpu", torch.bfloat16, enabled=lora is not None):
        expected = measured(make_objective(model(), **training), batch)
    assert {row: plan.phases["optimizer"][row] for row in expected} == expected


@pytest.mark.parametrize("gpus", [2, 3])
def test_gpus_share_what_lasts_and_hold_whole_blocks_for_a_moment(gpus):
    one, plan = plan_of(make_model(), make_batch()), plan_of(make_model(), make_batch(), gpus=gpus)
    num = size(SHAPES)
    assert plan.parameters == num
    assert plan.phases["saved"][PARAMETERS] == plan.phases["saved"][GRADIENTS] == 4 * num // gpus
    assert plan.phases["saved"][STATES] == (8 * num + 4 * len(SHAPES)) // gpus
    assert plan.total("optimizer") == pytest.approx(5 * 4 * num / gpus, rel=0.05)
    block, ends = size(LAYER), size([HEAD])
    two = sum(sorted([*[block] * LAYERS, ends, ends])[-2:])
    assert plan.phases["forward"][GATHERED] == plan.phases["backward"][GATHERED] == 4 * two
    assert plan.phases["backward"][REDUCED] == 4 * max(block, ends)
    for row in (ACTIVATIONS, LOGITS):
        assert plan.phases["saved"][row] == one.phases["saved"][row] > 0


# what a pass saves


def really_saved(objective: RevisionObjective, batch: Batch) -> int:
    """Bytes that a real step keeps between the two passes of its last view, but for parameters and the batch.

    By PyTorch's hooks: what the graphs of the prefix and of the last view save. Beside these the prefix itself, which
    all views read, and the gradients of earlier views with respect to it.
    """
    noise, state = Noise(batch.keys, seed=0), corruption.start(batch, torch.ones(len(batch)))
    views = [objective.corruption(batch, state, noise) for _ in range(objective.optim.views)]
    given = [*objective.parameters(), *batch.prefix.values(), batch.response, batch.editable, batch.flawed, batch.span]
    given += [tensor for view in views for tensor in (view.tokens, view.target, view.kind, view.rate)]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved: dict[str, dict[int, torch.UntypedStorage]] = {"prefix": {}, "view": {}}
    graph, read = "prefix", []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[graph][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def before_view(_, inputs):
        nonlocal graph
        prefix, graph = inputs[0], "view"
        saved["view"] = {}
        read[:] = [tensor for pair in prefix.cache or () for tensor in pair] or [prefix.embeds]
        for tensor in (*read, prefix.embeds):
            saved["prefix"][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    objective.backbone.register_forward_pre_hook(before_view)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        objective.forward_backward(batch, views, objective.denominators([(batch, views)]))
    storages = {address: storage for graph in saved.values() for address, storage in graph.items()}
    gradients = sum(tensor.nbytes for tensor in read) if len(views) > 1 else 0
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known) + gradients


@pytest.mark.parametrize(
    ("attention", "vision", "views", "vision_lr"),
    [("full", False, 1, None), ("prefix", False, 2, None), ("full", True, 2, 0.0), ("prefix", True, 2, None)],
)
def test_activations_are_those_that_a_real_pass_saves(attention, vision, views, vision_lr):
    batch = make_batch(2, vision=vision, prompt=60)
    settings = {"views": views, "vision_lr": vision_lr}
    real = make_objective(make_model(vision=vision, attention=attention), **settings)
    real.make_optimizer()  # freezes the tower, if it is frozen
    planned = plan_of(make_model(vision=vision, attention=attention), batch, **settings).phases["saved"]
    size = sum(planned[row] for row in (ACTIVATIONS, LOGITS, TEMPORARY))  # the last: gradients of the prefix
    assert size == pytest.approx(really_saved(real, batch), rel=2e-3)  # integers


def test_a_frozen_tower_saves_nothing_and_has_neither_gradients_nor_states():
    batch = make_batch(vision=True)
    model = make_model(vision=True)
    tower = sum(p.numel() for p in model.vision.vision_tower.parameters())
    tensors = sum(1 for _ in model.parameters()) - sum(1 for _ in model.vision.vision_tower.parameters())
    plan, trained = plan_of(model, batch, vision_lr=0.0), plan_of(make_model(vision=True), batch)
    assert plan.trained == plan.parameters - tower
    assert plan.phases["optimizer"][GRADIENTS] == 4 * plan.trained
    assert plan.phases["saved"][STATES] == 8 * plan.trained + 4 * tensors
    assert plan.phases["saved"][ACTIVATIONS] < 0.8 * trained.phases["saved"][ACTIVATIONS]
    assert plan.prefix == trained.prefix == PROMPT - 1 + anyres(28).num_tokens((40, 30), side=4)


@pytest.mark.parametrize("pick", ["argmax", "sample"])
def test_a_second_pass_on_predictions_takes_the_memory_of_one(pick):
    setup = Setup(backbone=make_model, special=SPECIAL, optim=Optim(lr=1e-3))
    objectives = (MaskPrediction(setup), ProSeCo(setup, pick=pick, t_min=0.1))
    one, two = (measure(each, make_batch(), gpus=2, precision="32-true").total("saved") for each in objectives)
    assert two == pytest.approx(one, rel=0.01)


def test_micro_batches_bound_activations_and_find_gradients():
    whole, cut = plan_of(make_model(), make_batch(4)), plan_of(make_model(), make_batch(4), micro_batch=1)
    assert whole.phases["saved"][ACTIVATIONS] == pytest.approx(4 * cut.phases["saved"][ACTIVATIONS], rel=0.02)
    assert whole.phases["forward"][GRADIENTS] == 0
    assert cut.phases["forward"][GRADIENTS] == 4 * size(SHAPES)


# precision


def test_autocast_keeps_a_copy_of_what_is_multiplied_until_the_step_is_over():
    plan = plan_of(make_model(), make_batch(), precision="bf16-mixed")
    matrices = [shape for shape in SHAPES if len(shape) == 2][1:]  # the embedding is looked up
    assert plan.phases["optimizer"][ACTIVATIONS] == pytest.approx(2 * size(matrices), abs=100)
    assert plan.phases["saved"][PARAMETERS] == 4 * size(SHAPES)


# mistakes


def test_an_objective_that_looks_at_its_numbers_cannot_be_planned():
    class Looks(MaskPrediction):
        def weighted(self, values):
            return super().weighted(values if values["mask"].item() else {})

    objective = Looks(Setup(backbone=make_model, special=SPECIAL, optim=Optim(lr=1e-3)))
    with pytest.raises(ValueError, match="depends on computed values"):
        measure(objective, make_batch(), gpus=1, precision="32-true")


# models and the command line


def test_the_sizes_of_llada_v_are_those_of_the_released_model():
    manifest = json.loads((ROOT / "tests" / "golden" / "real_checkpoint_manifest.json").read_text())
    model = outline(ROOT / "docs" / "llada_v", codec=Codec.load(ROOT / "assets" / "base"))
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = sorted(tuple(t["shape"]) for t in manifest["tensors"].values() for _ in range(t["count"]))
    assert sorted(tuple(parameter.shape) for parameter in model.parameters()) == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["total_parameters"]


def arguments(folder: Path, *more: str) -> list[str]:
    """A run of a small model with data that do not exist."""
    sizes = ["model.decoder.hidden_size=32", "model.decoder.num_hidden_layers=1", "model.vision.num_hidden_layers=1"]
    places = [f"run_dir={folder}/run", f"data.path={folder}/nowhere", f"tokenizer={ROOT}/assets/base"]
    return ["conf=mask,model/tiny", *sizes, *places, "data.batch_size=3", "data.response_length=20", *more]


def test_the_command_prints_a_plan_and_trains_nothing(tmp_path, capsys):
    main(arguments(tmp_path, "plan.gpus=2", "optim.micro_batch=1", "optim.views=2"))
    text = capsys.readouterr().out
    assert "3 rows on each of 2 GPUs, 1 at a time; 2 x 20 tokens after a prefix of" in text
    assert not re.search(r"\b0\.0+ ", text)
    units = {"MiB": 1.0, "KiB": 2.0**-10, "B": 2.0**-20}
    cells = {line[:26].strip(): re.findall(r"([\d.]+) ([MK]?i?B)|\b(0)\b", line[26:]) for line in text.splitlines()}
    numbers = {name: [float(n) * units[unit] if unit else 0.0 for n, unit, _ in row] for name, row in cells.items()}
    assert {PARAMETERS, GRADIENTS, STATES, GATHERED, REDUCED, ACTIVATIONS, LOGITS, TEMPORARY, "sum"} <= numbers.keys()
    rows = [list(map(float, row)) for name, row in numbers.items() if len(row) == 4 and name != "sum"]
    for column, expected in zip(zip(*rows, strict=True), numbers["sum"], strict=True):
        assert sum(column) == pytest.approx(float(expected), abs=0.05 * len(rows))
    assert f"at most {max(numbers['sum']):.1f} MiB on each GPU" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("plan.gpus=0", "plan.gpus: a plan is for at least 1 GPU, got 0; plan.gpus=null trains"),
        ("plan=true", "plan: expected a mapping, got True"),
        ("plan.image=[640]", r"plan.image: expected \[width, height\] in pixels, or null, got \[640\]"),
        ("model.vision.image_size=24", "different ways: .*; set data.image_size=24$"),
        ("trainer.precision=64-true", "no plan for precision '64-true'"),
    ],
)
def test_mistakes_in_the_settings_of_a_plan(tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        main.__wrapped__(arguments(tmp_path, *["plan.gpus=1"] * (not setting.startswith("plan.gpus")), setting))


@pytest.mark.slow
def test_llada_v_is_planned_in_little_memory_and_as_the_page_says():
    where = ["model.path=docs/llada_v", "tokenizer=assets/base"]
    command = [sys.executable, "-m", "src.train", "conf=stage1,llada_v", *where, "plan.gpus=8"]
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "sys.stdout.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    assert "8,434,837,024 parameters" in done.stdout
    table = done.stdout.split("\n\n")[1]
    assert table in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert int(done.stdout.splitlines()[-1]) < 2e6  # KiB: the model alone takes 33e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_plan_is_what_a_real_step_takes():
    """The benchmark's smallest case, in processes of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "tiny"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout.split()[-1]) == pytest.approx(1, abs=0.15)
