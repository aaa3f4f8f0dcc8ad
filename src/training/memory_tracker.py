"""Run code on tensors without data, and keep books on the memory that they would take.

    shapes, live = Shapes(), Live()
    with shapes.fake:
        model.to_empty(device="cpu")
    with shapes, live:
        live.enter("forward", "activations")
        loss = model(batch)
    live.peaks["forward"]           {label: bytes} at the fullest moment

Integers and masks stay real, as they decide what is computed: places of images, loss positions, shapes. Floating-point
tensors have a shape and a type only, so that a model of any size runs anywhere.
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

LOOKED = (DataDependentOutputException, DynamicOutputShapeException)  # when code looks at a number that is not there


class Shapes(TorchDispatchMode):
    """Takes the data from floating-point tensors the moment they are made; what comes of them has none either.

    Code may not look at their values (`.item()`, `if x > 0`, places of a mask that was computed): raises one of LOOKED.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        if not given:
            return tree_map_only(Tensor, self._without_data, func(*args, **(kwargs or {})))
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if func._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
                return args[0]  # there is nothing to write into a real tensor, such as a count of right answers
            args = [_places(arg) if isinstance(arg, list | tuple) else arg for arg in args]
        return func(*args, **(kwargs or {}))

    def _without_data(self, tensor: Tensor) -> Tensor:
        return self.fake.from_tensor(tensor) if tensor.is_floating_point() else tensor


class Live(TorchDispatchMode):
    """Counts the storages that exist, by label, and remembers the fullest moment of each phase.

    copies: {label: label that conversions of such a tensor to another type get}
    label: of all else that is made from now on; peaks: {phase: {label: bytes}}
    """

    def __init__(self, *, copies: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.copies = copies or {}
        self.label = self.phase = ""
        self.now: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}
        self._labels: dict[int, str] = {}  # of each storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        label = self.copies.get(self._label_of(args[0])) if func is torch.ops.aten._to_copy.default else None
        for tensor in _tensors(out):
            self.hold(tensor, label)
        return out

    def enter(self, phase: str, label: str) -> None:
        """A phase begins; what is made in it gets `label`."""
        self.phase, self.label = phase, label
        self._note()

    def hold(self, tensor: Tensor, label: str | None = None) -> None:
        """Count a tensor's storage until it is freed. With `label`, whatever label it had before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._labels.get(key)
        if known is None:
            weakref.finalize(storage, self._free, key, size).atexit = False
        elif label is None:
            return
        else:
            self.now[known] -= size
        self._labels[key] = self.label if label is None else label
        self.now[self._labels[key]] += size
        self._note()

    def _label_of(self, tensor: Tensor) -> str:
        return self._labels.get(tensor.untyped_storage()._cdata, "")

    def _free(self, key: int, size: int) -> None:
        self.now[self._labels.pop(key)] -= size

    def _note(self) -> None:
        if self.now.total() >= sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(self.now)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _places(indices: list | tuple) -> list:
    """Indices with the true places of a mask instead of the mask: the shape of a result must be known."""
    found = []
    for index in indices:
        mask = isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool
        found += index.nonzero().unbind(1) if mask else [index]
    return found
