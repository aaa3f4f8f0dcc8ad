"""Molecules as SMILES: validity, uniqueness, novelty, and the mean of a property (QM9 in ProSeCo).

Smiles(property="qed", train="data/qm9")     needs rdkit: pip install rediff-lightning[smiles]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from src.io.errors import UserError
from src.io.shards import read_manifest, read_shard
from src.metrics.caption import CaptionMetric, Stat, hash64, summarise
from src.metrics.text import references_of

Property = Literal["qed", "rings", "logp", "weight"]


class Smiles(CaptionMetric):
    """Per text `valid`, 1 if rdkit parses it as a molecule with at least one atom. Over all texts:

    unique: number of distinct molecules (by canonical SMILES) divided by the number of valid texts
    novel:  with `train`: share of the distinct molecules that are not in the training set; num_novel: their number
    property (`qed`, `rings`, `logp`, `weight`): its mean over the distinct (with `train`: the novel) molecules

    train: folder written by `src.prepare`; the captions of its split `train` are the training set

    Raises UserError for an unknown property, if rdkit is missing, or if `train` has no such split.
    """

    higher_is_better = True
    names = ("valid",)
    hashes: list[Tensor] | Tensor
    values: list[Tensor] | Tensor

    def __init__(self, *, property: Property | None = None, train: str | None = None) -> None:
        super().__init__()
        if property is not None and property not in get_args(Property):
            raise UserError(f"property must be null or one of {', '.join(get_args(Property))}, got {property!r}")
        chemistry()  # fails early if rdkit is missing
        if train is not None and not (Path(train) / "train").is_dir():
            raise UserError(f"train={train!r} holds no split 'train'; give a folder written by src.prepare")
        self.property: Property | None = property
        self.train_path = train
        self.add_state("hashes", [], dist_reduce_fx="cat")  # of canonical SMILES
        self.add_state("values", [], dist_reduce_fx="cat")  # the property of each molecule; 0 without a property

    def score(self, text: str, record: dict) -> dict[str, float]:
        return {"valid": float(_molecule(text) is not None)}

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        super().update(texts, records)
        assert isinstance(self.hashes, list)
        assert isinstance(self.values, list)
        molecules = [molecule for text in texts if (molecule := _molecule(text)) is not None]
        hashes = [hash64(chemistry().MolToSmiles(molecule)) for molecule in molecules]
        values = [property_of(molecule, self.property) if self.property else 0.0 for molecule in molecules]
        self.hashes.append(torch.tensor(hashes, dtype=torch.int64, device=self.total.device))
        self.values.append(torch.tensor(values, dtype=torch.float64, device=self.total.device))

    def compute(self) -> dict[str, Stat]:
        stats = super().compute()
        hashes, values = (torch.cat(s) if isinstance(s, list) else s for s in (self.hashes, self.values))
        molecules = dict(zip(hashes.tolist(), values.tolist(), strict=True))
        stats["unique"] = _share(len(molecules), len(hashes))
        if self.train_path is not None:
            trained_on, num_distinct = training_hashes(self.train_path), len(molecules)
            molecules = {digest: value for digest, value in molecules.items() if digest not in trained_on}
            stats["novel"] = _share(len(molecules), num_distinct)
            stats["num_novel"] = Stat(mean=float(len(molecules)), se=None, n=int(self.count))
        if self.property and molecules:
            stats[self.property] = summarise(list(molecules.values()))
        elif self.property:
            stats[self.property] = Stat(mean=float("nan"), se=None, n=0)
        return stats


@functools.cache
def chemistry() -> Any:
    """The module `rdkit.Chem`, with rdkit's log switched off. Raises UserError if rdkit is missing."""
    try:
        from rdkit import Chem, RDLogger  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("SMILES need rdkit: pip install rediff-lightning[smiles]") from error
    RDLogger.DisableLog("rdApp.*")  # pyright: ignore[reportAttributeAccessIssue]
    return Chem


def property_of(molecule: Any, name: Property) -> float:
    """A property of an rdkit molecule. `rings`: size of the smallest set of smallest rings, 2 for norbornane."""
    from rdkit.Chem import QED, Crippen, Descriptors  # pyright: ignore[reportMissingImports]

    functions: dict[str, Callable] = {
        "qed": QED.qed,
        "rings": lambda molecule: len(chemistry().GetSSSR(molecule)),  # CalcNumRings gives 3 for norbornane
        "logp": Crippen.MolLogP,  # pyright: ignore[reportAttributeAccessIssue]
        "weight": Descriptors.MolWt,  # pyright: ignore[reportAttributeAccessIssue]
    }
    return float(functions[name](molecule))


@functools.lru_cache(maxsize=4)
def training_hashes(path: str) -> frozenset[int]:
    """Hashes of the canonical SMILES of all captions in the split `train` of a data folder."""
    folder = Path(path) / "train"
    shards = [folder / entry["name"] for entry in read_manifest(folder)["shards"]]
    texts = (text for shard in shards for sample in read_shard(shard) for text in references_of(sample["json"]))
    molecules = (_molecule(text) for text in texts)
    return frozenset(hash64(chemistry().MolToSmiles(molecule)) for molecule in molecules if molecule is not None)


def _molecule(text: str) -> Any:
    """The molecule that a text encodes, or None. An empty text is None, too: rdkit parses it as zero atoms."""
    molecule = chemistry().MolFromSmiles(text.strip())
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def _share(part: int, whole: int) -> Stat:
    return Stat(mean=part / whole if whole else 0.0, se=None, n=whole)
