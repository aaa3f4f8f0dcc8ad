"""Plan the GPU memory of a training step, without weights, data or a GPU.

    python -m src.train conf=stage1 plan.gpus=8
    measure(objective, batch, gpus=8, precision="bf16-mixed")

    objective and batch -> its own losses, backward pass and optimizer step on fake tensors (memory_tracker.py)
      -> every storage that is allocated and freed -> peak memory of each phase

No formula of any layer is used: the plan counts what the real step keeps alive.

Counted: parameters, gradients, optimizer states, weights cast by autocast, and every result of an operation until it is
freed, both activations saved for the backward pass and temporaries. Attention is one fused kernel that saves queries,
keys, values, output and one number per query. Every response token has a loss, the worst case of the noise. The step is
not the first one, so the optimizer states exist.

Several GPUs are planned as FSDP2: parameters, gradients and optimizer states are sharded by rows, and a `mixed`
precision runs both passes in the lower dtype. Whole blocks come on top, always the largest ones: the gathered weights
of the block in use and of the next one, and in the backward pass the unsharded gradients of one.

Not counted: CUDA and its libraries, NCCL buffers, workspace within kernels, fragmentation, pixels and ids of the
batch, gradient clipping, validation, drafting.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from datamodules.shards import Sample
from src.cli.instantiate import plain
from src.diffusion import corruption
from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.io.images import MAX_PIXELS
from src.objectives.base import Objective
from src.training.build import build_on_meta, component_args, data_and_objective, load_codec, silence_lightning
from src.training.memory_tracker import DATA_ACCESS_ERRORS, Live, Shapes
from src.types import Batch, Corrupted

# Precision of the trainer -> dtype that parameters are converted to, and lower dtype of a mixed precision.
TYPES = {
    "32-true": (None, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (None, torch.bfloat16),
    "16-mixed": (None, torch.float16),
}
PARAMETERS, GRADIENTS, STATES, CAST = "parameters", "gradients", "optimizer states", "weights cast by autocast"
WHOLE, BATCH = "whole parameters", "batch"  # not counted: gathered block by block instead; small
GATHERED, REDUCED = "gathered weights", "gradients to be sharded"
TOWER, PROJECTOR, DECODER, HEAD, TEMPORARY = "vision tower", "projector", "decoder", "head and loss", "temporary"
ROWS = (PARAMETERS, GRADIENTS, STATES, CAST, GATHERED, REDUCED, TOWER, PROJECTOR, DECODER, HEAD, TEMPORARY)
PARTS = {"vision.vision_tower": TOWER, "vision": PROJECTOR, "lm_head": HEAD}  # of a backbone; else DECODER
GIB, MIB = 1 << 30, 1 << 20
PHASES = ("forward", "saved", "backward", "optimizer")  # saved: the moment between the two passes
UNIT = re.compile(r"(.*?\.\d+)\.")  # gathered as a whole: an element of a list of layers


@dataclass(frozen=True)
class Plan:
    """Bytes on each of `gpus` GPUs.

    phases: {phase: {row: bytes}} at the peak of each phase
    parameters, trained: number of parameters of the whole model, and of those that are trained
    prefix: tokens of the prefix
    """

    gpus: int
    parameters: int
    trained: int
    prefix: int
    phases: Mapping[str, Mapping[str, int]]

    @property
    def peak(self) -> int:
        return max(map(self.total, PHASES))

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    def table(self) -> str:
        """One line per row that is not empty, one column per phase, and the sums."""
        rows = {row: [self.phases[phase].get(row, 0) for phase in PHASES] for row in ROWS}
        rows = {row: values for row, values in rows.items() if any(values)}
        rows["sum"] = [self.total(phase) for phase in PHASES]
        lines = [[f"{row:26}", *(f"{self.format(value):>14}" for value in values)] for row, values in rows.items()]
        return "".join("".join(line) + "\n" for line in [[" " * 26, *(f"{phase:>14}" for phase in PHASES)], *lines])

    def format(self, size: int) -> str:
        """Bytes as text, in the same unit for the whole plan."""
        return f"{size / GIB:.2f} GiB" if self.peak >= GIB else f"{size / MIB:.1f} MiB"


def measure(objective: Objective, batch: Batch, *, gpus: int, precision: str, foreach: bool = True) -> Plan:
    """Plan one step of `objective` on `batch`, the rows of one GPU.

    objective: its tensors lose their data; precision: of Lightning's trainer
    foreach: whether the optimizer updates all parameters at once, as on a GPU, or one by one

    Raises UserError for less than one GPU, for an unknown precision, and if the control flow of the objective depends
    on values that it computes.
    """
    if gpus < 1:
        raise UserError(f"a plan is for at least 1 GPU, got {gpus}")
    if precision not in TYPES:
        raise UserError(f"no plan for precision {precision!r}; known are {', '.join(TYPES)}")
    dtype, lower = TYPES[precision]
    step = Step(objective.to(device="meta", dtype=dtype), gpus=gpus, lower=lower, foreach=foreach)
    micro = batch.split(objective.optim.micro_batch or len(batch))
    try:
        step.run(micro[0], _all_masked(objective, micro[0]), last=len(micro) > 1)
    except DATA_ACCESS_ERRORS as error:
        raise UserError(f"no plan: the control flow of this objective depends on computed values ({error})") from error
    phases = {phase: Counter({row: step.live.peaks[phase].get(row, 0) for row in ROWS}) for phase in PHASES}
    if gpus > 1:
        _add_whole_blocks(phases, objective)
    sizes = [(p.numel(), p.requires_grad) for p in objective.parameters()]
    return Plan(gpus, sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained), step.prefix, phases)


class Step:
    """A training step whose storages `live` counts. `prefix`: tokens of the prefix, set by `run`.

    lower: lower dtype of a mixed precision: several GPUs gather parameters in it, one GPU autocasts to it
    """

    def __init__(self, objective: Objective, *, gpus: int, lower: torch.dtype | None, foreach: bool) -> None:
        self.objective, self.shapes, self.live, self.prefix = objective, Shapes(), Live(copies={PARAMETERS: CAST}), 0
        self.autocast = torch.autocast("cpu", lower) if gpus == 1 and lower else nullcontext()
        dtypes = [parameter.dtype for parameter in objective.parameters()]
        objective.to(dtype=lower if gpus > 1 else None)
        with self.shapes.fake:
            objective.to_empty(device="cpu")
            self.optimizer = objective.make_optimizer()  # freezes parameters that are not trained
            parameters = zip(objective.parameters(), dtypes, strict=True)
            self.shards = {p: p if gpus == 1 else _shard(p, gpus, dtype) for p, dtype in parameters}
        for group in self.optimizer.param_groups:
            group["params"] = [self.shards[p] for p in group["params"]]
            group["foreach"] = foreach
        self._label_parts(objective.backbone)
        self._label_passes(objective)

    def run(self, batch: Batch, corrupted: list[Corrupted], *, last: bool) -> None:
        """One micro-batch and the optimizer step. last: it is the last of several, so gradients exist already."""
        with self.autocast:
            with self.live:
                for tensor in _tensors(batch, *corrupted):
                    self.live.hold(tensor, BATCH)
                self._make_states()
            if not last:
                self.optimizer.zero_grad()
            with self.shapes, self.live, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                self._pass(batch, corrupted)
            with self.live:
                self.live.enter("optimizer", TEMPORARY)
                self.optimizer.step()

    def _make_states(self) -> None:
        """Create the optimizer states, and a gradient for each trained parameter."""
        for parameter, shard in self.shards.items():
            self.live.hold(parameter, WHOLE)
            self.live.hold(shard, PARAMETERS)
            if parameter.requires_grad:
                shard.grad = torch.zeros_like(shard)
                self.live.hold(shard.grad, GRADIENTS)
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
        self.live.enter("first step", STATES)
        self.optimizer.step()

    def _pass(self, batch: Batch, corrupted: list[Corrupted]) -> None:
        """All forward and backward passes, including the backward pass through the prefix."""
        self.live.enter("forward", HEAD)
        self.objective.forward_backward(batch, corrupted, self.objective.denominators([(batch, corrupted)]))

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        """Label a complete gradient; on several GPUs, keep only its shard."""
        shard = self.shards[parameter]
        if shard.grad is None:
            shard.grad = torch.zeros_like(shard)
        self.live.hold(shard.grad, GRADIENTS)
        if shard is not parameter:
            parameter.grad = None

    def _label_parts(self, backbone: Any) -> None:
        """Label storages by the part of the backbone that allocates them."""
        outer: list[str] = []

        def begin(part: str) -> None:
            outer.append(self.live.label)
            self.live.label = part

        def end(*_: Any) -> None:
            self.live.label = outer.pop()

        def encode_prefix(inputs: dict[str, Tensor], encode: Any = backbone.encode_prefix) -> Any:
            begin(DECODER)
            prefix = encode(inputs)
            self.prefix = prefix.embeds.shape[1]
            end()
            return prefix

        for name, module in backbone.named_modules():
            part = next((PARTS[start] for start in PARTS if f"{name}.".startswith(f"{start}.")), DECODER)
            module.register_forward_pre_hook(lambda *_, part=part: begin(part))
            module.register_forward_hook(end)
        backbone.encode_prefix = encode_prefix

    def _label_passes(self, objective: Any) -> None:
        """Start a new phase with the logits of each pass, and around the sum of its losses."""
        positions, weighted = objective.positions, objective.weighted

        def enter_forward(*args: Any) -> Tensor:
            self.live.enter("forward", HEAD)
            return positions(*args)

        def enter_backward(*args: Any) -> Tensor:
            loss = weighted(*args)
            self.live.enter("saved", HEAD)
            self.live.enter("backward", TEMPORARY)
            return loss

        objective.positions, objective.weighted = enter_forward, enter_backward


def _all_masked(objective: Objective, batch: Batch) -> list[Corrupted]:
    """A corrupted response for each view, at noise level 1."""
    noise = Noise(batch.keys, seed=0)
    state = corruption.start(batch, torch.ones(len(batch)))
    return [objective.corruption(batch, state, noise) for _ in range(objective.optim.views)]


def _tensors(batch: Batch, *corrupted: Corrupted) -> list[Tensor]:
    values = [*batch.prefix.values(), *(value for item in (batch, *corrupted) for value in vars(item).values())]
    return [value for value in values if isinstance(value, Tensor)]


def _shard(parameter: nn.Parameter, gpus: int, dtype: torch.dtype) -> nn.Parameter:
    """The rows of a parameter on the first GPU, which has the most."""
    rows = -(-parameter.shape[0] // gpus)
    return nn.Parameter(parameter.new_empty(rows, *parameter.shape[1:], dtype=dtype), parameter.requires_grad)


def _add_whole_blocks(phases: dict[str, Counter[str]], objective: nn.Module) -> None:
    """Add the blocks that FSDP2 gathers, and the largest block's unsharded gradients."""
    weights, gradients = Counter(), Counter()
    for name, parameter in objective.named_parameters():
        unit = UNIT.match(name)
        block = unit[1] if unit else name.rpartition(".")[0]
        weights[block] += parameter.nbytes
        gradients[block] += parameter.nbytes * parameter.requires_grad
    for phase in ("forward", "backward"):
        phases[phase][GATHERED] = sum(sorted(weights.values())[-2:])
    phases["backward"][REDUCED] = max(gradients.values())


def plan(cfg: DictConfig, *, gpus: int) -> str:
    """Table of the memory of a step on each of `gpus` GPUs that share the model. Reads no weights or data."""
    if type(gpus) is not int or gpus < 1:
        raise UserError(f"plan.gpus: a plan is for at least 1 GPU, got {gpus!r}; plan.gpus=null trains")
    silence_lightning()
    codec = load_codec(cfg)
    data, objective = data_and_objective(
        cfg, partial(build_on_meta, cfg.model, codec), images=cfg.plan.image is not None, **component_args(cfg, codec)
    )
    micro = objective.optim.micro_batch or cfg.data.batch_size
    batch = _black_batch(cfg, data.collate, rows=min(cfg.data.batch_size, micro + 1))
    try:
        planned = measure(objective, batch, gpus=gpus, precision=str(cfg.trainer.precision))
    except KeyError as error:
        error.add_note("a plan reads no data, so the objective cannot read more of a record than its captions")
        raise
    return (
        f"{cfg.name}: {cfg.data.batch_size} rows on each of {planned.gpus} GPUs, {min(micro, len(batch))} at a time; "
        f"{objective.optim.views} x {cfg.data.response_length} tokens after a prefix of {planned.prefix}; "
        f"{cfg.trainer.precision}\n{planned.parameters:,} parameters, {planned.trained:,} of them trained\n\n"
        f"{planned.table()}\nat most {planned.format(planned.peak)} on each GPU; docs/memory.md says what it omits\n"
    )


def _black_batch(cfg: DictConfig, collate: Callable, *, rows: int) -> Batch:
    """A batch of black images of size `plan.image`, collated like the data."""
    size = plain(cfg.plan.image)
    if size is not None and not _is_size(size):
        limit = f"numbers of pixels, at most {MAX_PIXELS:,} in all"
        raise UserError(f"plan.image: expected [width, height] or null, got {size} ({limit})")
    if not isinstance(cfg.plan.prompt, str):
        raise UserError(f"plan.prompt: expected a text, got {cfg.plan.prompt!r}")
    image: Any = size and Image.new("RGB", (size[0], size[1]))
    record = {"prompt": cfg.plan.prompt, "captions": [{"text": ""}]}
    return collate([Sample(str(row), record, b"", image) for row in range(rows)], 0)[0]


def _is_size(size: Any) -> bool:
    if not isinstance(size, list) or len(size) != 2 or any(type(length) is not int or length < 1 for length in size):
        return False
    return size[0] * size[1] <= MAX_PIXELS
