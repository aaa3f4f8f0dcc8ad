"""The page of `src.generate html=...` in a real browser: play, slide, compare, hover, keys, phone, no network."""

from __future__ import annotations

from pathlib import Path

import pytest

from testing.files import read_jsonl
from tests.browser import CHROMIUM, Chromium
from tests.test_player import ODD, folder, odd_page, states, unpack

__all__ = ["folder"]  # a fixture
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")]
SPANS = "[...document.querySelectorAll('article')].map(a => [...a.querySelectorAll('.tokens .t')])"
TEXTS = f"{SPANS}.map(side => side.map(t => t.textContent))"
CLASSES = f"{SPANS}.map(side => side.map(t => t.className.split(' ')[1]))"
NUMBERS = "[...c.querySelectorAll('b')].map(b => Number(b.textContent))"
COUNTS = f"[...document.querySelectorAll('.counts')].map(c => {NUMBERS})"  # forward calls, edits, remasked, masks
STEP = "Number(document.getElementById('step').value)"
READY = "document.querySelectorAll('.tokens .t').length > 0"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, folder):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(f"file://{folder}/page.html")
    browser.until(READY)
    yield browser
    assert browser.errors == []
    assert {url.partition(":")[0] for url in browser.requests} == {"file", "data"}


def shown(side: dict, ids: list[int]) -> list[str]:
    names = {side["mask"]: "_", side["eot"]: "■", side["eos"]: "·"}
    words = [names.get(token, side["pieces"][str(token)]) for token in ids]
    return [word.removeprefix(" ") if word.strip() else word for word in words]


def test_every_step_shows_its_tokens_states_and_counts(page, folder):
    """Both sides beside each other; the one with fewer steps stays at its end."""
    sides = unpack(folder / "page.html")["texts"][0]["sides"]
    traces = [read_jsonl(folder / f"{name}.trace.jsonl")[0]["steps"] for name in ("plain", "refine")]
    assert page.ask("document.title") == "plain beside refine"
    assert len(traces[0]) < len(traces[1]) == page.ask("Number(document.getElementById('step').max)")
    for step in range(len(traces[1]) + 1):
        assert page.ask(STEP) == step
        texts, classes, counts = page.ask(TEXTS), page.ask(CLASSES), page.ask(COUNTS)
        for number, (side, trace) in enumerate(zip(sides, traces, strict=True)):
            at = min(step, len(trace))
            ids = states(side)[at]
            assert texts[number] == shown(side, ids)
            done = trace[:at]
            forwards = done[-1]["forwards"] if done else 0
            edits, remasks = (sum(len(s[name]) for s in done) for name in ("rewritten", "remasked"))
            assert counts[number] == [forwards, edits, remasks, ids.count(side["mask"])]
            now = trace[step - 1] if 0 < step <= len(trace) else {"unmasked": [], "rewritten": []}
            places = {
                kind: [i for i, c in enumerate(classes[number]) if c == kind] for kind in ("new", "rewritten", "mask")
            }
            assert places["new"] == now["unmasked"]
            assert places["rewritten"] == [position for position, _, _ in now["rewritten"]]
            assert places["mask"] == [i for i, token in enumerate(ids) if token == side["mask"]]
        page.press("ArrowRight")
    assert page.ask(STEP) == len(traces[1])


def test_keys_slider_and_images(page, folder):
    last = page.ask("Number(document.getElementById('step').max)")
    page.press("End")
    assert page.ask(STEP) == last
    page.press("ArrowLeft")
    assert page.ask(STEP) == last - 1
    page.press("Home")
    assert page.ask(STEP) == 0
    page.point("document.getElementById('step')", click=True, across=0.5)
    assert page.ask(STEP) == pytest.approx(last / 2, abs=1)
    first = page.ask("[...document.querySelectorAll('#list [aria-pressed=true]')].map(b => b.ariaLabel)")
    page.press("ArrowDown")
    assert page.ask("document.getElementById('key').textContent") == "b.png"
    page.point("document.querySelector('#list button')", click=True)
    assert page.ask("document.getElementById('key').textContent") == "a.png"
    assert first == ["text 1: a.png"]
    assert page.ask("document.getElementById('picture').naturalWidth") == 48


def test_play_runs_to_the_end_and_stops(page):
    last = page.ask("Number(document.getElementById('step').max)")
    page.press(" ")
    assert page.ask("document.getElementById('play').ariaLabel") == "Pause"
    page.until(f"{STEP} >= 2")
    page.point("document.getElementById('play')", click=True)
    assert page.ask("document.getElementById('play').ariaLabel") == "Play" and page.ask(STEP) < last
    page.press(" ")  # of the button, which has the focus
    page.until(f"{STEP} == {last} && document.getElementById('play').ariaLabel == 'Play'")


def test_a_rewritten_token_says_what_it_was(page, folder):
    trace = read_jsonl(folder / "refine.trace.jsonl")[0]
    number, step = next((n, s) for n, s in enumerate(trace["steps"], 1) if s["rewritten"])
    position, old, new = step["rewritten"][0]
    for _ in range(number):
        page.press("ArrowRight")
    side = unpack(folder / "page.html")["texts"][0]["sides"][1]
    before, after = shown(side, [old, new])
    page.point(f"{SPANS}[1][{position}]")
    tip = page.ask("document.getElementById('tip').innerText")
    percent = round(100 * step["rewrite_confidence"][0])
    assert tip.splitlines()[0] == f"position {position}"
    assert f"step {number}: “{before}” → “{after}”, {percent} %" in tip
    assert page.ask("document.getElementById('tip').hidden") is False
    assert f"{before.strip()} → {after.strip()}" in page.ask("document.querySelectorAll('.changes')[1].textContent")
    page.point("document.getElementById('title')")
    assert page.ask("document.getElementById('tip').hidden") is True


def test_a_phone_and_the_dark(page, folder):
    colours = {}
    for dark in (False, True):
        page.open(f"file://{folder}/page.html", width=390, height=844, dark=dark)
        page.until(READY)
        page.press("End")
        assert page.ask("innerWidth") == page.ask("document.documentElement.scrollWidth") == 390
        sides = page.ask("[...document.querySelectorAll('article')].map(a => a.getBoundingClientRect().toJSON())")
        assert sides[0]["bottom"] < sides[1]["top"]  # below each other
        colours[dark] = page.ask("getComputedStyle(document.body).backgroundColor")
    assert colours == {False: "rgb(255, 255, 255)", True: "rgb(20, 23, 27)"}


def test_controls_have_names(page):
    """As a screen reader is told them."""
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "slider", "navigation", "article", "image")
    names = {
        (n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if n.get("role", {}).get("value") in roles
    }
    assert {("button", "Play"), ("slider", "Step"), ("article", "plain"), ("article", "refine")} <= names
    assert {("button", "text 2: b.png"), ("image", "image a.png"), ("navigation", "Texts")} <= names
    assert all(name for _, name in names)


def test_odd_tokens_are_shown_as_they_are(page, tmp_path: Path):
    page.open(f"file://{odd_page(tmp_path)}")
    page.until(READY)
    page.press("End")
    (texts,) = page.ask(TEXTS)
    assert texts == [text.removeprefix(" ").replace("\n", "↵\n") for text in ODD]
    assert page.ask("window.boom") is None and page.ask("document.querySelectorAll('article b[onclick]').length") == 0
    assert page.ask("document.title") == "a<b>"
