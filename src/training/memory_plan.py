"""Plan the GPU memory of a training step, without weights, data or a GPU: src.train conf=stage1 plan.gpus=8

    objective and batch -> its own losses, backward pass and optimizer step on fake tensors (`Shapes`)
      -> every storage from its allocation until it is freed (`Live`) -> peak memory of each phase

No formula of any layer is used: the plan counts what the real step keeps alive. docs/memory.md says what is counted
and what is not.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from datamodules.shards import Sample
from src.cli.instantiate import fits, plain
from src.diffusion import corruption
from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.io.words import BINARY, counted, data_size
from src.objectives.base import Objective
from src.training.build import build_on_meta, component_args, data_and_objective, load_codec, silence_lightning
from src.types import Batch, Corrupted

# Precision of the trainer -> dtype that parameters are converted to, and lower dtype of a mixed precision.
TYPES = {
    "32-true": (None, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (None, torch.bfloat16),
}
PHASES = ("forward", "saved", "backward", "optimizer")  # saved: the moment between the two passes
IN_USE = "average"  # while the average is in use, in validation and drafting, whose own memory is not planned
PARAMETERS, GRADIENTS, STATES, AVERAGE = "parameters", "gradients", "optimizer states", "averaged weights"
ADAPTERS, RAW = "adapters", "raw weights, kept"
GATHERED, REDUCED = "gathered weights", "gradients to be sharded"
ACTIVATIONS, LOGITS, TEMPORARY = "activations", "logits and loss", "temporary"
LASTING = (PARAMETERS, ADAPTERS, GRADIENTS, STATES, AVERAGE, RAW)
ROWS = (*LASTING, GATHERED, REDUCED, ACTIVATIONS, LOGITS, TEMPORARY)
BLOCK = re.compile(r"(.*?\.\d+)\.")  # gathered as a whole: an element of a list of layers
GIB, MIB = 1 << 30, 1 << 20


class Shapes(TorchDispatchMode):
    """Replaces floating-point tensors by fake ones, with a shape and a dtype but no data, as they are created.

    Integers and masks stay real, as control flow depends on them: image positions, loss positions, shapes. Code that
    reads the value of a fake tensor raises `DataDependentOutputException` or `DynamicOutputShapeException`.
    active: whether new tensors lose their data
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.active = FakeTensorMode(allow_non_fake_inputs=True), True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not inputs:
            out = func(*args, **(kwargs or {}))
            fake = self.fake.from_tensor
            return tree_map_only(Tensor, lambda t: fake(t) if self.active and t.is_floating_point() else t, out)
        if any(isinstance(tensor, FakeTensor) for tensor in inputs):
            args = [self._positions(arg) if isinstance(arg, list | tuple) else arg for arg in args]
        return func(*args, **(kwargs or {}))

    def _positions(self, indices: list | tuple) -> list:
        """Indices of a fake tensor, with real masks replaced by positions: the shape of the result must be known."""
        positions = []
        for index in indices:
            is_mask = isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool
            positions += index.nonzero().unbind(1) if is_mask else [index]
        return positions


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, real or fake, until they are freed.

    label: of the storages that are created next; now: {label: bytes}; peaks: {phase: {label: bytes}}
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = self.label = ""
        self.now: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}
        self._labels: dict[int, str] = {}  # address of a storage -> label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs:
                self.hold(leaf, self.label)
        return out

    def enter(self, phase: str, label: str) -> None:
        self.phase, self.label = phase, label
        self._update_peak()

    def hold(self, tensor: Tensor, label: str) -> None:
        """Count a tensor's storage under `label` until it is freed, instead of under an earlier label."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._labels:
            self.now[self._labels[key]] -= size
        else:
            weakref.finalize(storage, self._free, key, size).atexit = False
        self._labels[key] = label
        self.now[label] += size
        self._update_peak()

    def _free(self, key: int, size: int) -> None:
        self.now[self._labels.pop(key)] -= size

    def _update_peak(self) -> None:
        if self.now.total() >= sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(self.now)


@dataclass(frozen=True)
class Plan:
    """Bytes on each GPU: `phases` is {phase: {row: bytes}} at the peak of each phase.

    With an average of the weights there is one phase more, `IN_USE`.
    parameters, trained: number of parameters of the whole model, and of those that are trained; prefix: its tokens
    """

    parameters: int
    trained: int
    prefix: int
    phases: Mapping[str, Counter[str]]

    @property
    def peak(self) -> int:
        return max(map(self.total, self.phases))

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    def format(self, size: int) -> str:
        """In the unit of the peak; what would be 0.00 in it, in a smaller one."""
        text = f"{size / GIB:.2f} GiB" if self.peak >= GIB else f"{size / MIB:.1f} MiB"
        return text if float(text.split()[0]) else data_size(size, units=BINARY) if size else "0"

    def table(self) -> str:
        rows = {row: [self.phases[phase][row] for phase in self.phases] for row in ROWS}
        rows = {row: sizes for row, sizes in rows.items() if any(sizes)}
        rows["sum"] = [self.total(phase) for phase in self.phases]
        lines = [["", *self.phases], *([row, *map(self.format, sizes)] for row, sizes in rows.items())]
        return "".join(f"{row:26}" + "".join(f"{cell:>14}" for cell in cells) + "\n" for row, *cells in lines)


def measure(objective: Objective, batch: Batch, *, gpus: int, precision: str, ema: bool = False) -> Plan:
    """Plan one step of `objective`, whose tensors lose their data, on `batch`, the rows of one GPU of `gpus`.

    ema: with a float32 average of the trained weights (`callbacks/ema.py`)
    """
    if precision not in TYPES:
        raise UserError(f"no plan for precision {precision!r}; known are {', '.join(TYPES)}")
    dtype, lower = TYPES[precision]
    micro_batches = batch.split(objective.optim.micro_batch or len(batch))
    accumulated = gpus > 1 or len(micro_batches) > 1  # gradients exist before the passes
    live, shapes = Live(), Shapes()

    # 1. Parameters, gradients and optimizer states, which several GPUs share, and the optimizer step.
    objective.to(device="meta", dtype=dtype)
    shares = {row: size // gpus for row, size in _run_optimizer(objective, live).items()}
    live.peaks["optimizer"][TEMPORARY] = live.peaks["optimizer"].get(TEMPORARY, 0) // gpus
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    in_use = Counter({**shares, RAW: sum(parameter.nbytes for parameter in trained) // gpus})
    if ema:
        shares[AVERAGE] = in_use[AVERAGE] = 4 * sum(parameter.numel() for parameter in trained) // gpus

    # 2. The passes over the last micro-batch. One GPU autocasts to the lower dtype; several gather parameters in it,
    #    and keep only shards of the gradients.
    if gpus > 1:
        objective.to(dtype=lower)
    with shapes.fake:
        objective.to_empty(device="cpu")
    autocast = torch.autocast("cpu", lower) if gpus == 1 and lower else nullcontext()
    try:
        prefix_tokens = _run_passes(objective, micro_batches[0], live, shapes, autocast, keep_gradients=not accumulated)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(f"no plan: the control flow of this objective depends on computed values ({error})") from error

    # 3. The sums.
    phases = {phase: Counter(live.peaks[phase]) for phase in PHASES}
    for phase, peak in phases.items():
        peak.update({row: n for row, n in shares.items() if row != GRADIENTS or accumulated or phase == "optimizer"})
    if gpus > 1:  # the two largest blocks, one in use and one prefetched, and the largest block's unsharded gradients
        weights, gradients = Counter(), Counter()
        for name, parameter in objective.named_parameters():
            block = match[1] if (match := BLOCK.match(name)) else name.rpartition(".")[0]
            weights[block] += parameter.nbytes
            gradients[block] += parameter.nbytes * parameter.requires_grad
        phases["forward"][GATHERED] = phases["backward"][GATHERED] = sum(sorted(weights.values())[-2:])
        phases["backward"][REDUCED] = max(gradients.values())
    if ema:
        phases[IN_USE] = in_use
    sizes = [(p.numel(), p.requires_grad) for p in objective.parameters()]
    return Plan(sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained), prefix_tokens, phases)


def _run_optimizer(objective: Objective, live: Live) -> dict[str, int]:
    """Bytes of parameters, gradients and states. Makes the second optimizer step, as the first one creates states."""
    optimizer = objective.make_optimizer()  # freezes parameters that are not trained
    parameters = list(objective.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["foreach"] = True  # all parameters at once, as on a GPU
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    with live:
        live.enter("optimizer", TEMPORARY)
        if isinstance(optimizer, torch.optim.AdamW):  # torchao's is compiled into one kernel for each parameter
            optimizer.step()
    optimizer.zero_grad()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    adapters = {id(p) for name, p in objective.named_parameters() if ".lora_" in name}
    tensors = {PARAMETERS: [p for p in parameters if id(p) not in adapters], GRADIENTS: trained, STATES: states}
    tensors[ADAPTERS] = [p for p in parameters if id(p) in adapters]
    return {row: sum(map(_num_bytes, group)) for row, group in tensors.items()}


def _num_bytes(tensor: Tensor) -> int:
    """Those of the parts of a quantized tensor, whose own dtype is that which it stands for."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", lambda: ((), None))
    parts, _ = flatten()
    return sum(getattr(tensor, part).nbytes for part in parts) if parts else tensor.nbytes


def _run_passes(
    objective: Objective, batch: Batch, live: Live, shapes: Shapes, autocast: Any, *, keep_gradients: bool
) -> int:
    """Forward and backward of a batch, in phases and with labels. Returns the number of tokens of the prefix.

    keep_gradients: count gradients from when they are complete; otherwise they go into existing ones at once
    """
    noise, state = Noise(batch.keys, seed=0), corruption.start(batch, torch.ones(len(batch)))  # all masked
    views = [objective.corruption(batch, state, noise) for _ in range(objective.optim.views)]
    totals, prefix_tokens = objective.denominators([(batch, views)]), 0
    weighted, choose = objective.weighted, objective.second_input

    def before_backbone(_: nn.Module, inputs: tuple) -> None:
        nonlocal prefix_tokens
        prefix_tokens = inputs[0].embeds.shape[1]
        live.enter("forward", ACTIVATIONS)

    def after_backbone(_: nn.Module, inputs: tuple, logits: Tensor) -> None:
        live.hold(logits, LOGITS)
        live.label = LOGITS

    def after_loss(values: dict[str, Tensor]) -> Tensor:
        loss = weighted(values)
        loss.register_hook(before_backward)
        return loss

    def before_backward(_: Tensor) -> None:
        live.enter("saved", LOGITS)
        live.enter("backward", TEMPORARY)

    def second_input(batch: Batch, state: Corrupted, where: Tensor, logits: Tensor, noise: Noise) -> Corrupted | None:
        shapes.active = False  # predictions choose positions: they are those of real logits, all zero
        second = choose(batch, state, where, torch.zeros(1).expand(logits.shape), noise)
        shapes.active = True
        return second

    def on_gradient(parameter: nn.Parameter) -> None:
        if keep_gradients:
            live.hold(parameter.grad, GRADIENTS)  # type: ignore[arg-type]
        else:
            parameter.grad = None

    objective.backbone.register_forward_pre_hook(before_backbone)
    objective.backbone.register_forward_hook(after_backbone)
    objective.weighted, objective.second_input = after_loss, second_input
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(on_gradient)
    live.enter("forward", ACTIVATIONS)
    with autocast, shapes, live, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        objective.forward_backward(batch, views, totals)
        live.peaks["optimizer"][ACTIVATIONS] = live.now[ACTIVATIONS]  # weights that autocast keeps for the step
    return prefix_tokens


def plan(cfg: DictConfig, *, gpus: int) -> str:
    """Table of the memory of a step on each of `gpus` GPUs that share the model. Reads no weights or data."""
    if type(gpus) is not int or gpus < 1:
        raise UserError(f"plan.gpus: a plan is for at least 1 GPU, got {gpus!r}; plan.gpus=null trains")
    size = plain(cfg.plan.image)
    if size is not None and not (fits(size, tuple[int, int]) and min(size) > 0):
        raise UserError(f"plan.image: expected [width, height] in pixels, or null, got {size}")
    silence_lightning()
    codec = load_codec(cfg)
    data, objective = data_and_objective(
        cfg, partial(build_on_meta, cfg.model, codec), images=size is not None, **component_args(cfg, codec)
    )
    # one row more than a micro-batch tells whether gradients are accumulated
    micro = objective.optim.micro_batch or cfg.data.batch_size
    rows = min(cfg.data.batch_size, micro + 1)
    image = size and Image.new("RGB", tuple(size))
    record = {"prompt": cfg.plan.prompt, "captions": [{"text": ""}]}
    batch = data.collate([Sample(str(row), record, b"", image) for row in range(rows)])[0]
    options = {"precision": str(cfg.trainer.precision), "ema": bool(cfg.callbacks.get("ema"))}
    planned = measure(objective, batch, gpus=gpus, **options)
    devices = "1 GPU" if gpus == 1 else f"each of {gpus} GPUs"
    return (
        f"{cfg.name}: {counted(cfg.data.batch_size, 'row')} on {devices}, {min(micro, rows)} at a time; "
        f"{objective.optim.views} x {counted(cfg.data.response_length, 'token')} after a prefix of {planned.prefix}; "
        f"{cfg.trainer.precision}\n{planned.parameters:,} parameters, {planned.trained:,} of them trained\n\n"
        f"{planned.table()}\nat most {planned.format(planned.peak)} on each GPU; docs/memory.md says what it omits\n"
    )
