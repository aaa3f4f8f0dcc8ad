"""Molecules as SMILES: are they valid, different, new, and how much of a property do they have (QM9 in ProSeCo).

Smiles(property="qed", train="data/qm9")     needs rdkit: pip install rediff-lightning[smiles]
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from src.io.errors import UserError
from src.io.shards import read_manifest, read_shard
from src.metrics.caption import CaptionMetric, Stat, summarise
from src.metrics.text import references_of

Property = Literal["qed", "rings", "logp", "weight"]


class Smiles(CaptionMetric):
    """Per text `valid`, 1 where rdkit reads it as a molecule with at least one atom. Over all texts:

    unique: share of the valid ones that are left when repeats are dropped (by canonical SMILES)
    novel:  share of those that are not among the training molecules, with `train`; `num_novel` is how many these are
    the property (`qed`, `rings`, `logp`, `weight`): its mean over the different (with `train`: the new) molecules

    train: a folder as `src.prepare` writes it; the captions of its split `train` are the known molecules
    Raises UserError where rdkit is missing or `train` cannot be read.
    """

    higher_is_better = True
    names = ("valid",)
    hashes: list[Tensor] | Tensor
    values: list[Tensor] | Tensor

    def __init__(self, *, property: Property | None = None, train: str | None = None) -> None:
        super().__init__()
        if property is not None and property not in get_args(Property):
            raise UserError(f"property must be null or one of {', '.join(get_args(Property))}, got {property!r}")
        chemistry()  # fails here where rdkit is missing
        if train is not None and not (Path(train) / "train").is_dir():
            raise UserError(f"train={train!r} holds no split 'train'; name a folder that src.prepare wrote")
        self.property: Property | None = property
        self.train_path = train
        self.add_state("hashes", [], dist_reduce_fx="cat")  # of canonical SMILES: only tensors are reduced over ranks
        self.add_state("values", [], dist_reduce_fx="cat")  # the property of each, 0 without one

    def score(self, text: str, record: dict) -> dict[str, float]:
        return {"valid": float(_molecule(text) is not None)}

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        super().update(texts, records)
        assert isinstance(self.hashes, list)
        assert isinstance(self.values, list)
        found = [molecule for text in texts if (molecule := _molecule(text)) is not None]
        hashes = [_hash(chemistry().MolToSmiles(molecule)) for molecule in found]
        name = self.property
        values = [property_of(molecule, name) if name else 0.0 for molecule in found]
        self.hashes.append(torch.tensor(hashes, dtype=torch.int64, device=self.total.device))
        self.values.append(torch.tensor(values, dtype=torch.float64, device=self.total.device))

    def compute(self) -> dict[str, Stat]:
        found = super().compute()
        hashes, values = (torch.cat(s) if isinstance(s, list) else s for s in (self.hashes, self.values))
        kept = dict(zip(hashes.tolist(), values.tolist(), strict=True))
        found["unique"] = _share(len(kept), len(hashes))
        if self.train_path is not None:
            known = training_hashes(self.train_path)
            different, kept = len(kept), {name: value for name, value in kept.items() if name not in known}
            found["novel"] = _share(len(kept), different)
            found["num_novel"] = Stat(mean=float(len(kept)), se=None, n=int(self.count))
        if self.property and kept:
            found[self.property] = summarise(list(kept.values()))
        elif self.property:
            found[self.property] = Stat(mean=float("nan"), se=None, n=0)
        return found


@functools.cache
def chemistry() -> Any:
    """`rdkit.Chem`, which says no more what is wrong with each molecule. Raises UserError where it is missing."""
    try:
        from rdkit import Chem, RDLogger  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("SMILES are read by rdkit: pip install rediff-lightning[smiles]") from error
    RDLogger.DisableLog("rdApp.*")  # pyright: ignore[reportAttributeAccessIssue]
    return Chem


def property_of(molecule: Any, name: Property) -> float:
    """A number of an rdkit molecule. `rings` is the size of a smallest set of rings: two in norbornane."""
    from rdkit.Chem import QED, Crippen, Descriptors  # pyright: ignore[reportMissingImports]

    functions: dict[str, Callable] = {
        "qed": QED.qed,
        "rings": lambda it: len(chemistry().GetSSSR(it)),  # CalcNumRings counts three there
        "logp": Crippen.MolLogP,  # pyright: ignore[reportAttributeAccessIssue]
        "weight": Descriptors.MolWt,  # pyright: ignore[reportAttributeAccessIssue]
    }
    return float(functions[name](molecule))


@functools.lru_cache(maxsize=4)
def training_hashes(path: str) -> frozenset[int]:
    """Hashes of the canonical SMILES of all captions of the split `train` in a data folder."""
    folder = Path(path) / "train"
    shards = [folder / entry["name"] for entry in read_manifest(folder)["shards"]]
    texts = (text for shard in shards for sample in read_shard(shard) for text in references_of(sample["json"]))
    molecules = (_molecule(text) for text in texts)
    return frozenset(_hash(chemistry().MolToSmiles(molecule)) for molecule in molecules if molecule is not None)


def _molecule(text: str) -> Any:
    """The molecule of a text, or None: of an empty text rdkit would make one without atoms."""
    molecule = chemistry().MolFromSmiles(text.strip())
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def _share(part: int, whole: int) -> Stat:
    return Stat(mean=part / whole if whole else 0.0, se=None, n=whole)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
