"""Count what would make a GPU wait for the host, on a CPU: a dispatch mode around any piece of code.

    with CountSyncs(root="path of the project") as count:
        sampler(backbone, prefix, ...)
    print(count.table())            # how often, which operation, which file:line of the project

Counted: reading a value (`item`, `bool`), `tolist`, `nonzero`, `masked_select`, `equal`, indexing with a boolean tensor,
`unique`. Not seen from here: copies between devices, which a CPU has not.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class CountSyncs(TorchDispatchMode):
    def __init__(self, root: str) -> None:
        super().__init__()
        self.root, self.counts, self.operations = root.rstrip("/") + "/", Counter(), 0

    def __enter__(self) -> Self:
        # `tolist` of a CPU tensor of one or more dimensions calls no operation
        self.tolist = torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> object:
            self.counts[self._where(), "tolist"] += tensor.ndim > 0
            return self.tolist(tensor)

        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch.Tensor.tolist = self.tolist
        super().__exit__(*error)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            self.counts[self._where(), name] += 1
        elif name in INDEXING:
            masks = sum(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            fills = "put" in name and args[2].numel() == 1  # becomes masked_fill, which does not wait
            if masks and not fills:
                self.counts[self._where(), f"{name} with a boolean tensor"] += masks
        return func(*args, **(kwargs or {}))

    def _where(self) -> str:
        frame = sys._getframe(2)
        while frame:
            name = frame.f_code.co_filename
            if name.startswith(self.root) and "/.venv/" not in name:
                return f"{name.removeprefix(self.root)}:{frame.f_lineno}"
            frame = frame.f_back
        return "?"

    def table(self) -> str:
        rows = [f"{number:8}  {name:34} {where}" for (where, name), number in sorted(self.counts.items())]
        return "\n".join([f"{self.total} in {self.operations} operations", *rows])
