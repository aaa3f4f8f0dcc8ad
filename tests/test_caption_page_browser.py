"""The page of `conf=eval/report` in a real browser: sorting, marks, a phone, the dark, no network."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from src.evaluation.caption_page import write_caption_page
from tests.browser import CHROMIUM, Chromium

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")]
KEYS = "[...document.querySelectorAll('.item')].map(item => item.ariaLabel)"
SCORES = {"one": [0.3, 0.9, None], "two": [0.5, 0.2, 0.4]}
ODD = "A \U0001f600 <b onclick='boom=1'>tall</b> ring."


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Three images; the caption of `one` is missing for the last, and that of `two` has marks."""
    run = tmp_path_factory.mktemp("page") / "capmas"
    run.mkdir()
    items, verdicts = [], []
    for number, key in enumerate("abc"):
        Image.new("RGB", (60, 40), (80 * number, 90, 200)).save(run / f"{key}.png")
        captions = {"one": f"Caption {key}. " * 20 if key != "c" else None, "two": ODD}
        start = ODD.index("ring")
        edits = {"two": [[start, start + 4, "cross"]]}
        items.append({"key": key, "image": str(run / f"{key}.png"), "references": ["A reference."],
                      "captions": captions, "edits": edits})  # fmt: skip
        for system, values in SCORES.items():
            if values[number] is not None:
                line = {"system": system, "key": key, "metric": "clair", "value": values[number], "weight": 1}
                verdicts.append(line)
    for name, rows in (("items", items), ("verdicts", verdicts)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_caption_page(run / "page.html", [run], num=3)
    return run / "page.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, file):
    browser.open(f"file://{file}")
    browser.until("document.querySelectorAll('.item').length == 3")
    yield browser
    assert browser.errors == []
    assert {url.partition(":")[0] for url in browser.requests} == {"file", "data"}


def choose(page: Chromium, select: str, value: str) -> None:
    script = f"s => {{ s.value = '{value}'; s.dispatchEvent(new Event('change')); }}"
    page.ask(f"({script})(document.getElementById('{select}'))")


def test_images_are_sorted_by_any_score(page):
    assert page.ask(KEYS) == ["a", "b", "c"]
    shown = "['whose', 'of'].map(id => document.getElementById(id).closest('label').offsetWidth > 0)"
    assert page.ask(shown) == [False, False]  # one run, and the place has no system
    choose(page, "metric", "clair")
    assert page.ask(shown) == [False, True]
    assert page.ask(KEYS) == ["b", "a", "c"]  # of the first system; without a score last
    page.point("document.getElementById('order')", click=True)
    assert page.ask(KEYS) == ["a", "b", "c"]
    choose(page, "of", "1")
    assert page.ask(KEYS) == ["b", "c", "a"]
    page.point("document.getElementById('order')", click=True)
    choose(page, "of", "-1")  # the largest difference
    assert page.ask(KEYS) == ["b", "a", "c"]
    assert page.ask("[...document.querySelectorAll('.scores .sorted')].map(s => s.textContent)")[:2] == [
        "clair 90", "clair 20",
    ]  # fmt: skip


def test_rewritten_tokens_are_marked_and_captions_shown_as_they_are(page):
    mark = page.ask("(m => [m.textContent, m.title])(document.querySelector('mark'))")
    assert mark == ["ring", "rewritten; before: cross"]
    assert page.ask("document.querySelectorAll('article')[1].querySelectorAll('p')[1].textContent") == ODD
    assert page.ask("window.boom") is None and page.ask("document.querySelectorAll('article b').length") == 0
    assert page.ask("document.querySelectorAll('.item')[2].querySelector('article').textContent") == "oneno caption"
    assert page.ask("document.querySelector('img').naturalWidth") == 60


def test_a_phone_and_the_dark(page, file):
    colours = {}
    for dark in (False, True):
        page.open(f"file://{file}", width=390, height=844, dark=dark)
        page.until("document.querySelectorAll('.item').length == 3")
        assert page.ask("innerWidth") == page.ask("document.documentElement.scrollWidth") == 390
        boxes = page.ask("[...document.querySelectorAll('article')].map(a => a.getBoundingClientRect().toJSON())")
        assert boxes[0]["bottom"] < boxes[1]["top"]  # below each other
        colours[dark] = page.ask("getComputedStyle(document.body).backgroundColor")
    assert colours == {False: "rgb(255, 255, 255)", True: "rgb(20, 23, 27)"}
