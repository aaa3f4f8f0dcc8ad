"""Demo: a page on this machine to watch captions being written, rewritten and corrected, with any model folder.

    python -m src.demo
    python -m src.demo model.path=runs/stage2/model port=8000
    python -m src.demo conf=demo model=llada_v model.path=LLaDA-V prompt="Describe the image."

    model, scenes to choose from -> page (src/generation/demo_page.py) -> http://127.0.0.1:7860, until Ctrl-C

Without `conf=` it reads conf/demo.yaml. Needs the extra `demo` (Gradio). The page loads nothing from elsewhere.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from random import Random
from threading import Event

from src.cli.config import load_config
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import check, plain
from src.cli.signals import Stopped
from src.generation.captioner import Captioner
from src.generation.demo_page import build_page, launch_options
from src.io.errors import UserError
from src.scenes.grammar import swaps, write_caption
from src.scenes.graph import draw_scene
from src.scenes.render import render

MODELS = ("runs/quickstart/stage1_2/model", "assets/base")  # the first that is there


@main_guard
def main(argv: list[str]) -> None:
    """Show the page until the program is stopped."""
    # 1. The config, and all mistakes that can be seen without the model.
    conf = [] if any(argument.startswith("conf=") for argument in argv) else ["conf=demo"]
    cfg = load_config([*conf, *argv], verb="src.demo", needs=NEEDS["src.demo"], texts=("prompt", "system"))
    check(cfg)
    options = launch_options()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks its own address whether it is up
    # 2. The model.
    node = {name: value for name, value in plain(cfg.model).items() if name != "target"}
    node["path"] = cfg.model.path or next(path for path in MODELS if Path(path).is_dir() or path == MODELS[-1])
    captioner = Captioner.load(**node, prompt_format=cfg.prompt_format, system=cfg.system, join=cfg.join)
    layout = captioner.backbone.layout
    if layout is None:
        raise UserError(f"the model in {node['path']} has no vision path, so it cannot caption images")
    for name in cfg.samplers:
        captioner.sampler(name, steps=cfg.steps)
    # 3. Scenes to choose from, each with a caption in which one word of each sentence is wrong.
    pictures = []
    for number in range(cfg.pictures):
        rng = Random(f"demo/{number}")
        scene = draw_scene(rng, objects=(2, 3), distinct=True)
        text = write_caption(scene, rng)
        wrong = {text.count(".", 0, swap.start): swap for swap in swaps(scene, text, rng)}  # by sentence
        for swap in sorted(wrong.values(), key=lambda swap: -swap.start):
            text = text[: swap.start] + swap.wrong + text[swap.end :]
        pictures.append((render(scene, rng, size=layout.size), text))
    # 4. The page.
    settings = {"samplers": list(cfg.samplers), "steps": cfg.steps, "prompt": cfg.prompt, "pace": cfg.pace}
    page = build_page(captioner, pictures, **settings)
    address = {"server_name": cfg.host, "server_port": cfg.port, "inbrowser": cfg.browser}
    try:
        _, url, _ = page.launch(**options, **address, prevent_thread_lock=True)
        sys.stderr.write(f"{node['path']} at {url} (Ctrl-C stops it)\n")
        Event().wait()
    except OSError as error:  # the port is taken
        raise UserError(f"host={cfg.host} port={cfg.port}: {error}; choose another port") from error
    except Stopped:
        sys.stderr.write("\nstopped\n")
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    main()
