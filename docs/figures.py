"""Draw the figures of the documentation: python docs/figures.py

docs/training_step.svg    one training step
docs/round.svg            one online round
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLOURS = {"data": "#dbe9f6", "maths": "#fde9d0", "model": "#dff0d8", "disk": "#ece4f3"}
# name: (column, row, colour, text); arrows join names and carry a label
STEP = {
    "batch": (0, 1, "data", "Batch\nprefix, response, keys"),
    "noise": (0, 0, "maths", "noise level t, noise\nof (seed, pass, key, draw)"),
    "prefix": (1, 2, "model", "encode_prefix\nonce, then cut off"),
    "corrupt": (1, 1, "maths", "corruption\na kind for each token"),
    "totals": (1, 0, "maths", "denominators\nall micro-batches, all ranks"),
    "logits": (2, 1, "model", "backbone: logits\nwhere a term needs them"),
    "terms": (3, 1, "maths", "terms: kind -> weight,\nreduction, coefficient"),
    "backward": (4, 1, "model", "backward of this pass,\ngradients in the prefix"),
    "last": (4, 2, "model", "backward through\nthe prefix encoder"),
    "step": (5, 1, "model", "average, clip,\noptimizer step"),
}
STEP_ARROWS = [
    ("batch", "prefix", ""),
    ("batch", "corrupt", ""),
    ("noise", "corrupt", ""),
    ("corrupt", "logits", "tokens"),
    ("prefix", "logits", ""),
    ("corrupt", "totals", ""),
    ("logits", "terms", "CE"),
    ("totals", "terms", "divide"),
    ("terms", "backward", ""),
    ("backward", "last", "after all passes"),
    ("backward", "step", ""),
    ("last", "step", ""),
]
ROUND = {
    "save": (0, 1, "disk", "checkpoint,\nweights unsharded"),
    "draft": (1, 1, "model", "each rank drafts\nits prompts, chunk by chunk"),
    "expert": (2, 1, "data", 'expert\nedits, or "right"'),
    "journal": (2, 0, "disk", "journal\nevery answer first"),
    "align": (3, 1, "maths", "edits -> token spans\n(align.py)"),
    "shards": (4, 1, "disk", "shards: temporary name,\nfsync, rename; manifest last"),
    "train": (5, 1, "model", "next epoch: the round\nand a share of Stage I data"),
}
ROUND_ARROWS = [
    ("save", "draft", ""),
    ("draft", "expert", "Draft"),
    ("expert", "journal", "Revision"),
    ("journal", "align", ""),
    ("align", "shards", ""),
    ("shards", "train", ""),
]


def draw(boxes: dict, arrows: list, path: Path) -> None:
    """Boxes of 3.0 x .84 on a grid of 4 x 1.5, and arrows between their edges."""
    columns, rows = (1 + max(box[index] for box in boxes.values()) for index in (0, 1))
    figure, axes = plt.subplots(figsize=(2.7 * columns, 1.25 * rows))
    places = {name: (4 * column, 1.5 * row) for name, (column, row, _, _) in boxes.items()}
    for name, (_, _, colour, text) in boxes.items():
        x, y = places[name]
        axes.add_patch(plt.Rectangle((x - 1.5, y - 0.42), 3.0, 0.84, facecolor=COLOURS[colour], edgecolor="#555555"))
        axes.text(x, y, text, ha="center", va="center", fontsize=8)
    for start, end, label in arrows:
        (x0, y0), (x1, y1) = places[start], places[end]
        if x0 == x1:
            begin, finish = (x0, y0 + 0.42 * (1 if y1 > y0 else -1)), (x1, y1 - 0.42 * (1 if y1 > y0 else -1))
        else:
            begin, finish = (x0 + 1.5, y0), (x1 - 1.5, y1)
        axes.annotate("", finish, begin, arrowprops={"arrowstyle": "->", "color": "#333333"})
        if label:
            offset = (0.08, 0) if x0 == x1 else (0, 0.14)
            middle = ((begin[0] + finish[0]) / 2 + offset[0], (begin[1] + finish[1]) / 2 + offset[1])
            axes.text(*middle, label, fontsize=7, color="#333333", ha="left" if x0 == x1 else "center", va="center")
    axes.set_xlim(-1.6, 4 * (columns - 1) + 1.6)
    axes.set_ylim(-0.6, 1.5 * (rows - 1) + 0.6)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams.update({"svg.hashsalt": "figures", "svg.fonttype": "none"})
    draw(STEP, STEP_ARROWS, HERE / "training_step.svg")
    draw(ROUND, ROUND_ARROWS, HERE / "round.svg")
