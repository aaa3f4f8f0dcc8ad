"""Private parts of other libraries that the code uses: all of them, each with a test that fails when it changes.

`LISTED` is the one place that names them. A scan of the sources fails for a part that is missing here. `pyproject.toml`
pins Lightning to the minor version that these tests were written for.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("src", "callbacks", "datamodules")
LISTED = {
    "_setup_distributed": "strategy.py: connects the ranks of FSDP2 before `fit` does",
    "_data_parallel_size": "strategy.py: FSDP2 chooses the mesh once the number of ranks is known",
    "_tensor_parallel_size": "strategy.py: the second dimension of that mesh, for HSDP",
    "_batches_that_stepped": "objectives/base.py: the step of the log is the optimizer step, also after a resume",
    "_last_train_dl_reload_epoch": "self_correction.py: rebuilds the loader of the epoch that has begun",
    "_trainer": "edit_noise.py: an objective that no trainer has yet",
    "_new_buffer": "objectives/optim.py: the 8-bit states that torchao's optimizer makes in its first step",
    "_AdamW": "objectives/optim.py: torchao's AdamW with stochastic rounding and states as wide as the weights",
    "_instances": "progress.py: the bars that are open, to close them before an error is printed",
    "lm_eval.__main__": "adapters: the command line of lm-eval (tests/test_harnesses.py)",
    "lmms_eval.__main__": "adapters: the command line of lmms-eval",
    "_cdata": "memory_plan.py: the identity of a storage, which several tensors share",
    "torch._subclasses": "memory_plan.py: errors of code that reads values which fake tensors lack",
    "torch.utils._python_dispatch": "memory_plan.py: sees every operation of a planned step",
    "torch.utils._pytree": "memory_plan.py: the tensors in arguments and results",
}
DOCUMENTED = {"_replace", "_asdict", "_exit"}  # of named tuples and of `os`: public in spite of their names


class Module(L.LightningModule):
    """Two batches an epoch, and a count of how often its loader was built."""

    loaders = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        self.loaders += 1
        return DataLoader(torch.ones(4, 2), batch_size=2)  # type: ignore[arg-type]


@pytest.fixture
def fitted(tmp_path: Path) -> tuple[L.Trainer, Module]:
    """Two epochs of two steps."""
    module = Module()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, reload_dataloaders_every_n_epochs=1, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module)
    return trainer, module


def test_the_steps_of_the_log(fitted):
    assert fitted[0].fit_loop.epoch_loop._batches_that_stepped == 4


def test_the_epoch_in_which_the_loader_was_built(fitted):
    trainer, module = fitted
    assert (trainer.fit_loop._last_train_dl_reload_epoch, module.loaders) == (1, 2)
    trainer.fit_loop._last_train_dl_reload_epoch = trainer.current_epoch
    trainer.fit_loop.setup_data()
    assert module.loaders == 2
    trainer.fit_loop._last_train_dl_reload_epoch = float("-inf")
    trainer.fit_loop.setup_data()
    assert module.loaders == 3


def test_a_module_without_a_trainer(fitted):
    assert Module()._trainer is None
    assert fitted[1]._trainer is fitted[0]


def test_the_mesh_of_fsdp2():
    strategy = ModelParallelStrategy(data_parallel_size=3, tensor_parallel_size=2)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (3, 2)
    assert list(inspect.signature(strategy._setup_distributed).parameters) == []
    source = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert source.index("_setup_distributed()") < source.index("_device_mesh")


def test_the_bars_that_are_open():
    with tqdm(total=1) as bar:
        assert bar in tqdm._instances
    assert bar not in tqdm._instances


def test_parts_of_torch():
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(2))
        with pytest.raises(DataDependentOutputException):
            fake.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            fake.nonzero()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    tensor = torch.ones(4)
    assert tensor[1:].untyped_storage()._cdata == tensor.untyped_storage()._cdata
    assert torch.ones(4).untyped_storage()._cdata != tensor.untyped_storage()._cdata
    names: list[str] = []
    with Counting():
        torch.ones(2) + 1
    assert "aten.add.Tensor" in names
    assert tree_leaves([1, {"a": (2, 3)}]) == [1, 2, 3]
    assert tree_map_only(int, lambda value: -value, {"a": [1, "b"]}) == {"a": [-1, "b"]}


def private_parts(tree: ast.Module) -> Iterator[str]:
    """What a file uses of other libraries: private modules and names, and attributes of anything but itself."""
    own = set(defined(tree)) - set(LISTED)
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        for module in modules:
            parts = module.split(".")
            private = [number for number, part in enumerate(parts) if part.startswith("_") and part != "__future__"]
            if parts[0] not in PACKAGES and private:
                yield ".".join(parts[: private[0] + 1])
        if isinstance(node, ast.ImportFrom) and modules and modules[0].split(".")[0] not in PACKAGES:
            yield from (
                alias.name for alias in node.names if alias.name.startswith("_") and node.module != "__future__"
            )
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr[:2] != "__":  # noqa: SIM102
            if node.attr not in {*own, *DOCUMENTED} and not ast.unparse(node).startswith("torch.ops."):
                yield node.attr


def defined(tree: ast.Module) -> Iterator[str]:
    """Names that a file defines: functions, classes, fields, and attributes that it assigns to `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_every_private_part_is_listed() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    used = {name for tree in trees for name in private_parts(tree)}
    assert used == set(LISTED)
