"""Write a dataset as shards: procedural scenes, photographs with annotation files, or texts without images.

    python -m src.prepare conf=scenes prepare.out=data/scenes
    python -m src.prepare conf=photos prepare.images=DIR prepare.annotations=FILE prepare.out=data/photos
    python -m src.prepare conf=text prepare.files=book.txt             plain text, packed into rows of equal length
    python -m src.prepare conf=sft prepare.files=gsm8k_train.jsonl     prompts with responses
    python -m src.prepare conf=smiles prepare.files=qm9_smiles.csv     molecules with a class label
    python -m src.prepare show=data/photos [seed=0]                    look at a dataset, a split or a round

    OUT/index.json  OUT/tokenizer/  OUT/{train,val,test}/{index.json, train-000000.tar, ...}
    OUT/manifest.json  OUT/rejects.jsonl      sources, shards and statistics; everything that was left out

Annotations are JSON (a list or a mapping), JSONL, tables (CSV, TSV, captions.txt; also with ; or |) or Parquet, with
images in it or without. The keys of a record tell its format:
    {"image": "a.jpg", "caption": "A cat."}          or image_id, file_name, ...; captions: a list, text, output, ...
    {"a.jpg": "A cat.", "b.jpg": ["A dog."]}         file names with captions
    {"images": [...], "annotations": [...]}          COCO
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    {"images": ["a.jpg"], "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    conversations and "revise": [{"org": "a dog", "target": "a cat"}]              ReDiff: the answer has errors
    "original_caption", "changed_caption", "solution_original", "solution_target"  ViCrit: "image" as above
Several sources, each with its own files, images and prompt: conf=data/coco_captions or conf=data/rediff_260k.
A record may set "split" (train, val or test) and "prompt". Other images are split by a hash of their names; with three
or more of them, each split gets at least one.

Texts are read from .txt files and from the same kinds of record files, and split by a hash of each text, unless files
are given per split: prepare.files={train: FILE, val: FILE, test: FILE}. Unusable records are left out and counted, with
an example of each reason.

show=PATH prints settings, counts and lengths, names what looks wrong (one caption on many images, refusals of a
labelling model, captions that are cut off, special tokens in texts, tiny images, ...), and writes PATH/contact.html, a
page of samples with hallucinated spans marked.

The dataset is written into OUT.partial and renamed to OUT at the end, so a killed run leaves nothing that looks
finished. The same command continues it, and does nothing once OUT is complete and its source files are unchanged. The
same settings write the same bytes, with any number of processes (prepare.processes; null: all cores).
"""

from __future__ import annotations

import sys

from src.cli.config import load_config
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import build
from src.preparation.counts import table
from src.preparation.show import show, show_arguments


@main_guard
def main(argv: list[str]) -> None:
    if any(argument.startswith("show=") for argument in argv):
        sys.stdout.write(show(**show_arguments(argv)) + "\n")
        return
    config = load_config(argv, verb="src.prepare", needs=NEEDS["src.prepare"])
    dataset = build(config.prepare)
    index = dataset.run()
    sys.stdout.write(f"{table(index['counts'], index.get('examples', {}))}\n{dataset.summary()}\n")


if __name__ == "__main__":
    main()
