"""Text to tokens and back: a Hugging Face fast tokenizer with LLaDA's special tokens, and the prompt format.

codec = Codec.load("assets/base")
codec.prompt_ids("Describe the image.")     ids of the whole prompt, with one `image_id` per image
codec.encode("A red ring.")                 ids and character offsets of a response, without eot
codec.decode(ids)                           text up to the first eot, special tokens removed

The prompt format (src/text/prompts) of a model folder comes from prompt.yaml, else from the model type in config.json,
else from the chat template of its tokenizer.

A special token that a text spells out is plain text, whoever wrote it: only the chat template adds special tokens. To
that end the backend has other names for them, private characters, which never occur in a text:

    text ------------------------------------------------> backend -> ids without special tokens
    texts, disguised -> chat template -> its special tokens renamed, texts as they were -> backend -> ids of the prompt
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path

from jinja2 import TemplateError
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from src.io.errors import UserError
from src.io.files import read_json
from src.io.hub import local_folder
from src.text.prompt_format import IMAGE, PromptFormat
from src.types import SpecialIds

MASK, EOS, BOS, EOT = "<|mdm_mask|>", "<|endoftext|>", "<|startoftext|>", "<|eot_id|>"
HEADER_START, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
SPECIAL = (MASK, EOS, BOS, EOT, HEADER_START, HEADER_END, IMAGE)
BROKEN = "\ufffd"  # the decoding of bytes that are not a complete character
NAMES, DISGUISES = 0x108000, 0x10F000  # private characters: special tokens, and what stands for their first characters
_PRIVATE = re.compile("[\U00108000-\U0010ffff]")
LONGEST = 1000  # characters of the longest word in the training of a tokenizer
_LONG = re.compile(rf"\S{{{LONGEST + 1}}}|\s{{{LONGEST + 1}}}")
_CUT = re.compile(rf"\s{{0,{LONGEST}}}\S{{1,{LONGEST}}}|\s{{1,{LONGEST}}}")
NO_IMAGE_TOKEN = -200  # image mark of tokenizers without an image token, as in LLaDA-V
ROLES = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "mask_token": MASK}
OTHERS = [EOT, HEADER_START, HEADER_END, IMAGE]  # special tokens without a role in transformers
PROMPT = "prompt.yaml"
FILES = ("*token*.json", "vocab.json", "merges.txt", "chat_template.*", "generation_config.json")  # tokenizer files
NEEDED = (*FILES, PROMPT, "config.json")  # patterns of all files that `Codec.load` reads


class Codec:
    """A tokenizer with the special ids that a diffusion model needs, and a prompt format.

    prompt_format: default, the tokenizer's chat template
    files: name -> content of the files that the tokenizer was read from; `save` writes them unchanged, as other
        versions of transformers may not read what this one writes

    Raises UserError if there is no chat template, if the tokenizer lacks the mask, end-of-text or eot token or one
    that the format suppresses, or if the format's gap is not a special token without another meaning.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt_format: PromptFormat | None = None,
        *,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.tokenizer, self.files = tokenizer, dict(files or {})
        self.prompt_format = prompt_format or _own_format(tokenizer)
        tokenizer.chat_template = self.prompt_format.template  # for readers of a saved folder
        vocabulary, suppress, gap = tokenizer.get_vocab(), self.prompt_format.suppress, self.prompt_format.gap
        # 1. Special tokens and their ids
        needed = [MASK, EOS, EOT, *(suppress or ()), *([gap] if gap else [])]
        if missing := [token for token in needed if token not in vocabulary]:
            raise UserError(f"the tokenizer has no {', '.join(missing)} token")
        self.mask_id, self.eos_id, self.eot_id = (vocabulary[t] for t in (MASK, EOS, EOT))
        self.bos_id, self.image_id = vocabulary.get(BOS), vocabulary.get(IMAGE, NO_IMAGE_TOKEN)
        self.vocab_size = len(tokenizer)
        roles = {*SPECIAL, *tokenizer.all_special_tokens}
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        looks = [token for token in tokenizer.get_added_vocab() if token.startswith("<|") and token.endswith("|>")]
        self.controls = tuple(sorted(vocabulary.keys() & {*added, *looks, *roles}, key=vocabulary.__getitem__))
        if gap and (gap not in self.controls or gap in set(SPECIAL) - {BOS}):
            raise UserError(f"{gap} cannot be the gap: a gap is a special token, and one without another meaning")
        self.gap_id = vocabulary[gap] if gap else None
        # 2. Special ids that a response never contains. An explicit `suppress` list is used as it is, even without the
        #    mask: a sampler never writes the mask, but then it keeps its share of the softmax, as in the released one
        if suppress is None:
            banned = set(tokenizer.all_special_ids) - {self.eot_id, self.eos_id}
        else:
            banned = {vocabulary[token] for token in (*suppress, IMAGE) if token in vocabulary}
        self.banned_ids = sorted(banned - {self.gap_id})
        # 3. The backend, twenty times faster than calling `tokenizer`, whose special tokens no text can spell
        self._names = {token: chr(NAMES + number) for number, token in enumerate(self.controls)}
        self._plain = _renamed(tokenizer.backend_tokenizer, self._names)
        spelled = sorted(self.controls, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spelled)))
        firsts = sorted({ord(token[0]) for token in (*spelled, IMAGE)})
        self._disguise = {first: DISGUISES + number for number, first in enumerate(firsts)}
        self._reveal = {disguise: first for first, disguise in self._disguise.items()}
        # Half the time of `tokenizer.decode`, which else removes blanks before punctuation.
        self._direct = not tokenizer.clean_up_tokenization_spaces
        self._concatenates = self._direct and isinstance(self._plain.decoder, decoders.ByteLevel)
        self._texts: dict[int, str] = {}  # cache: text of each token
        self._last: tuple[str, Encoding] | None = None  # cache: a text is checked, measured and used one after another

    @classmethod
    def load(cls, path: str | Path, *, prompt_format: str | Path | None = None) -> Codec:
        """Read a tokenizer from a model folder or a name on the hub.

        prompt_format: a name or file for `PromptFormat.load`, in place of the folder's own
        Raises UserError as the constructor does, for damaged files, and for a chat template that cannot be rendered.
        """
        path = local_folder(path, patterns=NEEDED)
        if not (path / "tokenizer.json").is_file():
            raise UserError(f"no tokenizer in {path}: expected {path / 'tokenizer.json'}")
        tokenizer = _read(path)
        files = {file.name: file.read_bytes() for pattern in FILES for file in path.glob(pattern)}
        try:
            form = PromptFormat.load(prompt_format) if prompt_format else _format_of(path, tokenizer)
            codec = cls(tokenizer, form, files=files)
            codec.prompt_ids("Why?", images=0)  # a template that cannot be rendered shows now
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return codec

    def with_format(self, *, system: str | None = None, join: str | None = None, gap: str | None = None) -> Codec:
        """The same tokenizer with another system text, `join` or gap ("": none); None keeps the present value."""
        settings = {"system": system, "join": join, "gap": gap}
        changes = {name: value for name, value in settings.items() if value is not None}
        return Codec(self.tokenizer, replace(self.prompt_format, **changes), files=self.files) if changes else self

    @classmethod
    def adopt(cls, path: str | Path, *, prompt_format: str | Path | None = None) -> Codec:
        """As `load`, but also for the tokenizer of another model: missing special tokens are appended.

        The folder may instead contain a byte-level BPE as vocab.json and merges.txt, as GPT-2's does.
        """
        path = local_folder(path, patterns=NEEDED)
        bpe_files = [path / name for name in ("vocab.json", "merges.txt")]
        if (path / "tokenizer.json").is_file():
            tokenizer = _read(path)
            if {MASK, EOS, EOT} <= tokenizer.get_vocab().keys():
                return cls.load(path, prompt_format=prompt_format)
        elif all(file.is_file() for file in bpe_files):
            bpe = _byte_level(models.BPE.from_file(*map(str, bpe_files)))
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
        else:
            raise UserError(f"no tokenizer in {path}: expected tokenizer.json, or vocab.json and merges.txt")
        tokenizer.add_special_tokens({**ROLES, "additional_special_tokens": OTHERS})
        if prompt_format is None and not tokenizer.chat_template:
            raise UserError(f"{path} has no chat template: set prompt_format, for example to tiny or plain")
        return cls(tokenizer, None if prompt_format is None else PromptFormat.load(prompt_format))

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int, alphabet: str = "seen", prompt_format: str | Path = "tiny"
    ) -> Codec:
        """Train a byte-level BPE tokenizer. `alphabet`: `seen` (the bytes of the texts) or `bytes` (all bytes)."""
        if alphabet not in ("seen", "bytes"):
            raise UserError(f"alphabet must be 'seen' or 'bytes', got {alphabet!r}")
        bpe = _byte_level(models.BPE())
        initial = pre_tokenizers.ByteLevel.alphabet() if alphabet == "bytes" else []
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=initial, show_progress=False
        )
        bpe.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
        options = {**ROLES, "additional_special_tokens": OTHERS, "clean_up_tokenization_spaces": False}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **options)
        return cls(tokenizer, PromptFormat.load(prompt_format))

    def save(self, path: str | Path) -> None:
        """Write the tokenizer files (if it was loaded, those files byte for byte) and the prompt format to a folder."""
        Path(path).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(path) / name).write_bytes(content)
        if not self.files:
            self.tokenizer.save_pretrained(path)
        self.prompt_format.save(Path(path) / PROMPT)

    @property
    def fingerprint(self) -> str:
        """Hash of vocabulary, merges and template; stored with token ids, which are valid for one tokenizer only."""
        state = self.tokenizer.backend_tokenizer.to_str() + self.prompt_format.template
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    @property
    def special(self) -> SpecialIds:
        """The special ids for objectives and samplers."""
        vocabulary = self.tokenizer.get_vocab()
        return SpecialIds(
            mask=self.mask_id,
            eos=self.eos_id,
            eot=self.eot_id,
            banned=tuple(self.banned_ids),
            vocab_size=self.vocab_size,
            gap=self.gap_id,
            unwritten=tuple(vocabulary[token] for token in self.controls),
        )

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, none of them special, and the character range of each token.

        Raises UserError if the tokenizer lacks a character and has no unknown token.
        """
        return self._encode(_PRIVATE.sub(BROKEN, text))

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if (last := self._last) is None or last[0] != text:
            try:
                last = text, self._plain.encode(text, add_special_tokens=False)
            except Exception as error:  # tokenizers raises nothing narrower
                raise UserError(f"the tokenizer cannot encode {text[:60]!r} ({error})") from error
            self._last = last
        return last[1].ids, last[1].offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response up to its first eot, without special tokens."""
        ids = list(takewhile(lambda token: token != self.eot_id, ids))
        if self._direct:
            return self._plain.decode(ids, skip_special_tokens=True)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def loses(self, text: str) -> bool:
        """Whether the tokenizer cannot give a text back: it drops characters, changes them or maps them to the unknown
        token. Whitespace and Unicode form (NFC) may change."""
        try:
            decoded = self.decode(self.encode(text)[0])
        except UserError:
            return True
        compact = lambda string: "".join(unicodedata.normalize("NFC", string).split())  # noqa: E731
        return compact(decoded) != compact(text)

    def pieces(self, ids: Sequence[int]) -> list[str] | None:
        """The text of each token up to the first eot, or None if these do not concatenate to the decoded text.

        None where several tokens share a character or one is broken, and for decoders other than byte-level BPE's, as
        only that concatenates bytes: every prefix of the list is then the decoded text of its tokens.
        """
        if not self._concatenates:
            return None
        texts = []
        for token in takewhile(lambda token: token != self.eot_id, ids):
            if token not in self._texts:
                self._texts[token] = self._plain.decode([token], skip_special_tokens=True)
            texts.append(self._texts[token])
        joined = "".join(texts)
        return texts if BROKEN not in joined and joined == self.decode(ids) else None

    def prompt_ids(
        self, question: str, *, images: int = 1, turns: Sequence[tuple[str, str]] = (), system: str | None = None
    ) -> list[int]:
        """Ids of a prompt up to the start of the response, with `image_id` in place of each image.

        images: their number. If the texts contain `<image>` exactly as often, that is where the images go; any other
            `<image>` is plain text, and the images go before the first question
        turns: earlier (question, answer) pairs; system: in place of the format's text; None keeps it
        Raises UserError if the chat template fails, or does not give each image its place.
        """
        # 1. What users write is disguised, so that it spells no special token
        form, num_marks = self.prompt_format, sum(text.count(IMAGE) for text in (question, *chain(*turns)))

        def disguise(text: str) -> str:
            return _PRIVATE.sub(BROKEN, text).translate(self._disguise)

        def content(text: str) -> str:
            return IMAGE.join(map(disguise, text.split(IMAGE))) if num_marks == images else disguise(text)

        system = disguise((form.system or "") if system is None else system)
        turns = [(content(user), content(answer)) for user, answer in turns]
        messages = replace(form, system=system).messages(content(question), images=images, turns=turns)
        # 2. The released templates always open the answer, those of other models only with add_generation_prompt
        try:
            prompt = self.tokenizer.apply_chat_template(
                messages, chat_template=form.template, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError) as error:
            raise UserError(f"the chat template fails: {' '.join(str(error).split())}") from error
        first, *others = str(prompt).split(IMAGE)
        if len(others) != images:
            raise UserError(f"the chat template makes {len(others)} image marks of {images}")

        # 3. The special tokens that are left are the template's. Each text between images is encoded by itself
        def encode(text: str) -> list[int]:
            named = self._spelled.sub(lambda token: self._names[token[0]], text)
            return self._encode(named.translate(self._reveal))[0]

        ids = encode(first)
        num_dropped = int(form.join == "upstream" and ids[:1] == [self.bos_id])
        for text in others:
            ids += [self.image_id, *encode(text)[num_dropped:]]
        return ids


def _pieces(text: str) -> list[str]:
    """The text, with very long words and blanks cut: the training time is quadratic in their length."""
    return _CUT.findall(text) if _LONG.search(text) else [text]


def _renamed(backend: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """A tokenizer whose special tokens, those with a new name, are not found under the old one: neither as such nor as
    words of its vocabulary. Their ids stay. It neither cuts, pads nor frames a text."""
    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = state["post_processor"] = None
    for token in state["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "special": True, "normalized": False}
    model = state["model"]
    if isinstance(vocabulary := model["vocab"], dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    else:  # a unigram model
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if unknown := model.get("unk_token"):
        model["unk_token"] = names.get(unknown, unknown)
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if names.keys().isdisjoint((*pair, "".join(pair)))]
    renamed = Tokenizer.from_str(json.dumps(state))
    known = {token["content"] for token in state["added_tokens"]}
    renamed.add_special_tokens([name for name in names.values() if name not in known])  # words of the vocabulary so far
    return renamed


def _byte_level(model: models.BPE) -> Tokenizer:
    bpe = Tokenizer(model)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def image_mark(path: Path) -> int:
    """The image mark in the prompts of a released model: the id of its image token, else `NO_IMAGE_TOKEN`."""
    vocabulary = _read(path).get_vocab() if (path / "tokenizer.json").is_file() else {}
    return vocabulary.get(IMAGE, NO_IMAGE_TOKEN)


def _read(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder. Without tokenizer_config.json, tokenizer.json says which tokens are special."""
    try:
        if (path / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(path)
        backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"the tokenizer in {path} is damaged ({type(error).__name__}: {error})") from error
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    roles = {role: token for role, token in ROLES.items() if token in special}
    others = [token for token in special if token not in roles.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **roles, additional_special_tokens=others, name_or_path=str(path),
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _format_of(path: Path, tokenizer: PreTrainedTokenizerFast) -> PromptFormat:
    """The prompt format in a folder, or that of its model type, or that of its chat template."""
    if (path / PROMPT).is_file():
        return PromptFormat.load(path / PROMPT)
    model_type = read_json(path / "config.json").get("model_type") if (path / "config.json").is_file() else None
    if model_type == "llava_llada":  # its tokenizer has the text model's template, without the system text
        return PromptFormat.load("llada_v")
    if model_type == "llada":
        llada = PromptFormat.load("llada")
        return replace(llada, template=tokenizer.chat_template or llada.template)
    return _own_format(tokenizer)


def _own_format(tokenizer: PreTrainedTokenizerFast) -> PromptFormat:
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer has no chat template, and there is no {PROMPT} beside it")
    return PromptFormat(template=tokenizer.chat_template)  # type: ignore[arg-type]
