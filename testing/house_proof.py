"""Proof that a refactoring changes no number: record what the verbs compute, before and after, and compare.

    python -m testing.house_proof record OUT [--only GROUP ...]   in the checkout to record; about 15 minutes on 2 cores
    python -m testing.house_proof compare BEFORE AFTER            exit code 1 and a list of differences, or "equal"

    prepare     scenes, photographs, text, prompts, molecules: image bytes, texts, records
    losses      20 steps of every objective: each logged loss and gradient norm, and the trained tensors
    ranks       the same on two ranks (DDP, FSDP2)
    samplers    ids of every step of every yaml in conf/sampler, on the embedded base model
    round       an online round and the offline one: texts, edits, draft ids, manifests
    export      tensors and config.json
    evaluate    results of two samplers

Everything runs through `python -m src.VERB`, so the script does not depend on how the code inside is arranged. A
checkout from before a rename is driven with the old names (`OLD_SETTINGS`), and its JSON is read through `RENAMED`.
Losses, norms, ids, images, texts, edits, tensors and settings must be equal bit for bit; `VARIES` and `VARYING_PLACES`
list what may not be: times, and hashes of settings, code and indexes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

ROOT = Path.cwd()
# Names of settings today -> in a checkout that has no src/types.py yet.
OLD_SETTINGS = {"response_length": "canvas", "conf=edit_noise": "conf=edits", "optim.": "objective" + ".training."}
# Keys and words of the JSON of such a checkout -> today's.
RENAMED = {
    '"canvas"': '"response_length"',
    "src.diffusion.sampler.": "src.samplers.sampler.",
    "src.diffusion.unmask.": "src.samplers.unmask.",
    "src.diffusion.revisers.OverwriteAll": "src.samplers.rediff.OverwriteAll",
}
# Times, and hashes of settings, of code and of indexes, whose names and format number changed.
VARIES = {"drawing", "waited", "wall_s", "seconds", "created", "format", "options", "signature", "code", "index_sha256"}
VARYING_PLACES = re.compile(r"/settings(\.json)?/data$|/meta/model_configs/|/examples/")
OBJECTIVES = {
    "mask": ["conf=mask"],
    "stage1": ["conf=stage1"],
    "paper": ["conf=stage1,objective/rediff_paper"],
    "released": ["conf=stage1,objective/rediff_released"],
    "proseco": ["conf=proseco", "optim.micro_batch=3"],
    "complementary": ["conf=complementary", "optim.views=2", "optim.antithetic=true"],
    "edit_noise": ["conf=edit_noise", "objective.begin=0.2"],
    "hybrid": ["conf=hybrid"],
    "uniform": ["conf=uniform"],
    "scene_labels": ["conf=base_phases/tower", "data.response_length=64"],
}
RANKS = {"stage1-ddp": ("stage1", "ddp"), "proseco-fsdp2": ("proseco", "fsdp2"), "mask-fsdp2": ("mask", "fsdp2")}
QUIET = ["callbacks.samples=null", "callbacks.progress=null", "callbacks.throughput=null"]


class Recorder:
    """Runs the verbs in a scratch folder and collects what they computed."""

    def __init__(self, out: Path) -> None:
        self.out, self.work = out, out / "work"
        self.is_old = not (ROOT / "src" / "types.py").exists()
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, verb: str, *settings: str, ranks: int = 1) -> None:
        """One verb with the settings; the error output of one that fails."""
        settings = tuple(map(self.named, settings))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        start = [sys.executable, "-m"]
        if ranks > 1:
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        done = subprocess.run([*start, f"src.{verb}", *settings], cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{verb} {' '.join(settings)}: exit code {done.returncode}\n{done.stderr[-3000:]}")

    def named(self, setting: str) -> str:
        for today, before in OLD_SETTINGS.items() if self.is_old else ():
            setting = setting.replace(today, before)
        return setting

    def write(self, name: str, content: Any) -> None:
        (self.out / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()

    # 1. data

    def prepare(self) -> None:
        scenes, photos = self.work / "scenes", self.work / "photos-in"
        counts = ["prepare.num_train=96", "prepare.num_val=16", "prepare.num_test=16", "prepare.captions_per_image=2"]
        self.run("prepare", "conf=scenes", f"prepare.out={scenes}", *counts)
        self.run("prepare", "conf=scenes", f"prepare.out={self.work / 'trained'}", "prepare.tokenizer=null", *counts)
        draw_photos(photos)
        annotations = [f"prepare.annotations={photos / 'captions.json'}", f"prepare.images={photos}"]
        self.run("prepare", "conf=photos", f"prepare.out={self.work / 'photos'}", *annotations)
        lines = [f"The {n} quick brown foxes jump over {n * n} lazy dogs.\nNobody counted them." for n in range(400)]
        (self.work / "book.txt").write_text("\n".join(lines), encoding="utf-8")
        self.run("prepare", "conf=text", f"prepare.files={self.work / 'book.txt'}", "prepare.split=rows",
                 f"prepare.out={self.work / 'text'}")  # fmt: skip
        pairs = [json.dumps({"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."}) for n in range(200)]
        (self.work / "sft.jsonl").write_text("\n".join(pairs), encoding="utf-8")
        self.run("prepare", "conf=sft", f"prepare.files={self.work / 'sft.jsonl'}", f"prepare.out={self.work / 'sft'}")
        rings = ["smiles", *("C" * n + ("c1ccccc1" if n % 5 == 0 else "O") for n in range(1, 30))]
        (self.work / "molecules.csv").write_text("\n".join(rings), encoding="utf-8")
        self.run("prepare", "conf=smiles", f"prepare.files={self.work / 'molecules.csv'}",
                 f"prepare.out={self.work / 'smiles'}")  # fmt: skip
        for name in ("scenes", "trained", "photos", "text", "sft", "smiles"):
            self.write(f"prepare-{name}", dataset(self.work / name))

    # 2. training

    def train(self, name: str, conf: list[str], *more: str, ranks: int = 1) -> dict:
        run = self.work / "runs" / name
        text = f"data.path={self.work / 'scenes'}"
        self.run(
            "train", *conf, *more, f"run_dir={run}", text, "tokenizer=assets/base", "data.batch_size=8",
            "trainer.max_steps=20", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=2",
            "optim.warmup_steps=5", "resume=false", *QUIET, ranks=ranks,
        )  # fmt: skip
        return {"scalars": scalars(run), "tensors": tensors(run / "model" / "model.safetensors")}

    def losses(self) -> None:
        def one(name: str) -> None:
            self.write(f"losses-{name}", self.train(name, OBJECTIVES[name]))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, OBJECTIVES))

    def ranks(self) -> None:
        for name, (objective, strategy) in RANKS.items():
            conf = [f"{OBJECTIVES[objective][0]},parallel/{strategy}", *OBJECTIVES[objective][1:]]
            more = ["trainer.devices=2", "trainer.accelerator=cpu"]
            self.write(f"ranks-{name}", self.train(name, conf, *more, ranks=2))

    # 3. sampling

    def samplers(self) -> None:
        def one(name: str) -> None:
            out = self.work / f"captions-{name}.jsonl"
            for file in (out, out.with_suffix(".trace.jsonl")):
                file.unlink(missing_ok=True)
            few = ["length=32", "batch_size=5"]
            self.run("generate", "conf=generate", "model.path=assets/base", f"images={self.work / 'scenes' / 'val'}",
                     f"sampler={name}", f"out={out}", "trace=true", *few)  # fmt: skip
            self.write(f"sampler-{name}", {"lines": jsonl(out), "steps": jsonl(out.with_suffix(".trace.jsonl"))})

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, sorted(path.stem for path in (ROOT / "conf" / "sampler").glob("*.yaml"))))

    # 4. rounds

    def round(self) -> None:
        content = self.train(
            "stage2", ["conf=stage2"], "model.path=assets/base", "callbacks.self_correction.drafts_per_round=24",
            "callbacks.self_correction.sampler.tokens_per_step=4",
        )  # fmt: skip
        self.write("round-training", content)
        self.write("round-online", dataset(self.work / "runs" / "stage2" / "rounds"))
        drafts, out = self.work / "drafts", self.work / "rounds" / "round-0001"
        for folder in (drafts, out):
            shutil.rmtree(folder, ignore_errors=True)
        self.run("draft", "conf=draft", "model.path=assets/base", f"data.path={self.work / 'scenes'}", f"out={drafts}",
                 "num=16")  # fmt: skip
        self.run("revise", "conf=revise,expert/reference", f"drafts={drafts}", f"out={out}", "tokenizer=assets/base")
        self.write("round-drafts", dataset(drafts))
        self.write("round-offline", dataset(out))

    # 5. the rest

    def export(self) -> None:
        out = self.work / "exported"  # the released layouts are held by the golden tests
        shutil.rmtree(out, ignore_errors=True)
        model = self.work / "runs" / "stage1" / "model"
        self.run("export", "conf=export", f"model={model}", f"out={out}", "format=own")
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        self.write("export", {"tensors": tensors(out / "model.safetensors"), "config": config})

    def evaluate(self) -> None:
        out = self.work / "evaluate"
        shutil.rmtree(out, ignore_errors=True)
        runs = [f"evaluate.models.{name}={self.work / 'runs' / name / 'model'}" for name in ("mask", "stage1")]
        self.run("evaluate", "conf=evaluate", *runs, "evaluate.models.stage2=null", "evaluate.tokens_per_step=[2,8]",
                 f"evaluate.data.path={self.work / 'scenes'}", "evaluate.num=16", f"evaluate.out={out}")  # fmt: skip
        self.write("evaluate", json.loads((out / "results.json").read_text(encoding="utf-8")))


GROUPS = ("prepare", "losses", "ranks", "samplers", "round", "export", "evaluate")


def draw_photos(folder: Path) -> None:
    """Six images in six forms, with captions."""
    folder.mkdir(exist_ok=True)
    modes = ["RGB", "RGBA", "L", "CMYK", "RGB", "P"]
    captions = {}
    for number, mode in enumerate(modes):
        image = Image.new("RGB", (90 + 30 * number, 120), (40 * number, 120, 200 - 30 * number))
        ImageDraw.Draw(image).ellipse((10, 20, 60 + 5 * number, 90), fill=(250, 30 * number, 60))
        name = f"{number}.{'png' if mode in ('RGBA', 'P', 'L') else 'jpg'}"
        image.convert(mode).save(folder / name)
        captions[name] = [f"A round thing, number {number}.", f"Picture {number} — naïve, with “quotes”."]
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")


def dataset(folder: Path) -> dict:
    """All JSON below a folder and in its shards; images and other members by their hash."""
    content: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json" and path.is_file():
            content[name] = json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".tar":
            content[name] = dict(members(path))
    return content


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, JSON or hash) of each member of a shard."""
    with tarfile.open(path) as tar:
        for member in tar:
            raw = tar.extractfile(member).read()  # type: ignore[union-attr]
            yield member.name, json.loads(raw) if member.name.endswith(".json") else hashlib.sha256(raw).hexdigest()


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def tensors(path: Path) -> dict[str, str]:
    """The hash of every tensor, by name."""
    from safetensors.numpy import load

    return {
        name: f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
        for name, array in load(path.read_bytes()).items()
    }


def scalars(folder: Path) -> dict[str, list]:
    """(step, value) of what was logged; the values as the float32 that TensorBoard keeps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [[event.step, event.value] for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not re.search(r"seconds|_s$|wait|latency|memory|per_second|overhead|/time", tag)
    }


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Where two recordings differ, one line each."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after} - VARIES):
            missing = key not in before or key not in after
            if missing and not (before.get(key) or after.get(key)):
                continue  # an empty entry, or a setting that is not set
            if missing and not VARYING_PLACES.search(f"{place}/{key}"):
                yield f"{place}/{key}: only {'after' if key in after else 'before'}"
            elif not missing:
                yield from differences(before[key], after[key], f"{place}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{place}/{number}")
    elif before != after and not VARYING_PLACES.search(place):
        yield f"{place}: {str(before)[:80]} -> {str(after)[:80]}"


def compare(before: Path, after: Path) -> int:
    """The number of differences; prints them by file."""
    names = sorted({path.name for folder in (before, after) for path in folder.glob("*.json")})
    if not names:
        sys.exit(f"no recordings in {before} and {after}")
    total = 0
    for name in names:
        if not (before / name).exists() or not (after / name).exists():
            lines = [f"only {'after' if (after / name).exists() else 'before'}"]
        else:
            # paths inside the recording's own folder are the same path
            texts = [(folder / name).read_text().replace(str(folder.resolve()), "") for folder in (before, after)]
            for old, new in RENAMED.items():
                texts[0] = texts[0].replace(old, new)
            lines = list(differences(*map(json.loads, texts)))
        total += len(lines)
        for line in lines[:12]:
            sys.stdout.write(f"{name}: {line}" + "\n")
        if len(lines) > 12:
            sys.stdout.write(f"{name}: ... and {len(lines) - 12} more" + "\n")
    sys.stdout.write(
        f"{len(names)} recordings, {total} differences" if total else f"{len(names)} recordings: equal" + "\n"
    )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record")
    record.add_argument("out", type=Path)
    record.add_argument("--only", nargs="*", choices=GROUPS, default=GROUPS)
    pair = commands.add_parser("compare")
    pair.add_argument("before", type=Path)
    pair.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        sys.exit(bool(compare(given.before, given.after)))
    recorder = Recorder(given.out.resolve())
    for group in given.only:
        getattr(recorder, group)()


if __name__ == "__main__":
    main()
