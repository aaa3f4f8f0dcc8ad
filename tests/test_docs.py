"""The commands of README and docs, run in a folder of their own with the smallest settings that still do something.

A block that needs what a test machine lacks says so in a comment above it: <!-- not run: needs released weights -->
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from src.export import main as export
from src.models.hf.folder import save_pretrained
from src.models.llada_v import LLaDAV
from src.models.tiling import anyres
from src.text.tokenizer import Codec

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- not run: .* -->\n)?```(bash|python|yaml)\n(.*?)```", re.S)
# In this order, as later pages use what earlier ones make.
NAMES = (
    *("docs/training", "docs/tensorboard", "docs/data", "docs/online", "docs/evaluation", "docs/serving", "README"),
    *("docs/unequal", "docs/memory", "docs/lora", "docs/llada_v"),
)
PAGES = [f"{name}.md" for name in NAMES]
SMALL = {
    "prepare conf=scenes": ["prepare.num_train=64", "prepare.num_val=8", "prepare.num_test=8"],
    "train": [
        "trainer.max_steps=2",
        "trainer.limit_val_batches=1",
        "data.batch_size=4",
        "data.workers=0",
        "optim.warmup_steps=0",
    ],
    "train conf=stage2": ["callbacks.self_correction.drafts_per_round=4", "callbacks.self_correction.allow_empty=true"],
    "draft": ["num=4"],
    "evaluate": ["evaluate.num=2", "evaluate.tokens_per_step=[8]"],
}


def small(command: str) -> list[str]:
    """The settings that make a command small, as far as it does not set them itself."""
    if "conf=eval/report" in command:  # which captions nothing
        return []
    settings = [s for start, more in SMALL.items() if command.startswith(f"python -m src.{start}") for s in more]
    if "data/photos" in command:  # the pages promise these for fewer photographs than a batch has rows
        settings = [setting for setting in settings if not setting.startswith("data.batch_size=")]
    given = re.findall(r"\+?([\w.]+)=", command)
    return [s for s in settings if not any(f"{s.partition('=')[0]}.".startswith(f"{key}.") for key in given)]


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks of a page that can be run here."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(language, block) for skipped, language, block in BLOCK.findall(text) if not skipped]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code, with the data that the pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("src", "callbacks", "datamodules", "conf", "assets"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copytree(ROOT / "docs" / "llada_v", folder / "docs" / "llada_v")
    (folder / "photos").mkdir()
    captions = {}
    for number, name in enumerate("abcdefgh"):
        Image.new("RGB", (90, 70), (30 * number, 120, 200)).save(folder / "photos" / f"{name}.png")
        captions[f"{name}.png"] = f"A plain picture, number {number} of eight."
    (folder / "captions.json").write_text(json.dumps(captions))
    write_original(folder / "LLaDA-V", folder / "own")
    (folder / "book.txt").write_text("\n".join(f"The {n} foxes jump over {n * n} dogs." for n in range(2000)))
    pairs = [json.dumps({"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."}) for n in range(200)]
    (folder / "gsm8k.jsonl").write_text("\n".join(pairs))
    poems = [json.dumps({"title": f"Poem {n}", "text": f"Roses are red, number {n}."}) for n in range(60)]
    (folder / "poems.jsonl").write_text("\n".join(poems))
    (folder / "qm9.csv").write_text("\n".join(["smiles", *("C" * (n % 9 + 1) + "O" * (n % 4) for n in range(400))]))
    return folder


def write_original(folder: Path, own: Path) -> None:
    """A model with LLaDA-V's layout, names and tiles, and small numbers."""
    texts = ["A plain picture, number 0123456789 of eight. Please describe the image in detail. Describe the picture."]
    codec = Codec.train(texts, vocab_size=400)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 384, "patch_size": 14}
    decoder = {"vocab_size": codec.vocab_size, **sizes}
    model = LLaDAV(decoder=decoder, vision=vision, tiling=anyres(384).to_dict(), image_id=codec.image_id)
    save_pretrained(model.bfloat16(), codec, own)
    export(["conf=export", f"model={own}", f"out={folder}", "format=llada_v"])


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(folder: Path, page: str) -> None:
    """Files of a page (`# src/...` in their first line) are written, and its commands run in order."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    failed, num_run = [], 0
    for language, block in blocks(page):
        if language != "bash":
            if named := re.match(r"# ((?:src|conf)/\S+)\n", block):
                (folder / named[1]).write_text(block)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            command = line.partition("  #")[0].strip()
            if not command.startswith("python -m src."):
                continue
            arguments = [sys.executable, *shlex.split(command)[1:], *small(command)]
            done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
            num_run += 1
            if done.returncode:
                failed.append(f"{command}\n{done.stderr[-1500:]}")
    assert not failed, "\n\n".join(failed)
    assert num_run


def test_every_block_is_run_or_says_why_not() -> None:
    """Pages that no test runs have no command that could be run here."""
    others = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")} - set(PAGES)
    commands = {page: [b for language, b in blocks(page) if language == "bash" and "src." in b] for page in others}
    assert {page: found for page, found in commands.items() if found} == {}
