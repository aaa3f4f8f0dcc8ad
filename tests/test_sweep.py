"""Grids of sampler settings, the Pareto front, and the report, on hand-made numbers and by brute force."""

from __future__ import annotations

import math
import random
import statistics
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from src.evaluation.drawing import FILL, Piece, marked_text, sheet, text_box
from src.evaluation.grid import expand
from src.evaluation.pareto import Point, budgets_of, front_of, lines_of, points_of, to_dict
from src.evaluation.report import budget_table, claims, markdown, report_text
from src.evaluation.results import Cell
from src.io.errors import UserError
from src.metrics.caption import Mark

PLAIN = {"target": "src.samplers.sampler.Sampler", "length": 48}
PROSECO = {**PLAIN, "reviser": {"target": "src.samplers.proseco.Corrector", "every": 1}}


def test_a_grid_makes_every_combination_in_order():
    grid = {"proseco": {"reviser": {"every": [1, 2], "passes": [1, 4]}, "temperature": [0.5]}}
    nodes, speeds = expand({"plain": PLAIN, "proseco": PROSECO}, grid, [1, 8], known=set())
    names = [f"proseco[every={e},passes={p}]" for e, p in product([1, 2], [1, 4])]  # the temperature is the same in all
    assert list(nodes) == ["plain", *names]
    assert nodes["plain"] == PLAIN
    for name, (every, passes) in zip(names, product([1, 2], [1, 4]), strict=True):
        reviser = {**PROSECO["reviser"], "every": every, "passes": passes}
        assert nodes[name] == {**PROSECO, "reviser": reviser, "temperature": 0.5}
    assert set(map(tuple, speeds.values())) == {(1, 8)}
    assert PROSECO["reviser"] == {"target": "src.samplers.proseco.Corrector", "every": 1}  # as it was


def test_options_may_be_dotted_null_or_end_alike_and_speeds_are_apart():
    node = {**PROSECO, "unmask": {"target": "src.samplers.unmask.Threshold", "tau": 0.9}}
    node["reviser"] = {"target": "src.samplers.token_edit.ThresholdEdit", "tau": 0.5}
    grid = {"a": {"unmask.tau": [0.5, 1], "reviser": {"tau": [0.2, 0.3]}, "tokens_per_step": [8, 2], "eos_last": None}}
    nodes, speeds = expand({"a": node, "b": node}, grid, [1], known={"gone"})
    names = [f"a[unmask.tau={a},reviser.tau={b}]" for a, b in product([0.5, 1], [0.2, 0.3])]
    assert list(nodes) == [*names, "b"]
    assert speeds == {**{name: [2, 8] for name in names}, "b": [1]}
    assert expand({"b": node}, {"gone": {"x": [1]}, "b": None}, [1], known={"gone"})[1] == {"b": [1]}
    stops = {"b": {"early_stop": [False, "block"]}}
    assert list(expand({"b": PLAIN}, stops, [1], known=set())[0]) == ["b[early_stop=false]", "b[early_stop=block]"]
    with pytest.raises(UserError, match=r"no option 'reviser\.scope\.x'"):
        expand({"p": PROSECO}, {"p": {"reviser.scope.x": [1]}}, [1], known=set())


def test_file_names_are_safe_and_different():
    nasty = ["a/b", "../a", "a b", "..", "a[x=1,y=2]", "a[x=1,y=3]", "ä", "a\nb", "*", "%2F", ""]
    cells = [Cell(method, sampler, speed) for method, sampler in product(nasty, nasty) for speed in (1, 16)]
    files = {cell.file for cell in cells}
    assert len(files) == len({cell.name for cell in cells})
    assert all(name == Path(name).name and "\n" not in name for name in files)
    assert Cell("mask", "refine[passes=2,every=1]", 8).file == "mask-refine[passes=2,every=1]-8"


def point(calls, value, *, sampler="plain", speed=1, method="m", sign=1) -> Point:
    stats = [{"mean": mean, "se": 0.01, "n": 4} for mean in (calls, calls / 100, value)]
    return Point(Cell(method, sampler, speed), *stats, good=sign * value)


def test_the_front_and_the_budgets_by_brute_force():
    generator = random.Random(0)
    for sign in (1, -1) * 60:
        points = [
            point(generator.randint(2, 40), generator.randint(0, 6) / 6, sampler=f"s{i % 2}[x={i}]", speed=i, sign=sign)
            for i in range(generator.randint(1, 9))
        ]

        def is_best(p, points=points) -> bool:
            better = (
                (q.calls <= p.calls and q.good > p.good) or (q.calls < p.calls and q.good >= p.good) for q in points
            )
            return not any(better)

        best = {(p.calls, p.value["mean"]) for p in filter(is_best, points)}
        assert [(p.calls, p.value["mean"]) for p in front_of(points)] == sorted(best)
        budgets = budgets_of(points)
        assert budgets[-1].forwards >= max(p.calls for p in points) > budgets[-1].forwards / 2
        assert budgets[0].forwards >= min(p.calls for p in points) > budgets[0].forwards / 2
        for budget in budgets:
            within = [p for p in points if p.calls <= budget.forwards]
            assert budget.best.good == max(p.good for p in within)
            assert budget.best.calls == min(p.calls for p in within if p.good == budget.best.good)
            base = [p.good for p in within if p.row == points[0].row]
            assert (budget.baseline.good if budget.baseline else None) == (max(base) if base else None)


def test_lines_join_speeds_or_the_variants_of_one_speed():
    points = [
        point(48, 0.9, speed=1), point(6, 0.5, speed=8), point(20, 0.8, sampler="t[tau=1]"),
        point(9, 0.6, sampler="t[tau=0]"), point(60, 0.9, sampler="p[n=1]"), point(8, 0.7, sampler="p[n=1]", speed=8),
        point(70, 0.9, sampler="p[n=2]"), point(9, 0.7, sampler="p[n=2]", speed=8), point(48, 0.1, method="other"),
    ]  # fmt: skip
    lines = {name: [p.calls for p in line] for name, line in lines_of(points).items()}
    assert lines == {
        ("m", "plain"): [6, 48], ("m", "t"): [9, 20], ("m", "p[n=1]"): [8, 60], ("m", "p[n=2]"): [9, 70],
        ("other", "plain"): [48],
    }  # fmt: skip


def test_points_are_those_cells_that_have_a_value_and_low_ones_may_be_best():
    stat = {"mean": 2.0, "se": None, "n": 1}
    cells = [Cell("m", "a", n) for n in (1, 2, 4)]
    table = {cell: {"forwards": stat, "seconds": stat} for cell in cells}
    table[cells[0]]["q"], table[cells[1]]["q"] = {**stat, "mean": 0.5}, {**stat, "mean": math.nan}
    (only,) = points_of(table, "q", lowest=True)
    assert (only.cell, only.good, only.value["mean"]) == (cells[0], -0.5, 0.5)
    content = to_dict([only], metric="q", best="lowest")
    assert content["points"] == [
        {"cell": "m-a-1", "method": "m", "sampler": "a", "tokens_per_step": 1, "forwards": stat, "seconds": stat,
         "value": {**stat, "mean": 0.5}, "front": True}
    ]  # fmt: skip
    assert content["budgets"] == [{"forwards": 2, "best": "m-a-1", "baseline": "m-a-1"}]


def test_the_table_of_budgets_by_hand():
    points = [point(48, 0.75, speed=1), point(6, 0.5, speed=8), point(12, 0.9, sampler="p[n=1]", speed=8)]
    cells = [p.cell for p in points]
    scores = {cells[0]: {"q": [0.7, 0.8]}, cells[1]: {"q": [0.4, 0.6]}, cells[2]: {"q": [1.0, 0.8]}}
    table = budget_table(points, scores, "q")
    assert table[0] == ["calls up to: best q", "cell", "calls", "seconds", "q", "best of m plain", "difference"]
    # 32 calls give what 16 do; paired: 0.6, 0.2 against the plain one of 6 calls, 0.3, 0.0 against that of 48
    assert table[1:] == [
        ["8", "m-plain-8", "6.0", "0.06", "0.500 ±0.010", "0.500 ±0.010", "-"],
        ["16", "m-p[n=1]-8", "12.0", "0.12", "0.900 ±0.010", "0.500 ±0.010", "+0.400 ±0.200"],
        ["64", "m-p[n=1]-8", "12.0", "0.12", "0.900 ±0.010", "0.750 ±0.010", "+0.150 ±0.150"],
    ]
    corpus = budget_table(points, {cell: {} for cell in cells}, "q")
    assert [line[-1] for line in corpus[1:]] == ["-", "+0.400", "+0.150"]  # nothing to pair


# the report: two methods, two speeds; the baseline loses 0.4, the contender 0.1

SCORES = {
    Cell("mask", "plain", 1): {"quality": [0.9, 0.9]},
    Cell("mask", "plain", 8): {"quality": [0.4, 0.6]},
    Cell("stage2", "refine", 1): {"quality": [0.9, 0.9]},
    Cell("stage2", "refine", 8): {"quality": [0.8, 0.8]},
}


@pytest.fixture
def table():
    calls = {"mask": [8.0, 1.0], "stage2": [9.0, 2.5]}
    stats = {}
    for cell, columns in SCORES.items():
        values = columns["quality"]
        quality = {"mean": statistics.mean(values), "se": statistics.stdev(values) / math.sqrt(2), "n": 2}
        forwards = {"mean": calls[cell.method][cell.tokens_per_step > 1], "se": 0.0, "n": 2}
        stats[cell] = {"quality": quality, "forwards": forwards, "seconds": {"mean": 0.25, "se": None, "n": 1}}
    return stats


def test_claims_by_hand():
    # mask: -0.5, -0.3; stage2: -0.1, -0.1; at 8 tokens/step stage2 leads by 0.4 and 0.2, at 1 by nothing
    assert claims(SCORES, "quality") == [
        "quality from 1 to 8 tokens/step: mask plain -0.400 ± 0.100",
        "quality from 1 to 8 tokens/step: stage2 refine -0.100 ± 0.000, 25% of the change of mask plain",
        "quality at 1 token/step: stage2 refine - mask plain +0.000 ± 0.000",
        "quality at 8 tokens/step: stage2 refine - mask plain +0.300 ± 0.100",
    ]
    gain = {**SCORES, Cell("stage2", "refine", 8): {"quality": [1.0, 1.0]}}
    assert claims(gain, "quality")[1] == "quality from 1 to 8 tokens/step: stage2 refine +0.100 ± 0.000"
    # no share of a loss within two standard errors, and none for one
    noise = {**SCORES, Cell("mask", "plain", 8): {"quality": [0.8, 0.9]}}
    assert claims(noise, "quality")[0].endswith("mask plain -0.050 ± 0.050, no significant change")
    assert claims(noise, "quality")[1].endswith("stage2 refine -0.100 ± 0.000")
    still = {**SCORES, Cell("stage2", "refine", 8): {"quality": [0.9, 0.8]}}
    assert claims(still, "quality")[1].endswith("stage2 refine -0.050 ± 0.050, no significant change")
    gap = {**SCORES, Cell("other", "plain", 8): {"quality": [1.0, 1.0]}}  # a row that lacks a speed
    assert claims(gap, "quality") == claims(SCORES, "quality")
    assert claims(SCORES, "bleu") == []


def test_the_report_by_hand(table):
    del table[Cell("mask", "plain", 1)]["quality"]
    bounds = {"mask": {"nelbo": {"mean": 1.5, "se": 0.25, "n": 2}}}
    text = report_text(table, bounds, SCORES, headline=["quality"])
    assert text.split("\n\n")[:3] == [
        "- columns: 1, 8 tokens per step; mean ± standard error over 2 captions\n"
        "- forward calls (and seconds) per caption, mask plain: 8.0 (0.25), 1.0 (0.25)\n"
        "- forward calls (and seconds) per caption, stage2 refine: 9.0 (0.25), 2.5 (0.25)",
        "| bound per token | nelbo        |\n| --------------- | ------------ |\n| mask            | 1.500 ±0.250 |",
        "| quality | sampler | 1            | 8            |\n"
        "| ------- | ------- | ------------ | ------------ |\n"
        "| mask    | plain   | -            | 0.500 ±0.100 |\n"
        "| stage2  | refine  | 0.900 ±0.000 | 0.800 ±0.000 |",
    ]
    assert text.endswith("- quality at 8 tokens/step: stage2 refine - mask plain +0.300 ± 0.100\n")
    budgets = [["calls", "cell"], ["8", "best"]]
    assert markdown(budgets) in (text := report_text(table, {}, SCORES, headline=["quality"], budgets=budgets))
    assert "each best cell was chosen on these same captions" in text and "of the change of" not in text


def colours(image: Image.Image) -> set:
    return {colour for _, colour in image.getcolors(1 << 20) or []}


def test_marked_words_and_only_those_are_in_colour():
    text, marks = "A red ring. Red the is.", [Mark(2, 5, "false"), Mark(12, 23, "ungrammatical")]
    pieces = marked_text(text, marks)
    assert "".join(piece.text for piece in pieces) == text
    filled = [(piece.text, flaw) for piece in pieces for flaw, fill in FILL.items() if piece.fill == fill]
    flaw = "ungrammatical"
    assert filled == [("red", "false"), *((word, flaw) for word in ("Red", " ", "the", " ", "is."))]
    assert set(FILL.values()) <= colours(text_box(pieces, width=300))
    assert not colours(text_box(marked_text(text, []), width=300)) & set(FILL.values())
    assert [piece.text for piece in marked_text("  ", [])] == ["(empty)"]


def test_a_box_is_as_high_as_its_lines_and_keeps_inside():
    word = Piece("word", ink=(255, 0, 0), fill=(0, 0, 255))
    one, wide = text_box([word], width=300), Piece("extraordinarily" * 3)
    assert one.getpixel((0, 0)) == (0, 0, 255) and (255, 0, 0) in colours(one)
    assert text_box([word] * 12, width=100).height > 2 * one.height
    assert text_box([Piece("a"), wide, Piece("b")], width=100).height == 3 * one.height
    spaced = text_box([Piece("a"), wide, Piece(" ", fill=(0, 255, 0)), Piece("b")], width=100)
    assert (0, 255, 0) not in colours(spaced)  # no line starts with a space
    red, blue = Image.new("RGB", (10, 20), (255, 0, 0)), Image.new("RGB", (30, 5), (0, 0, 255))
    grid = sheet([[red, blue], [blue, red]], pad=2)
    assert grid.size == (2 + 30 + 2 + 30 + 2, 2 + 20 + 2 + 20 + 2)
    assert grid.getpixel((2, 2)) == grid.getpixel((34, 24)) == (255, 0, 0)
