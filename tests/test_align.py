"""Edits to token spans, checked against plain replacement of characters."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from src.scenes.grammar import LEXICON, swaps, write_caption
from src.scenes.graph import draw_scene
from src.text.align import Aligned, apply_spans, locate, locate_swap
from src.text.tokenizer import BOS, SPECIAL, Codec
from src.types import Edit

ODD = "Häuser naïve 東京タワー 🙂🙃 isn't e\u0301 co-op “quoted” tab\there  two  blanks\nline ½"


def _captions(count: int) -> list[str]:
    rng = Random(7)
    return [write_caption(draw_scene(rng, objects=(1, 9)), rng) for _ in range(count)]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train(_captions(200), vocab_size=400)


@pytest.fixture(scope="module")
def raw_codec() -> Codec:
    """One token per byte."""
    return Codec.train([], vocab_size=263, alphabet="bytes")


@pytest.fixture(scope="module")
def byte_codec() -> Codec:
    return Codec.train([*_captions(50), ODD], vocab_size=420, alphabet="bytes")


def _cut(codec: Codec, text: str, rng: Random) -> list[int]:
    """Ids of a text that is encoded in random pieces."""
    cuts = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(len(text) // 4))})
    return [i for a, b in pairwise(cuts) for i in codec.encode(text[a:b])[0]]


def _apart(rng: Random, places: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    chosen: list[tuple[int, int]] = []
    for start, end in rng.sample(places, min(count, len(places))):
        if all(end <= a or b <= start for a, b in chosen):
            chosen.append((start, end))
    return chosen


def _replaced(text: str, changes: list[tuple[int, int, str]]) -> str:
    for start, end, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _locate(codec: Codec, ids: list[int], changes: list[tuple[int, int, str]]) -> Aligned:
    """Locate all changes; the result must read as if exactly the accepted ones were made in the text."""
    text = codec.decode(ids)
    aligned = locate(codec, ids, [Edit(text[a:b], new, a) for a, b, new in changes])
    end = 0
    for span in aligned.spans:
        assert end <= span.start < span.end <= len(aligned.ids)
        assert len(span.target_ids) == span.end - span.start
        assert span.target_ids[0] != aligned.ids[span.start]
        assert span.target_ids[-1] != aligned.ids[span.end - 1]
        end = span.end
    assert len(aligned.spans) + sum(aligned.rejected.values()) == len(changes)
    assert codec.decode(aligned.ids) == text
    wanted = Counter((span.org, span.target) for span in aligned.spans)
    accepted = [c for c in changes if wanted[text[c[0] : c[1]], c[2]]]
    if len(accepted) == len(aligned.spans):  # else two edits read the same, and only one of them was accepted
        assert codec.decode(apply_spans(aligned.ids, aligned.spans)) == _replaced(text, accepted)
    return aligned


@pytest.mark.parametrize("chopped", [False, True])
@pytest.mark.parametrize("gaps", [None, 0, 4])
def test_edits_of_captions_equal_replacement(codec: Codec, chopped: bool, gaps: int | None) -> None:
    """Of several edits in captions, by a codec without a gap, and by one with gaps in the draft or without."""
    rng, resized, rejected, total = Random(11), Counter[str](), Counter[str](), 0
    one = codec if gaps is None else _gapped(codec)
    words = sorted({w for name in ("size", "colour", "shape", "row", "number") for w in LEXICON[name]})
    longest = 0 if gaps is None else 3  # further words of an edit
    for text in _captions(120):
        ids = _cut(one, text, rng) if chopped else one.encode(text)[0]
        ids = [*_sprinkled(one, ids, rng, gaps or 0), one.eot_id, one.eos_id]
        starts = [0, *(i + 1 for i, char in enumerate(text) if char == " ")]
        ends = [i + len(text[i:].split(" ")[0].rstrip(".,")) for i in starts]
        places = [(a, ends[min(i + rng.randint(0, min(longest, 2)), len(ends) - 1)]) for i, a in enumerate(starts)]
        places = _apart(rng, places, 5)
        changes = [(a, b, " ".join(rng.choices(words, k=rng.randint(1, 1 + longest)))) for a, b in places]
        aligned = _locate(one, ids, changes)
        bare = [token for token in ids if token != one.gap_id]
        assert [token for token in aligned.ids if token != one.gap_id] == bare
        assert aligned.ids[-2:] == ids[-2:]
        assert bool(aligned.resized["stretched"]) == (len(aligned.ids) > len(ids))
        resized, rejected, total = resized + aligned.resized, rejected + aligned.rejected, total + len(changes)
    if gaps is None:
        assert set(rejected) <= {"unequal_length", "no_change"}
        assert sum(rejected.values()) < 0.75 * total
    else:
        assert set(rejected) <= {"no_change", "overlap"}
        assert sum(rejected.values()) < total / 20
        assert min(resized["stretched"], resized["shortened"]) > 50
        assert bool(resized["filled"]) == bool(gaps)


@pytest.mark.parametrize("chopped", [False, True])
def test_accepted_character_edits_equal_replacement_on_odd_text(byte_codec: Codec, chopped: bool) -> None:
    rng, rejected, total = Random(2), Counter[str](), 0
    for _ in range(120):
        text = " ".join(rng.sample(ODD.split(" "), 6))
        ids = _cut(byte_codec, text, rng) if chopped else byte_codec.encode(text)[0]
        places = [(a, a + rng.randint(1, 5)) for a in range(len(text) - 5)]
        changes = [(a, b, "".join(rng.sample(ODD, b - a))) for a, b in _apart(rng, places, 4)]
        rejected += _locate(byte_codec, ids, changes).rejected
        total += len(changes)
    assert set(rejected) <= {"unequal_length", "no_change", "overlap"}
    assert sum(rejected.values()) < total * 0.95


def test_byte_tokens_take_any_replacement_of_equally_many_bytes(raw_codec: Codec) -> None:
    text = "Die Häuser: 東京 🙂 end."
    ids = raw_codec.encode(text)[0]
    for org, target in (("🙂", "🙃"), ("東京", "京東"), ("ä", "ö"), ("Die", "Das"), (".", "!")):
        (span,) = locate(raw_codec, ids, [Edit(org, target)]).spans
        assert raw_codec.decode(apply_spans(ids, [span])) == text.replace(org, target)
    (span,) = locate(raw_codec, ids, [Edit("ä", "ö")]).spans
    assert span.end - span.start == 1  # both letters start with the same byte, which is not part of the span


def test_minimal_span_of_a_long_quote(codec: Codec) -> None:
    text = "A small red ring is in the upper left."
    ids, offsets = codec.encode(text)
    (span,) = locate(codec, ids, [Edit("A small red ring is in", "A small blue ring is in")]).spans
    place = next(i for i, (a, b) in enumerate(offsets) if text[a:b].strip() == "red")
    assert (span.start, span.end) == (place, place + 1)
    assert span.target_ids == codec.encode(" blue")[0]
    assert (span.org, span.target) == ("A small red ring is in", "A small blue ring is in")
    aligned = locate(codec, ids, [Edit("red ring", "blue ring"), Edit("red ring", "red square")])
    assert codec.decode(apply_spans(ids, aligned.spans)) == "A small blue square is in the upper left."


@pytest.mark.parametrize(
    ("org", "target", "start", "result"),
    [
        ("One", "Two", None, "Two object is red, quite red, left."),  # start of the text: no blank before it
        ("red", "blue", 14, "One object is blue, quite red, left."),
        ("red", "blue", 25, "One object is red, quite blue, left."),  # before a comma
        ("red,", "blue,", 25, "One object is red, quite blue, left."),
        ("left", "right", None, "One object is red, quite red, right."),  # before the full stop
        ("left.", "right.", None, "One object is red, quite red, right."),
        ("left", "right", 999, "One object is red, quite red, right."),  # a wrong place, but unique
    ],
)
def test_known_edits(codec: Codec, org: str, target: str, start: int | None, result: str) -> None:
    ids, _ = codec.encode("One object is red, quite red, left.")
    aligned = locate(codec, [*ids, codec.eot_id], [Edit(org, target, start)])
    assert not aligned.rejected
    assert codec.decode(apply_spans(ids, aligned.spans)) == result


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (Edit("", "blue"), "empty"),
        (Edit("red", "red", 14), "no_change"),
        (Edit("purple", "blue"), "absent"),
        (Edit("red", "blue"), "ambiguous"),
        (Edit("red", "blue", 15), "ambiguous"),
        (Edit(" object", ""), "unequal_length"),
        (Edit("object is", "object is is"), "unequal_length"),
        *((Edit("One", target), "unknown") for target in ("One€", "€Two", "東京")),  # would be dropped silently
    ],
)
def test_reasons(codec: Codec, edit: Edit, reason: str) -> None:
    ids, _ = codec.encode("One object is red, quite red, left.")
    assert locate(codec, ids, [edit]) == Aligned([], Counter({reason: 1}), ids)
    assert locate(codec, [], []) == Aligned([], Counter())


def test_the_first_of_overlapping_edits_wins(codec: Codec) -> None:
    ids, _ = codec.encode("One object is red, quite red, left.")
    edits = [Edit("red", "blue", 14), Edit("is red", "is green", 11), Edit("is red", "on red", 11)]
    aligned = locate(codec, ids, edits)
    assert aligned.rejected == {"overlap": 1}
    assert codec.decode(apply_spans(ids, aligned.spans)) == "One object on blue, quite red, left."
    ids, _ = codec.encode("A red square.")
    assert len(codec.encode(" square")[0]) == 1  # two edits within one token
    aligned = locate(codec, ids, [Edit("squ", "squ"), Edit("square", "circle"), Edit("are", "ARE")])
    assert aligned.rejected["no_change"] == 1
    assert codec.decode(apply_spans(ids, aligned.spans)) == "A red circle."


@pytest.mark.parametrize(("org", "target"), [("red", "tan"), ("dot", "hat")])
def test_whole_words_come_before_parts_of_words(raw_codec: Codec, org: str, target: str) -> None:
    ids = raw_codec.encode("scattered red dots")[0]
    (span,) = locate(raw_codec, ids, [Edit(org, target)]).spans
    assert raw_codec.decode(apply_spans(ids, [span])) == "scattered red dots".replace(f" {org}", f" {target}")


def test_special_tokens_inside_a_draft(codec: Codec) -> None:
    a, b = codec.encode("A small red")[0], codec.encode(" ring is in the upper left.")[0]
    ids = [codec.eos_id, *a, codec.mask_id, *b, codec.eos_id, codec.eot_id, *a, *b]
    edits = [Edit("A", "The"), Edit("red", "blue"), Edit("ring", "square"), Edit("left", "right")]
    aligned = locate(codec, ids, edits)
    assert not aligned.rejected
    fixed = apply_spans(ids, aligned.spans)
    assert codec.decode(fixed) == "The small blue square is in the upper right."
    assert [i for i, t in enumerate(fixed) if t in (codec.eos_id, codec.mask_id, codec.eot_id)] == [
        i for i, t in enumerate(ids) if t in (codec.eos_id, codec.mask_id, codec.eot_id)
    ]
    through = locate(codec, ids, [Edit("red ring", "blue square")])
    assert through.rejected == {"unequal_length": 1}  # three tokens, one of them special


@pytest.mark.parametrize("token", SPECIAL)
def test_a_special_token_in_an_edit_is_text(raw_codec: Codec, token: str) -> None:
    """As the target, as the quote, and in a draft that spells one."""
    control = set(raw_codec.special.unwritten)
    for org, target in (("x" * len(token), token), (token, "y" * len(token)), (f"{token} e", f"{token} E")):
        ids = raw_codec.encode(f"a {org}nd")[0]
        (span,) = locate(raw_codec, ids, [Edit(org, target)]).spans
        fixed = apply_spans(ids, [span])
        assert control.isdisjoint([*ids, *fixed]) and raw_codec.decode(fixed) == f"a {target}nd"
    text = f"a {token} dog"
    first, stop, wrong = locate_swap(raw_codec, text, 2, 2 + len(token), token[::-1]) or (0, 0, [])
    assert wrong and control.isdisjoint(wrong) and stop - first == len(wrong)


def test_swaps_of_captions_change_only_their_tokens(codec: Codec) -> None:
    rng, accepted, total = Random(3), 0, 0
    for _ in range(60):
        scene = draw_scene(rng)
        text = write_caption(scene, rng)
        ids, offsets = codec.encode(text)
        for swap in swaps(scene, text, rng):
            wrong_text = _replaced(text, [(swap.start, swap.end, swap.wrong)])
            wrong_ids = codec.encode(wrong_text)[0]
            located = locate_swap(codec, text, swap.start, swap.end, swap.wrong)
            total += 1
            assert (located is None) == (len(wrong_ids) != len(ids))
            if located:
                accepted += 1
                first, end, wrong = located
                assert [*ids[:first], *wrong, *ids[end:]] == wrong_ids
                assert all(a < swap.end and b > swap.start for a, b in offsets[first:end])
    assert accepted > total / 2


def test_swaps_that_cannot_be_had(codec: Codec) -> None:
    text = "A red ring is in the upper left."
    for start, end, wrong in ((2, 5, "red"), (2, 5, "red blue"), (0, 1, ""), (2, 5, "€blue")):  # € would be dropped
        assert locate_swap(codec, text, start, end, wrong) is None
    merged = Codec.train(["ab"] * 9 + ["xc"] * 9, vocab_size=265, alphabet="bytes")
    assert [len(merged.encode(text)[0]) for text in ("ab", "xc", "abc", "axc")] == [1, 1, 2, 2]
    assert locate_swap(merged, "abc", 1, 2, "x") is None  # ab|c becomes a|xc: the c changes its token
    assert locate_swap(merged, "abc", 1, 3, "xc") == (0, 2, merged.encode("axc")[0])


def _gapped(codec: Codec) -> Codec:
    return codec.with_format(gap=BOS)


def _sprinkled(codec: Codec, ids: list[int], rng: Random, count: int) -> list[int]:
    """The ids with gaps at random places."""
    ids = list(ids)
    for _ in range(count):
        assert codec.gap_id is not None
        ids.insert(rng.randrange(len(ids) + 1), codec.gap_id)
    return ids


@pytest.mark.parametrize(
    ("edit", "marked", "drafted", "corrected"),  # tokens and gaps (_) of the draft to train on, and of the right text
    [
        (Edit("is is", "is"), "One|object|is|is|red,|quite|red.", None, "One|object|is|_|red,|quite|red."),
        (Edit(" object", ""), "One|object|is|red.", None, "One|_|is|red."),
        (Edit("object is", "ring"), "One|object|is|red.", None, "One|ring|_|red."),
        (Edit("One", "One blue"), "One|object|is|red.", "One|_|object|is|red.", "One|blue|object|is|red."),
        (Edit("is", "holds two"), "One|object|is|red.", "One|object|is|_|red.", "One|object|holds|two|red."),
        (Edit("red.", "red. red."), "One|object|is|red.", None, "One|object|is|red.|red."),
        # gaps of the draft are used up first, on either side, and stay where they are not needed
        (Edit("is", "is quite"), "One|object|is|_|red.", "One|object|is|_|red.", "One|object|is|quite|red."),
        (Edit("red", "quite red"), "One|object|is|_|red.", "One|object|is|_|red.", "One|object|is|quite|red."),
        (Edit("is red", "on blue"), "One|object|is|_|red.", "One|object|is|_|red.", "One|object|on|_|blue."),
        (Edit("is red", "on"), "One|object|is|_|red.", "One|object|is|_|red.", "One|object|on|_|_."),
        (Edit("is", "is quite quite"), "One|is|_|red.", "One|is|_|_|red.", "One|is|quite|quite|red."),
    ],
)
def test_gaps_take_up_edits_of_unequal_length(codec, edit, marked, drafted, corrected):
    one = _gapped(codec)

    def ids_of(line: str) -> list[int]:
        ids = list[int]()
        for place, word in enumerate(line.split("|")):
            bare = word.removesuffix(".").removesuffix(",")
            blank = " " if place else ""
            ids += [one.gap_id] if bare == "_" else one.encode(blank + bare)[0]  # type: ignore[list-item]
            ids += one.encode(word[len(bare) :])[0]
        return [*ids, one.eot_id]

    ids = ids_of(marked)
    aligned = locate(one, ids, [edit])
    assert not aligned.rejected
    if drafted is not None or len(ids_of(corrected)) == len(ids):
        assert aligned.ids == ids_of(drafted or marked)
    assert one.decode(aligned.ids) == one.decode(ids)
    assert apply_spans(aligned.ids, aligned.spans) == ids_of(corrected)
