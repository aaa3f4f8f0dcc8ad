"""Molecules as SMILES: validity, uniqueness, novelty, and the mean of a property (QM9 in ProSeCo).

Smiles(property="qed", train="data/qm9")     needs rdkit: pip install rediff-lightning[smiles]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from src.io.errors import UserError
from src.io.shards import read_manifest, read_shard
from src.metrics.caption import CaptionMetric, Stat, concatenated, hash64, plain, summarise
from src.metrics.text import references_of

Property = Literal["qed", "rings", "logp", "weight"]


class Smiles(CaptionMetric):
    """Per text `valid`, 1 if rdkit parses it as a molecule with at least one atom. Over all texts:

    unique: number of distinct molecules (by canonical SMILES) divided by the number of valid texts
    novel: share of the distinct molecules that the split `train` of the data folder `train` lacks; num_novel: how many
    property (`qed`, `rings`, `logp`, `weight`): its mean over the distinct (with `train`: the novel) molecules
    """

    higher_is_better = True
    names = ("valid",)
    hashes: Any  # list[Tensor], or a Tensor once reduced over ranks
    values: Any

    def __init__(self, *, property: Property | None = None, train: str | None = None) -> None:
        super().__init__()
        chemistry()  # fails early if rdkit is missing
        if train is not None and not (Path(train) / "train").is_dir():
            raise UserError(f"train={train!r} holds no split 'train'; give a folder written by src.prepare")
        self.property: Property | None = property
        self.train_path = train
        self.add_state("hashes", [], dist_reduce_fx="cat")  # of canonical SMILES
        self.add_state("values", [], dist_reduce_fx="cat")  # the property of each molecule; 0 without a property

    def score(self, text: str, record: dict) -> dict[str, float]:
        return {"valid": float(molecule_of(text) is not None)}

    def update(self, texts: Sequence[str], records: Sequence[dict]) -> None:
        super().update(texts, records)
        molecules = [molecule for text in texts if (molecule := molecule_of(text)) is not None]
        hashes = [hash64(chemistry().MolToSmiles(molecule)) for molecule in molecules]
        values = [property_of(molecule, self.property) if self.property else 0.0 for molecule in molecules]
        self.hashes.append(torch.tensor(hashes, dtype=torch.int64, device=self.device))
        self.values.append(torch.tensor(values, dtype=torch.float64, device=self.device))

    def compute(self) -> dict[str, Stat]:
        stats = super().compute()
        hashes, values = concatenated(self.hashes).tolist(), concatenated(self.values).tolist()
        molecules = dict(zip(hashes, values, strict=True))
        num_distinct = len(molecules)
        stats["unique"] = plain(num_distinct / len(hashes) if hashes else 0.0, len(hashes))
        if self.train_path is not None:
            trained_on = training_hashes(self.train_path)
            molecules = {digest: value for digest, value in molecules.items() if digest not in trained_on}
            novel = len(molecules) / num_distinct if num_distinct else 0.0
            stats["novel"] = plain(novel, num_distinct)
            stats["num_novel"] = plain(float(len(molecules)), stats["valid"]["n"])
        if self.property:
            nothing = plain(float("nan"), 0)
            stats[self.property] = summarise(list(molecules.values())) if molecules else nothing
        return stats


@functools.cache
def chemistry() -> Any:
    """The module `rdkit.Chem`, with rdkit's log switched off."""
    try:
        from rdkit import Chem, RDLogger  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("SMILES need rdkit: pip install rediff-lightning[smiles]") from error
    RDLogger.DisableLog("rdApp.*")  # pyright: ignore[reportAttributeAccessIssue]
    return Chem


def property_of(molecule: Any, name: Property) -> float:
    from rdkit.Chem import QED, Crippen, Descriptors  # pyright: ignore[reportMissingImports]

    if name == "rings":  # the smallest set of smallest rings, 2 for norbornane; CalcNumRings gives 3
        return float(len(chemistry().GetSSSR(molecule)))
    functions: Any = {"qed": QED.qed, "logp": Crippen.MolLogP, "weight": Descriptors.MolWt}  # pyright: ignore[reportAttributeAccessIssue]
    return float(functions[name](molecule))


@functools.lru_cache(maxsize=4)
def training_hashes(path: str) -> frozenset[int]:
    folder, hashes = Path(path) / "train", set()
    for entry in read_manifest(folder)["shards"]:
        for sample in read_shard(folder / entry["name"]):
            molecules = map(molecule_of, references_of(sample["json"]))
            hashes |= {hash64(chemistry().MolToSmiles(molecule)) for molecule in molecules if molecule is not None}
    return frozenset(hashes)


def molecule_of(text: str) -> Any:
    """The molecule that a text encodes, or None. An empty text is None, too: rdkit parses it as zero atoms."""
    molecule = chemistry().MolFromSmiles(text.strip())
    return molecule if molecule is not None and molecule.GetNumAtoms() else None
