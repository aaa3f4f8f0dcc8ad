"""The page of `src.demo`: captions written and rewritten before one's eyes, with two samplers side by side.

    page = build_page(Captioner.load("assets/base"), pictures, samplers=["refine", "plain"], steps=16)
    page.launch(**launch_options())

    picture, prompt, settings -> `Captioner.stream` of each side -> a panel of coloured tokens after every step

The page loads nothing from elsewhere and reports nothing: Gradio's telemetry is switched off before it is imported.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from html import escape
from itertools import zip_longest
from typing import Any

from PIL import Image

from src.generation.captioner import PROMPT, Captioner, State
from src.generation.player import TOKENS
from src.io.errors import UserError

TITLE, NONE = "Watch captions correct themselves", "none"
PASSES = 4  # of a correction, until another number is chosen
KEEP_S = 3600  # uploaded pictures are removed after this time, and when the page is closed
STYLE = """
.side { border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; min-height: 9em; }
.side h2 { margin: 0 !important; font-size: 15px !important; }
.side .counts { color: var(--body-text-color-subdued); font-size: 13px; margin: 0; }
.side .tokens { margin-bottom: 0; }
#picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
#scenes .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
.legend { font-size: 13px; color: var(--body-text-color-subdued); }
"""
LEGEND = """<p class="legend"><span class="t mask">_</span> mask,
<span class="t new" style="--c:.8">new</span> unmasked in this step,
<span class="t rewritten" style="--c:.8">rewritten</span> in this step,
<span class="t edited" style="--c:.6">edited</span> in an earlier one,
<span class="t kept" style="--c:.6">kept</span>, <span class="t remasked">_</span> remasked; the stronger the colour,
the more probable the token when written. Point at a token for its probability and what it replaced.</p>"""


def build_page(
    captioner: Captioner,
    pictures: Sequence[tuple[Image.Image, str]],
    *,
    samplers: Sequence[str],
    steps: int,
    prompt: str = PROMPT,
    pace: float = 0.1,
) -> Any:
    """A `gradio.Blocks`. Raises UserError if Gradio is not installed.

    pictures: to choose from, each with a text that is wrong about it; samplers: to choose from, as in conf/sampler
    pace: least seconds from one step to the next, so that one can watch
    """
    gr, actions = import_gradio(), Actions(captioner)

    def pick(event: gr.SelectData):  # pyright: ignore[reportInvalidTypeForm]
        return pictures[event.index]

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, KEEP_S)) as page:
        gr.HTML(f"<h1>{TITLE}</h1>")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                options = {"sources": ["upload", "clipboard"], "type": "filepath", "format": "png", "height": 260}
                image = gr.Image(label="drop a picture, or pick one below", elem_id="picture", **options)
                image.preprocess = lambda file: file and file.path  # as it is: `Captioner` reads it, or says why not
                options = {"columns": 3, "height": 255, "format": "png", "allow_preview": False, "buttons": []}
                gallery = gr.Gallery([scene for scene, _ in pictures], show_label=False, elem_id="scenes", **options)
                question = gr.Textbox(prompt, label="prompt")
                seed = gr.Number(0, label="seed", precision=0)
                pause = gr.Slider(0, 1, pace, step=0.05, label="seconds from step to step")
            with gr.Column(scale=2, min_width=320):
                with gr.Tab("Write"):
                    with gr.Row():
                        left = gr.Dropdown(list(samplers), value=samplers[0], label="sampler")
                        right = gr.Dropdown([NONE, *samplers], value=NONE, label="beside it", elem_id="beside")
                    num_steps = gr.Slider(1, max(64, steps), steps, step=1, label="steps")
                    with gr.Row():
                        start = gr.Button("Write", variant="primary", elem_id="write")
                        stop = gr.Button("Stop", elem_id="stop")
                    with gr.Row():
                        panes = [gr.HTML(elem_id="left"), gr.HTML(elem_id="right", visible=False)]
                with gr.Tab("Correct"):
                    text = gr.Textbox(label="a text with mistakes", lines=3, elem_id="text")
                    with gr.Row():
                        reviser = gr.Dropdown(list(samplers), value=samplers[0], label="sampler")
                        passes = gr.Slider(1, 16, PASSES, step=1, label="passes")
                    mend = gr.Button("Correct", variant="primary", elem_id="correct")
                    corrected = gr.HTML(elem_id="corrected")
                gr.HTML(LEGEND)
        options = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}  # one at a time
        writing = start.click(actions.write, [image, question, seed, pause, left, right, num_steps], panes, **options)
        mend.click(actions.correct, [image, question, seed, pause, text, reviser, passes], corrected, **options)
        stop.click(None, cancels=[writing])
        gallery.select(pick, None, [image, text], show_progress="hidden")
    return page


class Actions:
    """What the buttons do: each yields what the page shows after every step. A mistake becomes a notice on the page."""

    def __init__(self, captioner: Captioner) -> None:
        self.captioner, self.gr = captioner, import_gradio()

    def write(
        self, image: str | None, prompt: str, seed: int | None, pause: float, left: str, right: str, steps: int
    ) -> Iterator[list[Any]]:
        options = {"prompt": prompt, "seed": seed or 0, "steps": steps}
        names = [left] if right == NONE else [left, right]
        streams = [self.captioner.stream(self._chosen(image), sampler=name, **options) for name in names]
        hidden = [self.gr.update(visible=False)] * (2 - len(names))
        for shown in self._play([panels(name, stream) for name, stream in zip(names, streams, strict=True)], pause):
            yield [self.gr.update(value=panel, visible=True) for panel in shown] + hidden

    def correct(
        self, image: str | None, prompt: str, seed: int | None, pause: float, text: str, sampler: str, passes: int
    ) -> Iterator[str]:
        text, codec = text.strip(), self.captioner.codec
        if not text:
            raise self._notice("type a text first")
        if (known := codec.decode(codec.encode(text)[0])) != text:
            raise self._notice(f"the model's tokenizer lacks some characters: it would read {known!r}")
        options = {"prompt": prompt, "seed": seed or 0, "text": text, "post_steps": passes}
        stream = self.captioner.stream(self._chosen(image), sampler=sampler, **options)
        for (panel,) in self._play([panels(f"corrected by {sampler}", stream)], pause):
            yield panel

    def _play(self, sides: Sequence[Iterator[str]], pause: float) -> Iterator[list[str]]:
        """The panels of all sides after each step; a side that is done stays as it is."""
        shown = [""] * len(sides)
        with ExitStack() as stack:  # a page that is closed stops the samplers
            for side in sides:
                stack.enter_context(closing(side))  # type: ignore[arg-type]
            try:
                for step in zip_longest(*sides):
                    shown = [new or old for new, old in zip(step, shown, strict=True)]
                    yield shown
                    time.sleep(pause)
            except UserError as error:
                raise self._notice(str(error)) from error

    def _chosen(self, image: str | None) -> str:
        if image is None:
            raise self._notice("drop or pick a picture first")
        return image

    def _notice(self, message: str) -> Exception:
        return self.gr.Error(escape(message), print_exception=False)


def panels(name: str, states: Iterator[State]) -> Iterator[str]:
    """HTML of one side after each step; tokens look as in the trace player."""
    first: dict[int, str] = {}  # position -> the token before its first edit
    steps = edits = 0
    for state in states:
        spans = []
        for place, token in enumerate(state.tokens):
            if token.old is not None:
                first.setdefault(place, token.old)
                edits += 1
            look = "edited" if token.state == "kept" and place in first else token.state
            notes = [] if token.confidence is None else [f"{token.confidence:.0%}"]
            notes += [f"was “{first[place].strip()}”"] if place in first else []
            word = token.text.removeprefix(" ") or token.text
            style = f"--c:{token.confidence or 0:.2f}"
            attributes = {"class": f"t {look}", "style": style, "title": ", ".join(notes)}
            spans.append(" " * (len(token.text) - len(word)) + element("span", escape(word), attributes))
        steps += state.caption is None
        counts = f"<b>{steps}</b> steps, <b>{state.forward_calls}</b> forward calls, <b>{edits}</b> edits"
        parts = [("h2", escape(name), {}), ("p", counts + ", done" * bool(state.caption), {"class": "counts"})]
        parts.append(("p", "".join(spans), {"class": "tokens"}))
        yield element("article", "".join(element(*part) for part in parts), {"class": "side"})


def element(tag: str, inner: str, attributes: Mapping[str, str]) -> str:
    """HTML; `inner` is HTML, attributes are texts."""
    pairs = "".join(f' {key}="{escape(text)}"' for key, text in attributes.items())
    return f"<{tag}{pairs}>{inner}</{tag}>"


def import_gradio() -> Any:
    """The package, without telemetry. Raises UserError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("the demo needs Gradio: pip install -e '.[demo]'") from error
    return gradio


def launch_options() -> dict[str, Any]:
    """How the page is launched: fonts of the system, the colours of tokens, nothing shared."""
    gr = import_gradio()
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    head = f"<style>{TOKENS.read_text(encoding='utf-8')}{STYLE}</style>"
    off = dict.fromkeys(("share", "run_history", "ssr_mode"), False)
    return {"theme": theme, "head": head, "footer_links": [], "quiet": True, **off}
