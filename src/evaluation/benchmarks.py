"""The data of the papers' benchmarks: their files as downloaded -> items with images, references and questions.

    CapMAS(folder="raw/capmas").items()        [Item(key="aar_test_04600", image=..., references=(...), extra=...), ...]

    CapMAS        data.jsonl, COVERAGE_TEST_VQA/, images/     1,000 images of DOCCI: CLAIR, Coverage, Factuality
    CapArena      caparena_auto_600.json, images/             600 images of DOCCI: battles with three models
    DetailCaps    DetailCaps-4870.parquet                     4,870 images with three references each

conf/eval/*.yaml say where each comes from and what its licence allows.
"""

from __future__ import annotations

import base64
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from src.io.errors import UserError
from src.io.files import read_json, sha256, write_bytes
from src.judges.base import Item
from src.metrics.caparena import BASELINES
from src.preparation.records import read_parquet


class BenchmarkData(ABC):
    """The images of a benchmark. folder: where its files are; get: the commands that bring them to {folder}"""

    get: str

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)

    @property
    def _get(self) -> str:
        return self.get.format(folder=self.folder)

    @property
    @abstractmethod
    def sources(self) -> list[Path]:
        """The files that hold references, questions and rivals."""

    @property
    def digest(self) -> str:
        """A hash of the sources: captions are comparable only if they are judged on the same ones."""
        return hashlib.sha256("".join(map(sha256, self.sources)).encode()).hexdigest()[:16]

    @abstractmethod
    def items(self) -> list[Item]:
        """All images in the order of the benchmark, without captions. Raises UserError if a file is missing."""

    def need(self, *names: str) -> None:
        """Raise UserError for the files and folders that are not there."""
        if missing := [name for name in names if not (self.folder / name).exists()]:
            raise UserError(f"{self.folder} has no {', '.join(missing)}; get them with\n  {self._get}")

    def images(self, stems: Sequence[str]) -> list[Path]:
        """The image files of these names, which may lie in subfolders of images/."""
        extensions = Image.registered_extensions()
        files = {path.stem: path for path in (self.folder / "images").rglob("*") if path.suffix.lower() in extensions}
        if missing := [stem for stem in stems if stem not in files]:
            raise UserError(
                f"{self.folder}/images lacks {len(missing)} of {len(stems)} images, {missing[0]} among them; get them "
                f"with\n  {self._get}"
            )
        return [files[stem] for stem in stems]


class CapMAS(BenchmarkData):
    """Reference, multiple-choice questions and answers of each image."""

    get = (
        "git clone https://github.com/adobe-research/CapMAS && cp -r CapMAS/data/* {folder}\n"
        "  hf download --repo-type dataset saehyungl/CapMAS images_capmas.tar.gz --local-dir {folder}\n"
        "  mkdir {folder}/images && tar -xzf {folder}/images_capmas.tar.gz -C {folder}/images"
    )
    questions = "COVERAGE_TEST_VQA"

    @property
    def sources(self) -> list[Path]:
        return [self.folder / "data.jsonl", *sorted((self.folder / self.questions).glob("*.json"))]

    def items(self) -> list[Item]:
        self.need("data.jsonl", self.questions, "images")
        lines = (self.folder / "data.jsonl").read_text("utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
        images = self.images([record["image"] for record in records])
        items = []
        for row, (record, image) in enumerate(zip(records, images, strict=True)):
            self.need(f"{self.questions}/{record['image']}.json")
            asked = read_json(self.folder / self.questions / f"{record['image']}.json")
            questions = ["\n".join(map(str.strip, question.split("\n"))) for question in asked["questions"]]
            extra = {"questions": questions, "answers": asked["answers"], "dataset": record["dataset"]}
            key, references = record["image"], (record["caption"],)
            items.append(Item(key=key, row=row, caption=None, image=image, references=references, extra=extra))
        return items


class CapArena(BenchmarkData):
    """A human reference, and the caption of the model that the image is assigned to."""

    get = (
        "git clone https://github.com/njucckevin/CapArena && grep -i download CapArena/README.md\n"
        "  which links caparena_auto_600.json (to {folder}) and its 600 images (to {folder}/images)"
    )
    file = "caparena_auto_600.json"

    @property
    def sources(self) -> list[Path]:
        return [self.folder / self.file]

    def items(self) -> list[Item]:
        self.need(self.file, "images")
        records = read_json(self.folder / self.file)
        images = self.images([Path(name).stem for name in records])
        items = []
        for row, ((name, record), image) in enumerate(zip(records.items(), images, strict=True)):
            rival, captions = record["ref_model"], record["captions"]
            if rival not in BASELINES or rival not in captions:
                raise UserError(f"{self.folder / self.file}: {name} is against {rival!r}, not one of {BASELINES}")
            extra = {"rival": captions[rival], "baseline": BASELINES.index(rival)}
            references = (captions["human"],)
            items.append(Item(key=name, row=row, caption=None, image=image, references=references, extra=extra))
        return items


class DetailCaps(BenchmarkData):
    """Three references by models of each image. The images are unpacked beside the file, as 0000.jpg and so on.

    file: DetailCaps-4870.parquet, or one of the refined ones, whose scores are not comparable
    """

    get = (
        "hf download --repo-type dataset foundation-multimodal-models/DetailCaps-4870 DetailCaps-4870.parquet "
        "--local-dir {folder}"
    )
    references = ("GT_Caption_GPT4O", "GT_Caption_GPT4V", "GT_Caption_Gemini15Pro")

    def __init__(self, *, folder: str, file: str = "DetailCaps-4870.parquet") -> None:
        super().__init__(folder=folder)
        self.file = file

    @property
    def sources(self) -> list[Path]:
        return [self.folder / self.file]

    def items(self) -> list[Item]:
        self.need(self.file)
        (self.folder / "images").mkdir(exist_ok=True)
        items = []
        for row, (_, record) in enumerate(read_parquet(self.folder / self.file)):
            image = self.folder / "images" / f"{row:04}.jpg"
            if not image.exists():
                data = record["binary"]
                write_bytes(image, base64.b64decode(data) if isinstance(data, str) else data)
            references = tuple(record[name] for name in self.references)
            items.append(Item(key=record["image"], row=row, caption=None, image=image, references=references))
        return items
