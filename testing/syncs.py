"""Count what would make a GPU wait for the host, on a CPU: a dispatch mode around any piece of code.

    with CountSyncs(root="path of the project") as count:
        sampler(backbone, prefix, ...)
    print(count.table())            # how often, which operation, which file:line of the project
    count.operations                # all that compute or copy, a kernel each; views are not counted

Counted: reading a value (`item`, `bool`), `tolist`, `cpu`, `nonzero`, `masked_select`, `equal`, indexing with a
boolean tensor, `unique`. Not seen from here: copies between devices, which a CPU has not.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class CountSyncs(TorchDispatchMode):
    def __init__(self, root: str) -> None:
        super().__init__()
        self.root, self.counts, self.operations = root.rstrip("/") + "/", Counter(), 0

    def __enter__(self) -> Self:
        # these call no operation for a tensor of one or more dimensions on the CPU
        self.originals = {name: getattr(torch.Tensor, name) for name in ("tolist", "cpu")}
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, self._counting(name, original))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, original)
        super().__exit__(*error)

    def _counting(self, name: str, original: Any) -> Any:
        def read(tensor: torch.Tensor) -> Any:
            if tensor.ndim:
                self._count(name)
            return original(tensor)

        return read

    def _count(self, name: str, number: int = 1) -> None:
        if where := self._where():
            self.counts[where, name] += number

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.operations += not func.is_view and name != "_unsafe_view"
        if name in READS:
            self._count(name)
        elif name in INDEXING:
            masks = sum(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            fills = "put" in name and args[2].numel() == 1  # becomes masked_fill, which does not wait
            if masks and not fills:
                self._count(f"{name} with a boolean tensor", masks)
        return func(*args, **(kwargs or {}))

    def _where(self) -> str:
        """The line of the project that waits; nothing for an optimizer, whose step numbers lie on the CPU."""
        frame, line = sys._getframe(2), ""
        while frame:
            name = frame.f_code.co_filename
            if "/torch/optim/" in name:
                return ""
            if not line and name.startswith(self.root) and "/.venv/" not in name and not name.endswith("syncs.py"):
                line = f"{name.removeprefix(self.root)}:{frame.f_lineno}"
            frame = frame.f_back
        return line or "?"

    def table(self) -> str:
        rows = [f"{number:8}  {name:34} {where}" for (where, name), number in sorted(self.counts.items())]
        return "\n".join([f"{self.total} in {self.operations} operations", *rows])
