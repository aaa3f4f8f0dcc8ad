"""Generate: caption images with a trained model, correct a flawed caption, or answer questions without an image.

    python -m src.generate conf=generate model.path=runs/stage2/model images=data/scenes/test
    python -m src.generate conf=generate model=llada_v model.path=... images=photos/ prompt="Describe it." steps=32
    python -m src.generate conf=generate model.path=... images=a.png prompt=... caption="A red ring is"
    python -m src.generate conf=generate model=llada model.path=... images=null prompt=questions.jsonl
    python -m src.generate conf=generate model.path=... images=null prompt=data/smiles/test temperature=1 cfg_scale=1
    python -m src.generate conf=generate model.path=... images=photos/ prompt=... num=8 html=trace.html
    python -m src.generate conf=correct model.path=... images=photos/ prompt=... captions=theirs.jsonl

    file, folder, split or questions -> batches of readable samples -> sampler -> OUT, one JSON line per response

The lines of a batch are written before the next batch starts, so the same command continues a killed run. Unreadable
images are named and counted and the rest continues; the exit code is 1 if no image could be read.
"""

from __future__ import annotations

import sys

from src.cli.config import load_config
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.generation.run import TEXTS, respond
from src.io.words import counted

SHOWN = 20  # responses printed at the end; the file has all of them


@main_guard
def main(argv: list[str]) -> None:
    """Write a response for each image or question that the config names."""
    done = respond(load_config(argv, verb="src.generate", needs=NEEDS["src.generate"], texts=TEXTS))
    # responses to standard output, a summary to standard error
    if done.corrected:
        sys.stdout.write(done.corrected)
    else:
        sys.stdout.writelines(f"{key}: {text}\n" for key, text in done.texts[:SHOWN])
    if len(done.texts) > SHOWN and not done.corrected:
        sys.stdout.write(f"... and {len(done.texts) - SHOWN} more in {done.path}\n")
    parts = [f"{counted(len(done.texts), 'caption')} written to {done.path}"]
    if done.skipped:
        parts.append(f"{done.skipped} already there")
    if done.unreadable:
        parts.append(f"{counted(len(done.unreadable), 'image')} could not be read: {', '.join(done.unreadable)}")
    sys.stderr.write("; ".join(parts) + "\n")
    if done.page:
        sys.stderr.write(f"to watch how they were written, open {done.page} in a browser\n")
    if done.unreadable and not done.texts and not done.skipped:
        sys.exit(1)


if __name__ == "__main__":
    main()
