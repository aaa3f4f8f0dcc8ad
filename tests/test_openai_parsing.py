"""What an expert model may write, and how a request looks: parsing, prompt, image, profiles."""

from __future__ import annotations

import base64
import io
import json
import re
from random import Random

import numpy as np
import pytest
from PIL import Image

from src.chat.client import Unanswered
from src.chat.profiles import PROFILES, Profile
from src.chat.reading import LONGEST
from src.experts.prompt import FILE, Prompt, show
from src.experts.reply import MOST_EDITS, SCHEMA, read_reply
from src.text.tokenizer import BOS, Codec
from src.types import Draft, Edit

EDITS = [{"org": "red", "target": "blue", "reason": "it is blue"}, {"org": "two", "target": "three", "reason": ""}]
REPLY = json.dumps({"right": False, "edits": EDITS})
EXPECTED = (Edit("red", "blue", None, "it is blue"), Edit("two", "three"))

CODEC = Codec.train(["Two red rings, three blue ones."], vocab_size=300, alphabet="bytes")
FORM = {"name": "revision", "schema": SCHEMA}


@pytest.mark.parametrize(
    "text",
    [
        REPLY,
        json.dumps({"right": False, "edits": EDITS}, indent=2),
        f"```json\n{REPLY}\n```",
        f"```\n{REPLY}\n```\nHope that helps!",
        f"The ring [see 1] is blue {{really}}. So:\n\n{REPLY}",
        json.dumps(EDITS),
        json.dumps({"edits": EDITS}),
        f'For example {{"right": true, "edits": []}} would be wrong. My answer: {REPLY}',  # the last one counts
        f'<think>Perhaps {{"right": true, "edits": []}}?</think>{REPLY}',
        json.dumps({"right": False, "edits": EDITS, "confidence": 0.9}),
    ],
)
def test_edits_are_found(text: str) -> None:
    assert read_reply(text)[0] == EXPECTED


@pytest.mark.parametrize(
    "text",
    [
        *("right", "Right.", ' "right"\n', "**right**", "[]"),
        *('{"right": true}', '{"right": true, "edits": []}', '{"edits": []}'),
    ],
)
def test_right_is_no_edits(text: str) -> None:
    assert read_reply(text)[0] == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("<think>for ever", "empty"),
        ("I think it is right.", "malformed"),
        ("{'right': False, 'edits': [{'org': 'red', 'target': 'blue'}]}", "malformed"),
        (REPLY[:30], "malformed"),
        ("x" * LONGEST + REPLY, "malformed"),
        ("[" * 50_000, "malformed"),
        ('{"answer": 3}', "wrong_schema"),
        ('{"right": "yes", "edits": []}', "wrong_schema"),
        ('{"right": false, "edits": {"org": "red"}}', "wrong_schema"),
        ('{"right": false, "edits": [{"from": "red", "to": "blue"}]}', "wrong_schema"),
        ('{"right": false, "edits": [["red", "blue"]]}', "wrong_schema"),
        ('[1, 2, "red"]', "wrong_schema"),
        ('{"right": false, "edits": []}', "contradiction"),
        (json.dumps({"right": True, "edits": EDITS}), "contradiction"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, reason: str) -> None:
    with pytest.raises(Unanswered) as error:
        read_reply(text)
    assert str(error.value) == reason


def test_wrong_items_are_counted_and_the_others_kept() -> None:
    items = [*EDITS, {"org": "", "target": "x"}, {"org": 3, "target": "x"}, "red", {"org": "a"}]
    assert read_reply(json.dumps({"right": False, "edits": items})) == (EXPECTED, 4)
    many = [{"org": f"a{n}", "target": "\ud83d"} for n in range(300)]  # half a character cannot be written to a file
    edits, num_malformed = read_reply(json.dumps({"right": False, "edits": many}))
    assert (len(edits), num_malformed, edits[0].target) == (MOST_EDITS, 300 - MOST_EDITS, "?")


def test_any_text_is_read_or_refused() -> None:
    """Random pieces of JSON and prose: edits, or a reason, and never anything else."""
    pieces = [*'{}[]",:', "right", "edits", "org", "target", "true", "false", '"org"', REPLY, "```", " ", "\\", "1e999"]
    rng, outcomes = Random(1), set()
    for _ in range(3000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))
        try:
            outcomes.add(bool(read_reply(text)[0]))
        except Unanswered as error:
            outcomes.add(str(error))
    assert outcomes >= {True, False, "malformed", "wrong_schema"}
    assert outcomes <= {True, False, "empty", "malformed", "wrong_schema", "contradiction"}


# the request


def _draft(**changed) -> Draft:
    given = {"text": "A $red ring.", "reference": "A blue ring.", "image": b"", **changed}
    return Draft(key="k", prompt="What is it?", token_ids=[], steps=8, sampler={}, fingerprint="f", seed=0, **given)


def _png(size: tuple[int, int], mode: str = "RGB", kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind)
    return stream.getvalue()


def test_the_prompt_shows_the_form_that_is_read_and_asked_for() -> None:
    """The examples in revise.md are answers of ours, and of the schema's form."""
    system = Prompt(CODEC).first(_draft(), None)[0]["content"]
    answers = [json.loads(text) for text in re.findall(r"^\{.*\}$", system, re.MULTILINE)]
    assert [len(read_reply(json.dumps(answer))[0]) for answer in answers] == [1, 0]
    for answer in answers:
        assert set(answer) == set(SCHEMA["required"])
        for item in answer["edits"]:
            assert set(item) == set(SCHEMA["properties"]["edits"]["items"]["required"])


def test_messages_hold_all_that_is_known_once() -> None:
    draft = _draft(image=_png((8, 8)))
    system, user = Prompt(CODEC, detail="low").first(draft, show(draft.image, 64))
    picture, text = user["content"]
    assert picture["image_url"]["detail"] == "low"
    for part in (draft.prompt, draft.reference, draft.text):
        assert text["text"].count(part) == 1
    assert "has as many tokens" in system["content"]
    assert "$" not in text["text"].replace("$red", "")
    free = Prompt(CODEC.with_format(gap=BOS))
    assert "may be shorter or longer" in free.first(draft, None)[0]["content"]
    plain = Prompt(CODEC).first(_draft(reference=""), None)
    assert [part["type"] for part in plain[1]["content"]] == ["text"]
    assert "(none)" in plain[1]["content"][0]["text"]


def test_a_repair_names_every_problem_after_the_reply() -> None:
    prompt = Prompt(CODEC)
    messages, problems = prompt.first(_draft(), None), [(EXPECTED[0], "absent"), (EXPECTED[1], "unequal_length")]
    *before, reply, request = prompt.repair(messages, "my reply", problems)
    assert before == messages
    assert reply == {"role": "assistant", "content": "my reply"}
    assert "1. `red` -> `blue`: `org` is not in the draft" in request["content"]
    org, target = (len(CODEC.encode(f" {text}")[0]) for text in ("two", "three"))
    assert f"`org` is about {org} tokens long, `target` {target};" in request["content"]


def test_another_wording_has_another_digest(tmp_path) -> None:
    other = tmp_path / "revise.md"
    other.write_text(FILE.read_text().replace("careful", "strict"))
    assert Prompt(CODEC, path=other).digest != Prompt(CODEC).digest
    assert Prompt(CODEC).digest == "5af9073bb958bb4d"  # of the journals so far: another one asks all drafts again


def _shown(image: bytes, side: int) -> tuple[bytes, Image.Image]:
    """The bytes that are sent, and the image in them."""
    picture = show(image, side)
    assert picture is not None
    data = base64.b64decode(picture.url.partition("base64,")[2])
    decoded = Image.open(io.BytesIO(data))
    assert decoded.size == (picture.width, picture.height)
    assert picture.url.startswith(f"data:image/{(decoded.format or '').lower()};base64,")
    return data, decoded


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_that_is_small_enough_goes_as_it_is(kind: str) -> None:
    image = _png((64, 48), kind=kind)
    assert _shown(image, 64)[0] == image


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_a_larger_image_becomes_smaller(mode: str) -> None:
    shown = _shown(_png((200, 100), mode, "TIFF"), 50)[1]
    assert (shown.format, shown.size) == ("JPEG", (50, 25))
    if mode == "RGBA":  # wholly transparent black
        assert np.asarray(shown).min() > 250


@pytest.mark.parametrize("image", [b"no image", _png((9, 9))[:20]])
def test_a_damaged_image_is_a_failure(image: bytes) -> None:
    with pytest.raises(Unanswered, match="bad_image"):
        show(image, 64)


# profiles


def test_a_profile_sends_what_the_model_takes() -> None:
    none = {"temperature": None, "effort": None, "seed": None}
    thinking = PROFILES["reasoning"].parameters(limit=9, **FORM, sampling={**none, "effort": "low"})
    assert thinking["max_completion_tokens"] == 9
    assert thinking["reasoning_effort"] == "low"
    assert thinking["response_format"]["json_schema"]["schema"] == SCHEMA
    assert PROFILES["plain"].parameters(limit=9, **FORM, sampling={**none, "temperature": 0.0}) == {
        "max_tokens": 9, "temperature": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="does not accept temperature, seed; set it to null"):
        Profile(temperature=False).parameters(limit=9, **FORM, sampling={"temperature": 1.0, "effort": None, "seed": 3})
