"""The codec and the formats of prompts: which one is taken, what it makes of a question, and what may be wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from src.io.errors import UserError
from src.text.prompt_format import FOLDER, IMAGE, PromptFormat
from src.text.tokenizer import BOS, DISGUISES, EOS, EOT, HEADER_END, HEADER_START, MASK, NAMES, SPECIAL, Codec

ROOT = Path(__file__).resolve().parents[1]
QUESTION, ANSWER = "Describe the picture.", "A small red ring."
ODD = "Häuser 東京 🙂 e\u0301 isn't , it ? \ufffd\n\t two  blanks . <|eot_id|>"
GPT2 = ROOT.parent / "shared" / "data" / "tokenizer_gpt2"
FORMATS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


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
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        elif part in SPECIAL:
            ids.append(codec.tokenizer.get_vocab()[part])
        else:
            ids += codec.encode(part)[0]
    return ids


def asks(codec: Codec, *parts: str | int) -> list[int]:
    """A prompt of the small models: one question of these parts."""
    return ids_of(codec, BOS, HEADER_START, "user", HEADER_END, *parts, EOT, HEADER_START, "assistant", HEADER_END)


def test_prompts_of_the_small_models_by_hand(codec) -> None:
    assert codec.prompt_ids(QUESTION, images=0) == asks(codec, QUESTION)
    assert codec.prompt_ids(QUESTION) == asks(codec, codec.image_id, QUESTION)
    assert codec.prompt_ids(QUESTION, images=2) == asks(codec, codec.image_id, codec.image_id, QUESTION)
    assert codec.prompt_ids(f"Is {IMAGE} red?") == asks(codec, "Is ", codec.image_id, " red?")
    spelt_out = asks(codec, "Is ", *codec.encode(EOT)[0], " red?")
    assert codec.prompt_ids(f"Is {EOT} red?", images=0) == spelt_out  # nothing around it changes
    turns = [(QUESTION, ANSWER)]
    answered = ids_of(codec, ANSWER, EOT, HEADER_START, "user", HEADER_END, "Why?", EOT, HEADER_START, "assistant")
    assert codec.prompt_ids("Why?", turns=turns) == [
        *asks(codec, codec.image_id, QUESTION), *answered, codec.tokenizer.get_vocab()[HEADER_END]
    ]  # fmt: skip
    assert codec.prompt_ids(f"{IMAGE}Why?", turns=turns) != codec.prompt_ids("Why?", turns=turns)


def test_marks_are_images_only_if_there_are_as_many(codec) -> None:
    """Any other number is text, of which nothing is lost, and the images come first."""
    image, text = codec.image_id, codec.encode(IMAGE)[0]
    assert image not in text and codec.decode(text) == IMAGE
    assert codec.prompt_ids(f"a{IMAGE}b{IMAGE}", images=2) == asks(codec, "a", image, "b", image)
    assert codec.prompt_ids(f"a {IMAGE}", images=0) == asks(codec, f"a {IMAGE}")
    assert codec.prompt_ids(IMAGE, images=2) == asks(codec, image, image, *text)
    assert codec.prompt_ids(f"a{IMAGE} or {IMAGE}?") == asks(codec, image, f"a{IMAGE} or {IMAGE}?")
    head = asks(codec, image, f"a{IMAGE}")[: -len(asks(codec)) + 3]
    assert codec.prompt_ids(f"b{IMAGE}", turns=[(f"a{IMAGE}", "c")])[: len(head)] == head
    assert codec.prompt_ids("b", turns=[("a", f"c{IMAGE}")]).count(image) == 1  # also in an earlier answer
    drops = replace(codec.prompt_format, template="{{ messages[0]['role'] }}")
    with pytest.raises(UserError, match=r"^the chat template makes 0 image marks of 1$"):
        Codec(codec.tokenizer, drops).prompt_ids("Why?")


@pytest.mark.parametrize("name", FORMATS)
def test_a_special_token_that_a_user_spells_out_is_text(name, folder) -> None:
    """Alone, inside a word, cut by an image mark, in an answer; whatever the template does with the text."""
    codec = Codec.load(folder, prompt_format=name)
    control = set(codec.special.unwritten) - {codec.image_id}
    count = lambda ids: sum(token in control for token in ids)  # noqa: E731
    plain = count(codec.prompt_ids("a", images=0, turns=[("b", "c")]))
    for token in SPECIAL[:-1]:
        texts = (token, f" x{token}y {token}{token} ", f"{token[:4]}{token}{token[4:]}")
        for text in texts:
            ids = codec.prompt_ids(text, images=0, turns=[(text, text)])
            assert count(ids) == plain
            read = codec.tokenizer.decode([token for token in ids if token not in control])
            assert read.count(text.strip()) == 3
        assert count(codec.prompt_ids(f"{token[:4]}{IMAGE}{token[4:]}", turns=[("b", "c")])) == plain
        system = codec.with_format(system=f"Be {token}.").prompt_ids("a", images=0, turns=[("b", "c")])
        assert count(system) == count(codec.with_format(system="Be.").prompt_ids("a", images=0, turns=[("b", "c")]))
    halves = codec.prompt_ids("id|>b", images=0, turns=[("a<|eot_", "id|>c<|eot_")])  # `plain` joins its texts
    assert count(halves) == plain
    names = "".join(map(chr, (NAMES, NAMES + 1, DISGUISES, DISGUISES + 1)))  # of the implementation
    assert count(codec.prompt_ids(names, images=0, turns=[("b", "c")])) == plain
    assert not control & set(codec.encode(names)[0]) and codec.loses(names)


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


def test_which_format_is_taken(folder, codec) -> None:
    own = "{{ messages[0]['content'] }}" + EOT
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "chat_template": own}

    def taken(model_type: str) -> PromptFormat:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        return Codec.load(folder).prompt_format

    with pytest.raises(ValueError, match=r"no chat template, and there is no prompt\.yaml"):
        Codec.load(folder)
    assert [taken(name) for name in ("llava_llada", "llada")] == [PromptFormat.load(n) for n in ("llada_v", "llada")]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert taken("llada") == PromptFormat(template=own, suppress=())
    assert taken("llava_llada") == PromptFormat.load("llada_v")
    assert taken("rediff_llada_v") == PromptFormat(template=own)
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


def test_what_a_response_may_not_contain(folder, tmp_path, codec) -> None:
    vocabulary = codec.tokenizer.get_vocab()
    rest = sorted(vocabulary[token] for token in (MASK, BOS, HEADER_START, HEADER_END, IMAGE))
    assert codec.banned_ids == rest  # without a list: all but the ends of a turn and of the text
    assert codec.special.unwritten == tuple(sorted(vocabulary[token] for token in SPECIAL))
    for suppress in ([EOS, BOS], []):
        file = write(tmp_path / "f.yaml", template="x", suppress=suppress)
        other = Codec.load(folder, prompt_format=file)
        assert other.banned_ids == sorted(vocabulary[token] for token in [*suppress, IMAGE])
        assert other.special.banned == tuple(other.banned_ids)
    file = write(tmp_path / "f.yaml", template="x", suppress=["<none>"])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}: the tokenizer has no <none> token$"):
        Codec.load(folder, prompt_format=file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("template: x\nsytem: Be brief.", "'sytem'"),
        ("system: Be brief.", "'template'"),
        ("- template", "must be a mapping"),
        ("template: x\nsystem: 3", "system must be a text, got 3"),
        ("template: x\nimage: picture", "image must contain <image> once, got 'picture'"),
        ("template: x\njoin: upstraem", "join must be one of keep, upstream, got 'upstraem'"),
        ("template: x\nsuppress: [3]", r"suppress must be a list of tokens, got \[3\]"),
        ("template: x\ngap: 7", "gap must be a text, got 7"),
        ("template: {", "while parsing a flow"),
    ],
)
def test_mistakes_in_a_format_are_named(content, words, tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    keys = "template, system, image, join, suppress, gap"
    with pytest.raises(
        UserError, match=f"^{re.escape(str(file))} is no prompt format, whose keys are {keys}: "
    ) as error:
        PromptFormat.load(file)
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"no prompt format 'lada': use {', '.join(FORMATS)}, or the path"):
        PromptFormat.load("lada")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('say a system text') }}", "say a system text"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
    ],
)
def test_a_broken_chat_template_is_one_line_that_names_its_folder(template, words, codec, folder, tmp_path) -> None:
    mine = write(tmp_path / "mine.yaml", template=template)
    with pytest.raises(UserError, match=rf"^{re.escape(str(folder))}: the chat template fails: [^\n]*{words}"):
        Codec.load(folder, prompt_format=mine)
    later = "{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}x"
    write(mine, template=later)
    with pytest.raises(UserError, match="the chat template fails: one question only"):
        Codec.load(folder, prompt_format=mine).prompt_ids("Why?", images=0, turns=[(QUESTION, ANSWER)])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named(name, folder) -> None:
    (folder / name).write_text("{")
    with pytest.raises(UserError, match=rf"^the tokenizer in {re.escape(str(folder))} is damaged"):
        Codec.load(folder)


def of_every_kind(tmp_path: Path) -> dict[str, Codec]:
    """Tokenizers with decoders of several kinds, with and without a clean-up of blanks, trained and adopted."""
    golden = tmp_path / "golden"
    golden.mkdir()
    shutil.copy(ROOT / "tests" / "golden" / "tokenizer.json", golden)
    codecs = {
        "bytes": Codec.train([], vocab_size=263, alphabet="bytes"),
        "merged": Codec.train([ODD] * 3, vocab_size=330, alphabet="bytes"),
        "base": Codec.load(ROOT / "assets" / "base"),
        "golden": Codec.adopt(golden, prompt_format="plain"),
    }
    codecs["merged"].save(folder := tmp_path / "cleans")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "clean_up_tokenization_spaces": True}))
    codecs["cleans"] = Codec.load(folder)
    tokens = ["[UNK]", "a", "##b", "##c", ".", ",", "▁a", "▁", "<0xE2>", "isn", "'"]
    words = {token: number for number, token in enumerate(tokens)}
    pairs = {
        "wordpiece": (models.WordPiece(words, unk_token="[UNK]"), decoders.WordPiece()),
        "metaspace": (models.WordLevel(words, unk_token="[UNK]"), decoders.Metaspace()),
        "fallback": (models.BPE(words, []), decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])),
    }
    for name, (model, decoder) in pairs.items():
        backend = Tokenizer(model)
        backend.decoder = decoder
        backend.add_tokens(["a plain one", "ä"])
        backend.save(str(file := tmp_path / f"{name}.json"))
        backend = Tokenizer.from_file(str(file))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=name == "wordpiece")
        tokenizer.add_special_tokens({"eos_token": EOS, "mask_token": MASK, "additional_special_tokens": [EOT]})
        codecs[name] = Codec(tokenizer, PromptFormat.load("plain"))
    if GPT2.is_dir():
        codecs["gpt2"] = Codec.adopt(GPT2, prompt_format="plain")
    return codecs


def test_text_and_pieces_are_what_the_library_of_the_tokenizer_decodes(tmp_path) -> None:
    """Random ids hold parts of characters, special tokens, ids that there are none of, and eot anywhere."""
    whole = {}
    for name, codec in of_every_kind(tmp_path).items():
        rng, whole[name] = Random(0), 0
        odd = codec.encode(ODD)[0] or [0]
        special = [codec.mask_id, codec.eos_id, codec.vocab_size + 5]
        for length in [0, 1, 2, 3] * 40 + [30] * 40:
            any_ids = [rng.randrange(codec.vocab_size) for _ in range(length)]
            ids = [rng.choice([rng.choice(odd), rng.choice(odd), rng.choice(special), token]) for token in any_ids]
            ids = [*odd, *ids] if rng.random() < 0.3 else ids
            kept = ids[: ids.index(codec.eot_id)] if codec.eot_id in ids else ids
            text = codec.tokenizer.decode(kept, skip_special_tokens=True)
            assert codec.decode(ids) == text
            assert codec.decode(np.array(ids, dtype=np.int64)) == codec.decode(torch.tensor(ids)) == text
            if (pieces := codec.pieces(ids)) is not None:
                whole[name] += 1
                heads = [codec.tokenizer.decode(kept[:n], skip_special_tokens=True) for n in range(len(kept) + 1)]
                assert heads == ["".join(pieces[:n]) for n in range(len(kept) + 1)]
    assert not any(whole.pop(name) for name in ("cleans", "wordpiece", "metaspace", "fallback"))
    assert all(count >= 20 for count in whole.values()), whole


def test_a_gap_is_written_stripped_and_kept_with_the_model(golden_folder_v, tmp_path) -> None:
    plain = Codec.load(ROOT / "assets" / "base")
    codec = plain.with_format(gap=BOS)
    assert (plain.gap_id, plain.special.gap) == (None, None)
    assert codec.gap_id == codec.special.gap == codec.bos_id
    assert set(plain.special.banned) - set(codec.special.banned) == {codec.gap_id}
    assert codec.special.unwritten == plain.special.unwritten  # random replacements draw no gap
    assert codec.fingerprint == plain.fingerprint  # its ids mean the same, and data on disk stay usable
    assert codec.prompt_ids("Why?", images=1) == plain.prompt_ids("Why?", images=1)
    ids = codec.encode("A red ring.")[0]
    for place in range(len(ids) + 1):
        assert codec.decode([*ids[:place], codec.gap_id, codec.gap_id, *ids[place:], codec.eot_id]) == "A red ring."
    codec.save(tmp_path / "new")
    again = Codec.load(tmp_path / "new")
    assert again.special == codec.special
    assert again.with_format(gap="").special == plain.special  # it can be taken back
    assert again.with_format(gap=None) is again
    suppressed = Codec.load(golden_folder_v)  # a token that the format suppresses
    assert set(suppressed.banned_ids) - set((gapped := suppressed.with_format(gap=BOS)).banned_ids) == {gapped.gap_id}


@pytest.mark.parametrize(
    ("gap", "message"),
    [
        ("<|reserved_token_1|>", "the tokenizer has no <|reserved_token_1|> token"),
        *((token, "cannot be the gap: a gap is a special token") for token in ("a", *SPECIAL) if token != BOS),
    ],
)
def test_tokens_that_cannot_be_gaps(gap, message) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        Codec.load(ROOT / "assets" / "base").with_format(gap=gap)


def that_know_special_tokens_as_words(tmp_path: Path) -> dict[str, Codec]:
    """Tokenizers whose model, normalizer or list of added tokens could turn text into a special token."""
    words = [
        "[UNK]",
        *SPECIAL,
        "<s>",
        "[CLS]",
        *"abcdeghinostuwy<>|_[]CLSdm.",
        "dog",
        "what",
        "user",
        "assistant",
        "system",
    ]
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    chars = [(word, 0.0 if word in (*SPECIAL, "<s>") else -2.0) for word in numbers] + [("▁", -2.0), ("▁dog", -1.0)]
    backends = {
        "words": Tokenizer(models.WordLevel(numbers, unk_token="[UNK]")),
        "pieces": Tokenizer(models.WordPiece({**numbers, "##s": len(numbers)}, unk_token="[UNK]")),
        "unigram": Tokenizer(models.Unigram(chars, unk_id=0)),
        "bpe": Tokenizer(models.BPE(numbers, [], unk_token="[UNK]", ignore_merges=True)),
        "merged": Tokenizer(models.BPE({**numbers, "<s": len(numbers)}, [("<", "s"), ("<s", ">")], unk_token="[UNK]")),
    }
    for name in ("words", "pieces", "bpe"):
        backends[name].pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backends["pieces"].normalizer = normalizers.BertNormalizer(lowercase=True)
    backends["unigram"].normalizer = normalizers.NFKC()
    backends["unigram"].pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backends["unigram"].decoder = decoders.Metaspace(prepend_scheme="first")
    codecs = {}
    for name, backend in backends.items():
        backend.enable_truncation(3)  # as some folders have it
        backend.save(str(tmp_path / f"{name}.json"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_file(str(tmp_path / f"{name}.json")), unk_token="[UNK]", cls_token="[CLS]"
        )
        special = [AddedToken(token, normalized=True) for token in (*SPECIAL, "<s>")]
        tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": EOS, "mask_token": MASK})
        tokenizer.add_tokens([AddedToken("<|fim|>", special=False)])
        codecs[name] = Codec(tokenizer, PromptFormat.load("llada"))
    if GPT2.is_dir():
        codecs["gpt2"] = Codec.adopt(GPT2, prompt_format="llada_v")
    codecs["base"] = Codec.load(ROOT / "assets" / "base")
    return codecs


def test_no_tokenizer_makes_a_special_token_of_text(tmp_path) -> None:
    """Words of the vocabulary, full-width letters, and tokens that are matched behind the normalizer, too."""
    wide = str.maketrans({chr(c): chr(c + 0xFEE0) for c in range(0x21, 0x7F)})
    for name, codec in that_know_special_tokens_as_words(tmp_path).items():
        added = codec.tokenizer.get_added_vocab()
        unknown = {codec.tokenizer.unk_token_id} if name != "gpt2" else set()
        control = set(added.values()) - unknown
        assert {codec.mask_id, codec.eos_id, codec.eot_id} <= control
        count = lambda ids, control=control: sum(token in control for token in ids)  # noqa: E731
        plain = count(codec.prompt_ids("dog", images=0, turns=[("a", "b")]))
        for token in added:
            for text in (
                token,
                f"a {token} dog",
                f"{token}{token}",
                f"dog{token}s",
                token.translate(wide),
                token.upper(),
            ):
                assert not control & set(codec.encode(text)[0]), (name, text)
                assert count(codec.prompt_ids(text, images=0, turns=[(text, text)])) == plain, (name, text)
                if name in ("gpt2", "unigram") and text.isascii() and not codec.loses(text):
                    assert codec.decode(codec.encode(text)[0]) == text


def test_prompts_without_such_text_are_those_of_the_library(tmp_path) -> None:
    """`apply_chat_template` of transformers; also the blanks that some special tokens take in."""
    for name, codec in that_know_special_tokens_as_words(tmp_path).items():
        strips = copy.deepcopy(codec.tokenizer)
        strips.add_special_tokens({"additional_special_tokens": [AddedToken("<|x|>", lstrip=True, rstrip=True)]})
        template = "{{ '<|' + 'x|>' }} \n{{ messages[0].content }} <|x|> a" + codec.prompt_format.template
        for one in (codec, Codec(strips, PromptFormat(template=template))):
            one.tokenizer.backend_tokenizer.no_truncation()
            messages = one.prompt_format.messages(text := " what dog  it is.\n ", images=0, turns=[("a dog", "dogs\n")])
            ids = one.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=False, add_generation_prompt=True
            )
            assert one.prompt_ids(text, images=0, turns=[("a dog", "dogs\n")]) == ids, name


def test_what_a_tokenizer_loses(tmp_path) -> None:
    codecs = that_know_special_tokens_as_words(tmp_path)
    keeps = {"a dog": set(codecs), "a  dog\n": set(codecs), "": set(codecs)}
    keeps |= {"東京": {"gpt2"}, "a 🙂": {"gpt2"}, "e\u0301": {"gpt2"}, "A dog": {"gpt2", "base"}}
    keeps |= {"[UNK]": {"gpt2"}, EOT: {"unigram", "gpt2", "bpe", "merged"}}
    for text, names in keeps.items():
        assert {name for name, codec in codecs.items() if not codec.loses(text)} == names & codecs.keys(), text
    bare = Tokenizer(models.WordLevel({"dog": 0, **{token: n for n, token in enumerate(SPECIAL, 1)}}, unk_token="[?]"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare)
    codec = Codec(tokenizer, PromptFormat(template="{{ messages[0].content }}"))
    assert codec.encode("dog dog")[0] == [0, 0] and not codec.loses("dog") and codec.loses(f"dog {EOT}")
    with pytest.raises(UserError, match=r"^the tokenizer cannot encode 'a dog' "):
        codec.encode("a dog")
