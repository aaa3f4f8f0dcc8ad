"""Time and memory to load a sharded model folder: tensor by tensor, against one state dict of all shards.

    python -m benchmarks.loading                       a random bfloat16 model of 600 MB in 5 shards
    python -m benchmarks.loading --megabytes 2000 --runs 5

Each side runs in its own process, in turn, on the same folder, which is in the page cache by then. The baseline builds
the model, reads all shards into one dictionary and calls `load_state_dict`. Memory is the growth of the process's peak
from before the first read to the loaded model. Both must load the same weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from src.models.hf.folder import build_empty, fingerprint, from_pretrained, save_pretrained
from src.models.hf.formats import Description
from src.models.hf.weights import weight_files
from src.models.llada_v import LLaDAV
from src.text.tokenizer import Codec

LAYER = 12 * 1024**2  # parameters of a layer with the sizes below


def main() -> None:
    """Print seconds and memory of both sides, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"megabytes": 600, "shards": 5, "runs": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=SIDES, help="measure one side; used by the benchmark itself")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.side:
        sys.stdout.write(json.dumps(measure(options.side, options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        size = write(folder, options.megabytes * 1e6, options.shards)
        pairs = [{side: in_process(side, folder) for side in SIDES} for _ in range(options.runs)]
    if len({result["fingerprint"] for pair in pairs for result in pair.values()}) > 1:
        sys.exit("the two sides loaded different weights")
    sys.stdout.write(f"{size / 1e6:.0f} MB in {options.shards} shards, {options.runs} runs; medians\n")
    for side in SIDES:
        seconds, memory = (statistics.median(pair[side][key] for pair in pairs) for key in ("seconds", "memory"))
        sys.stdout.write(f"{side:9s} {seconds:6.2f} s   {memory / 1e6:6.0f} MB = {memory / size:.2f} x the model\n")
    for key in ("seconds", "memory"):
        ratio = statistics.median(pair["baseline"][key] / pair["ours"][key] for pair in pairs)
        sys.stdout.write(f"{key}: the baseline takes {ratio:.2f} times as much\n")


def write(folder: Path, size: float, shards: int) -> int:
    """Write the model folder. Returns the bytes of its weights."""
    decoder = {
        "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 2731, "num_attention_heads": 8,
        "num_hidden_layers": max(1, round(size / 2 / LAYER)),
    }  # fmt: skip
    model = LLaDAV(decoder=decoder, vision=None).bfloat16()
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    codec = Codec.train(["a red ring"], vocab_size=50)
    save_pretrained(model, codec, folder, max_shard_bytes=total / shards * 1.02)
    return total


def ours(folder: Path) -> LLaDAV:
    """The project's loader."""
    return from_pretrained(folder)


def baseline(folder: Path) -> LLaDAV:
    """All shards into one state dict, as a plain loader does."""
    config = json.loads((folder / "config.json").read_text())
    model = build_empty(Description(config["decoder"], config["vision"], config["image_id"]))
    model = model.bfloat16().to_empty(device="cpu")
    state = {}
    for file in weight_files(folder):
        state |= load_file(file)
    model.load_state_dict(state)
    return model


SIDES = {"baseline": baseline, "ours": ours}


def measure(side: str, folder: Path) -> dict[str, float | str]:
    """Seconds, bytes of peak memory, and the fingerprint of the loaded weights."""
    torch.set_num_threads(1)
    before, began = peak(), time.perf_counter()
    model = SIDES[side](folder)
    seconds, memory = time.perf_counter() - began, peak() - before
    return {"seconds": seconds, "memory": memory, "fingerprint": fingerprint(model)}


def peak() -> int:
    """Peak resident memory of this process so far, in bytes (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def in_process(side: str, folder: Path) -> dict:
    command = [sys.executable, "-m", "benchmarks.loading", "--side", side, "--folder", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
