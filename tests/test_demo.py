"""The page of `src.demo`: its panels, and the whole of it in a real browser, with nothing loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import socket
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from src.demo import main
from src.generation.captioner import Caption, State, Token
from src.generation.demo_page import panels
from tests.browser import CHROMIUM, Chromium

ROOT = Path(__file__).parents[1]
GRADIO = importlib.util.find_spec("gradio") is not None
SPAN = re.compile(r'<span class="t (\w+)" style="--c:([\d.]+)" title="([^"]*)">(.*?)</span>')


def test_a_panel_shows_each_token_by_its_state_and_keeps_what_was_edited():
    written = [Token("A", "new", 0.5), Token("_", "mask", None), Token(" <b>", "kept", 0.25)]
    edited = [Token("The", "rewritten", 0.75, "A"), Token(" red", "new", 1.0), Token(" <b>", "kept", 0.25)]
    done = [Token("The", "kept", 0.75), Token(" red", "kept", 1.0), Token(" <b>", "kept", 0.25)]
    states = [State("A_ <b>", written, 1), State("The red <b>", edited, 2)]
    states.append(State("The red <b>", done, 2, Caption("The red <b>", [1, 2, 3], 2, 1)))
    first, second, last = panels("<refine>", iter(states))
    assert SPAN.findall(first) == [
        ("new", "0.50", "50%", "A"), ("mask", "0.00", "", "_"), ("kept", "0.25", "25%", "&lt;b&gt;")
    ]  # fmt: skip
    assert SPAN.findall(second)[0] == ("rewritten", "0.75", "75%, was “A”", "The")
    assert SPAN.findall(last)[0] == ("edited", "0.75", "75%, was “A”", "The")
    assert "<b>2</b> steps, <b>2</b> forward calls, <b>1</b> edits, done" in last and "done" not in second
    text = unescape(re.sub("<.*?>", "", last.partition('class="tokens">')[2]))
    assert text == "The red <b>" and "&lt;refine&gt;" in first


@pytest.mark.skipif(GRADIO, reason="Gradio is here")
def test_without_gradio_the_command_that_installs_it_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "pip install -e '.[demo]'" in capsys.readouterr().err


# in the browser


@pytest.fixture(scope="module")
def address():
    """The demo as a user starts it, with the embedded model, on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "src.demo", f"port={port}", "model.path=assets/base", "pictures=2", "pace=0"]
    demo = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in demo.stderr if " at http" in line)  # type: ignore[union-attr]
        assert line == f"assets/base at http://127.0.0.1:{port}/ (Ctrl-C stops it)\n"
        yield f"http://127.0.0.1:{port}/"
    finally:
        demo.send_signal(2)
        assert demo.wait(timeout=300) == 0


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None or not GRADIO, reason="no chromium or no gradio here")
def test_in_the_browser(address, tmp_path):
    """Pick a scene, watch it described, correct a text, hear of a mistake; all that is loaded comes from the demo."""
    classes = "[...document.querySelectorAll('#{} .t')].map(t => t.className.slice(2))"
    counts = "(document.querySelector('#{} .counts') || {{textContent: ''}}).textContent"
    tab = "[...document.querySelectorAll('[role=tab]')].find(tab => tab.textContent.trim() == '{}')"
    scene = "document.querySelectorAll('#scenes .thumbnail-item')"
    with Chromium(tmp_path / "profile") as page:
        page.open(address, height=1000)
        page.until("!!document.querySelector('#write')")
        # 1. without a picture
        page.point("document.querySelector('#write')", click=True)
        page.until("document.body.textContent.includes('drop or pick a picture first')")
        # 2. a scene: its picture and a text with mistakes are filled in
        page.until(f"{scene}.length == 2")
        page.point(f"{scene}[1]", click=True)
        page.until("!!document.querySelector('#picture img')")
        # 3. all states that the tokens are ever shown in
        page.ask(
            "window.seen = new Set(); new MutationObserver(() => document.querySelectorAll('#left .t')"
            ".forEach(t => seen.add(t.className.slice(2)))).observe(document.body, {childList: true, subtree: true}); 1"
        )
        page.point("document.querySelector('#write')", click=True)
        page.until(f"{counts.format('left')}.includes('done')")
        assert page.ask("['mask', 'new', 'kept'].every(state => seen.has(state))")
        assert {"kept"} <= set(page.ask(classes.format("left"))) <= {"kept", "edited"}
        assert page.ask(classes.format("right")) == []
        # 4. two samplers beside each other
        page.point("document.querySelector('#beside input')", click=True)
        page.until("document.querySelectorAll('[role=option]').length > 2")
        page.point(
            "[...document.querySelectorAll('[role=option]')].find(o => o.textContent.includes('plain'))", click=True
        )
        page.point("document.querySelector('#write')", click=True)
        page.until(f"{counts.format('right')}.includes('done') && {counts.format('left')}.includes('done')")
        assert "0 edits" in page.ask(counts.format("right")) and "plain" in page.ask(
            "document.querySelector('#right').textContent"
        )
        # 5. a text with mistakes
        page.point(tab.format("Correct"), click=True)
        page.until("document.querySelector('#correct') && document.querySelector('#correct').offsetParent !== null")
        assert page.ask("document.querySelector('#text textarea').value.length") > 20
        page.point("document.querySelector('#correct')", click=True)
        page.until(f"{counts.format('corrected')}.includes('done')")
        assert "edited" in page.ask(classes.format("corrected"))
        # 6. texts and a file that cannot be used
        notices = "document.body.textContent.includes('{}')"
        for typed, notice in (("   ", "type a text first"), ("Ein Bär.", "it would read")):
            page.ask("document.querySelector('#text textarea').select()")
            page.call("Input.insertText", text=typed)
            page.point("document.querySelector('#correct')", click=True)
            page.until(notices.format(notice))
        (tmp_path / "text.png").write_bytes(b"no picture")
        page.open(address, height=1000)
        page.until("!!document.querySelector('#picture input[type=file]')")
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        place = page.call("DOM.querySelector", nodeId=root, selector="#picture input[type=file]")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=place, files=[str(tmp_path / "text.png")])
        page.until("!!document.querySelector('#picture img')")
        page.point("document.querySelector('#write')", click=True)
        page.until(notices.format("text.png"))
        # 7. nothing came from elsewhere
        assert page.errors == []
        hosts = {url.split("/")[2] for url in page.requests if not url.startswith(("data:", "blob:"))}
        assert hosts == {address.split("/")[2]}
