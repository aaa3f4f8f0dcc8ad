"""The codec and the formats of prompts: which one is taken, what it makes of a question, and what may be wrong."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer

from src.prompts.format import FOLDER, IMAGE, PromptFormat
from src.tokenizer import BOS, EOS, EOT, HEADER_END, HEADER_START, MASK, SPECIAL, Codec

ROOT = Path(__file__).resolve().parents[1]
QUESTION, ANSWER = "Describe the picture.", "A small red ring."
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train([QUESTION, ANSWER], vocab_size=300, alphabet="bytes")


@pytest.fixture
def folder(codec, tmp_path) -> Path:
    """A folder with nothing but tokenizer.json."""
    codec.save(tmp_path / "all")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "all" / "tokenizer.json", tmp_path / "bare")
    return tmp_path / "bare"


def write(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def ids_of(codec: Codec, *parts: str | int) -> list[int]:
    """Special tokens, and texts each encoded by itself."""
    found: list[int] = []
    for part in parts:
        if isinstance(part, int):
            found.append(part)
        elif part in SPECIAL:
            found.append(codec.tokenizer.get_vocab()[part])
        else:
            found += codec.encode(part)[0]
    return found


def asks(codec: Codec, *parts: str | int) -> list[int]:
    """A prompt of the small models: one question of these parts."""
    return ids_of(
        codec, BOS, HEADER_START, "user", HEADER_END, *parts, EOT, HEADER_START, "assistant", HEADER_END
    )  # fmt: skip


def test_prompts_of_the_small_models_by_hand(codec) -> None:
    assert codec.prompt_ids(QUESTION, images=0) == asks(codec, QUESTION)
    assert codec.prompt_ids(QUESTION) == asks(codec, codec.image_id, QUESTION)
    assert codec.prompt_ids(QUESTION, images=2) == asks(codec, codec.image_id, codec.image_id, QUESTION)
    assert codec.prompt_ids(f"Is {IMAGE} red?") == asks(codec, "Is ", codec.image_id, " red?")
    turns = [(QUESTION, ANSWER)]
    answered = ids_of(codec, ANSWER, EOT, HEADER_START, "user", HEADER_END, "Why?", EOT, HEADER_START, "assistant")
    assert codec.prompt_ids("Why?", turns=turns) == [
        *asks(codec, codec.image_id, QUESTION), *answered, codec.tokenizer.get_vocab()[HEADER_END]
    ]  # fmt: skip
    assert codec.prompt_ids(f"{IMAGE}Why?", turns=turns) != codec.prompt_ids("Why?", turns=turns)


@pytest.mark.parametrize(("text", "images"), [(IMAGE, 0), (IMAGE, 2), (f"{IMAGE}{IMAGE}", 1)])
def test_marks_must_be_as_many_as_images(text, images, codec) -> None:
    with pytest.raises(ValueError, match=f"^{text.count(IMAGE)} image marks in '{text}', but {images} images$"):
        codec.prompt_ids(text, images=images)
    with pytest.raises(ValueError, match="image marks in 'Why"):
        codec.prompt_ids("Why?", images=images, turns=[(text, ANSWER)])


def test_the_released_formats_differ_where_they_should(folder) -> None:
    """LLaDA-V says a system text and puts a line between image and question; LLaDA has neither and trims."""
    seen, text = (Codec.load(folder, prompt_format=name) for name in ("llada_v", "llada"))
    system = seen.prompt_format.system
    head = [BOS, HEADER_START, "system", HEADER_END, "\n\n", system, EOT]
    body = [HEADER_START, "user", HEADER_END, "\n\n"]
    tail = [EOT, HEADER_START, "assistant", HEADER_END, "\n\n"]
    expected = ids_of(seen, *head, *body, seen.image_id, f"\n{QUESTION} ", *tail)
    assert seen.prompt_ids(f"{QUESTION} ") == expected
    assert text.prompt_ids(f" {QUESTION} ", images=0) == ids_of(text, BOS, *body, QUESTION, *tail)
    short = seen.with_format(system="")
    assert short.prompt_ids(QUESTION, images=0) == ids_of(seen, BOS, *body, QUESTION, *tail)
    assert seen.with_format(system=None) is seen
    assert short.fingerprint == seen.fingerprint != text.fingerprint


def test_upstream_drops_a_token_only_behind_a_prompt_that_starts_with_bos(folder, tmp_path) -> None:
    template = "{{ messages[0]['content'] }}"
    file = write(tmp_path / "f.yaml", template=template, join="upstream", image=f"{IMAGE}\n")
    plain = Codec.load(folder, prompt_format=file)
    assert plain.prompt_ids(QUESTION) == ids_of(plain, plain.image_id, f"\n{QUESTION}")
    write(file, template=BOS + template, join="upstream", image=f"{IMAGE}\n")
    begun = Codec.load(folder, prompt_format=file)
    assert begun.prompt_ids(QUESTION) == ids_of(begun, BOS, begun.image_id, QUESTION)


def test_which_format_is_taken(folder, codec) -> None:
    with pytest.raises(ValueError, match=r"no chat template, and there is no prompt\.yaml"):
        Codec.load(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llada"}))
    assert Codec.load(folder).prompt_format == PromptFormat.load("llada_v")
    (folder / "config.json").write_text(json.dumps({"model_type": "llada"}))
    assert Codec.load(folder).prompt_format == PromptFormat.load("llada")
    own = "{{ messages[0]['content'] }}" + EOT
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "chat_template": own}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Codec.load(folder).prompt_format == PromptFormat(template=own, suppress=())
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llada"}))
    assert Codec.load(folder).prompt_format == PromptFormat.load("llada_v")
    (folder / "config.json").write_text(json.dumps({"model_type": "rediff_llada_v"}))
    assert Codec.load(folder).prompt_format == PromptFormat(template=own)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        Codec.load(folder)
    write(folder / "prompt.yaml", template="mine", system="Be brief.")
    assert Codec.load(folder).prompt_format == PromptFormat(template="mine", system="Be brief.")
    assert Codec.load(folder, prompt_format="tiny").prompt_format == codec.prompt_format


def test_folders_of_earlier_versions_keep_their_fingerprint(tmp_path) -> None:
    """Data and models name their tokenizer by it; it depends on tokenizer and template only."""
    base = ROOT / "assets" / "base"
    state = Tokenizer.from_file(str(base / "tokenizer.json")).to_str() + (base / "chat_template.jinja").read_text()
    codec = Codec.load(base)
    assert codec.fingerprint == hashlib.sha256(state.encode()).hexdigest()[:16]
    assert codec.prompt_format == PromptFormat.load("tiny")
    codec.save(tmp_path)
    assert Codec.load(tmp_path).fingerprint == codec.fingerprint
    assert Codec.load(tmp_path).special == codec.special


def as_released(folder: Path) -> dict[str, bytes]:
    """Give a folder with tokenizer.json the other files as transformers 4 wrote them; the content of all four."""
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
    added = {str(token.pop("id")): token for token in json.loads(json.dumps(state["added_tokens"]))}
    others = [EOT, HEADER_START, HEADER_END, IMAGE]
    config = {
        "added_tokens_decoder": added, "additional_special_tokens": others, "bos_token": BOS, "eos_token": EOS,
        "chat_template": "{{ messages[0]['content'] }}" + EOT, "clean_up_tokenization_spaces": True,
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 10**30, "pad_token": EOS, "add_bos_token": False,
    }  # fmt: skip
    roles = {"bos_token": {"content": BOS, "lstrip": False, "rstrip": False}, "additional_special_tokens": others}
    for name, content in {"tokenizer": state, "tokenizer_config": config, "special_tokens_map": roles}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=4))
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_files_of_a_tokenizer_are_saved_as_they_were_read(folder, tmp_path) -> None:
    """Byte for byte, also when the source is gone: earlier transformers cannot read what this one writes."""
    original = as_released(folder)
    first = Codec.load(folder)
    shutil.rmtree(folder)
    first.save(tmp_path / "one")
    again = Codec.load(tmp_path / "one").with_format(system="Be brief.")
    again.save(tmp_path / "two")
    assert len(original) == 4
    for saved in (tmp_path / "one", tmp_path / "two"):
        found = {file.name: file.read_bytes() for file in saved.iterdir()}
        assert found.pop("prompt.yaml")
        assert found == original
    last = Codec.load(tmp_path / "two")
    assert (last.fingerprint, last.special) == (first.fingerprint, first.special)
    assert last.prompt_format.system == "Be brief."


def test_a_tokenizer_without_a_config_knows_its_special_tokens(folder, codec) -> None:
    bare = Codec.load(folder, prompt_format="tiny")
    assert bare.fingerprint == codec.fingerprint
    assert bare.special == codec.special
    assert bare.prompt_ids(QUESTION) == codec.prompt_ids(QUESTION)
    spelt = ids_of(bare, ANSWER, BOS, IMAGE, EOT)
    assert bare.decode([*spelt, *bare.encode(ANSWER)[0]]) == ANSWER


def test_what_a_response_may_not_contain(folder, tmp_path, codec) -> None:
    vocabulary = codec.tokenizer.get_vocab()
    rest = sorted(vocabulary[token] for token in (MASK, BOS, HEADER_START, HEADER_END, IMAGE))
    assert codec.banned_ids == rest  # without a list: all but the ends of a turn and of the text
    for suppress in ([EOS, BOS], []):
        file = write(tmp_path / "f.yaml", template="x", suppress=suppress)
        found = Codec.load(folder, prompt_format=file)
        assert found.banned_ids == sorted(vocabulary[token] for token in [*suppress, IMAGE])
        assert found.special.banned == tuple(found.banned_ids)
    file = write(tmp_path / "f.yaml", template="x", suppress=["<none>"])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}: the tokenizer has no <none> token$"):
        Codec.load(folder, prompt_format=file)


@pytest.mark.parametrize("name", NAMES)
def test_formats_survive_saving(name, tmp_path) -> None:
    found = PromptFormat.load(name)
    found.save(tmp_path / "prompt.yaml")
    assert PromptFormat.load(tmp_path / "prompt.yaml") == found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("template: x\nsytem: Be brief.", "unknown key 'sytem'; the keys are template, system, image, join, suppress"),
        ("system: Be brief.", "a prompt format needs a template; its keys are template"),
        ("- template", "a prompt format needs a template"),
        ("template: [x]", r"template must be a text, got \['x'\]"),
        ("template: x\nsystem: 3", "system must be a text, got 3"),
        ("template: x\nimage: picture", "image must hold <image> once, got 'picture'"),
        ("template: x\njoin: upstraem", "join must be one of keep, upstream, got 'upstraem'"),
        ("template: x\nsuppress: <x>", "suppress must be a list of tokens, got '<x>'"),
        ("template: x\nsuppress: [3]", r"suppress must be a list of tokens, got \[3\]"),
        ("template: {", "while parsing a flow"),
    ],
)
def test_mistakes_in_a_format_are_named(content, words, tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        PromptFormat.load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


BROKEN = [
    ("{% if %}", r"the chat template fails, line 1: Expected an expression"),
    ("{{ messages[0]['content'] }}\n{% for m in messages %}", r"the chat template fails, line 2: Unexpected end"),
    ("{{ raise_exception('say a system text') }}", "the chat template fails: say a system text"),
    ("{{ messages[0]['content'] + 1 }}", "the chat template fails: can only concatenate str"),
]


@pytest.mark.parametrize(("template", "words"), BROKEN)
def test_a_broken_chat_template_is_one_line_that_names_its_file(template, words, codec, folder, tmp_path) -> None:
    own, mine = tmp_path / "all", write(tmp_path / "mine.yaml", template=template)
    places = [(folder, mine, mine)]
    for name in ("prompt.yaml", "chat_template.jinja"):
        (own / "prompt.yaml").unlink(missing_ok=True)
        file = write(own / name, template=template) if name.endswith("yaml") else own / name
        if file.suffix == ".jinja":
            file.write_text(template)
        with pytest.raises(ValueError, match=words) as error:
            Codec.load(own)
        assert str(error.value).startswith(f"{file}: the chat template fails")
    for path, given, file in places:
        with pytest.raises(ValueError, match=words) as error:
            Codec.load(path, prompt_format=given)
        assert str(error.value).startswith(f"{file}: the chat template fails")
        assert "\n" not in str(error.value)
    later = "{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}x"
    write(mine, template=later)
    with pytest.raises(ValueError, match="the chat template fails: one question only"):
        Codec.load(folder, prompt_format=mine).prompt_ids("Why?", images=0, turns=[(QUESTION, ANSWER)])


def test_unwritten_ids_are_all_special_ones(codec) -> None:
    vocabulary = codec.tokenizer.get_vocab()
    assert codec.special.unwritten == tuple(sorted(vocabulary[token] for token in SPECIAL))


@pytest.mark.parametrize("name", ["lada", "no/such.yaml"])
def test_an_unknown_format_lists_those_there_are(name) -> None:
    with pytest.raises(ValueError, match=f"no prompt format '{name}': take {', '.join(NAMES)}, or the path"):
        PromptFormat.load(name)
