"""Run code on tensors without data, and track the memory that they would take.

    shapes, live = Shapes(), Live()
    with shapes.fake:
        model.to_empty(device="cpu")
    with shapes, live:
        live.enter("forward", "activations")
        loss = model(batch)
    live.peaks["forward"]           {label: bytes} at the peak

Integers and masks stay real, as control flow depends on them: image positions, loss positions, shapes. Floating-point
tensors have a shape and a dtype only, so a model of any size runs on any machine.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DATA_ACCESS_ERRORS = (DataDependentOutputException, DynamicOutputShapeException)  # code read a value of a fake tensor


class Shapes(TorchDispatchMode):
    """Replaces floating-point tensors by fake ones as soon as they are created, so their results are fake as well.

    Raises one of DATA_ACCESS_ERRORS if code reads their values: `.item()`, `if x > 0`, positions of a computed mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors((args, kwargs))
        if not inputs:
            return tree_map_only(Tensor, self._without_data, func(*args, **(kwargs or {})))
        if any(isinstance(tensor, FakeTensor) for tensor in inputs):
            if func._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
                return args[0]  # no data to write into a real tensor, such as a metric's count
            args = [_mask_positions(arg) if isinstance(arg, list | tuple) else arg for arg in args]
        return func(*args, **(kwargs or {}))

    def _without_data(self, tensor: Tensor) -> Tensor:
        return self.fake.from_tensor(tensor) if tensor.is_floating_point() else tensor


class Live(TorchDispatchMode):
    """Counts live storages by label, and records the peak of each phase.

    copies: {label: label of the result when such a tensor is converted to another dtype}
    label: of all other new storages; peaks: {phase: {label: bytes}}
    """

    def __init__(self, *, copies: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.copies = copies or {}
        self.label = self.phase = ""
        self.now: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}
        self._labels: dict[int, str] = {}  # address of a storage -> label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        label = self.copies.get(self._label_of(args[0])) if func is torch.ops.aten._to_copy.default else None
        for tensor in _tensors(out):
            self.hold(tensor, label)
        return out

    def enter(self, phase: str, label: str) -> None:
        """Begin a phase; new storages get `label`."""
        self.phase, self.label = phase, label
        self._update_peak()

    def hold(self, tensor: Tensor, label: str | None = None) -> None:
        """Count a tensor's storage until it is freed. `label` replaces an earlier label."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        old_label = self._labels.get(key)
        if old_label is None:
            weakref.finalize(storage, self._free, key, size).atexit = False
        elif label is None:
            return
        else:
            self.now[old_label] -= size
        self._labels[key] = self.label if label is None else label
        self.now[self._labels[key]] += size
        self._update_peak()

    def _label_of(self, tensor: Tensor) -> str:
        return self._labels.get(tensor.untyped_storage()._cdata, "")

    def _free(self, key: int, size: int) -> None:
        self.now[self._labels.pop(key)] -= size

    def _update_peak(self) -> None:
        if self.now.total() >= sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(self.now)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _mask_positions(indices: list | tuple) -> list:
    """Indices with real masks replaced by their positions, as the shape of the result must be known."""
    positions = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool
        positions += index.nonzero().unbind(1) if is_mask else [index]
    return positions
