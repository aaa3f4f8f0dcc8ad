"""Text to tokens and back: a Hugging Face fast tokenizer with the special tokens and chat template of LLaDA.

codec = Codec.load("assets/base")
codec.prompt_ids("Describe the image.")     ids of the whole prompt, with one `image_id` where the image goes
codec.encode("A red ring.")                 ids and character offsets of a response, without eot
codec.decode(ids)                           text up to the first eot, special tokens removed
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from src.batch import SpecialIds

MASK, EOS, BOS, EOT = "<|mdm_mask|>", "<|endoftext|>", "<|startoftext|>", "<|eot_id|>"
HEADER_START, HEADER_END, IMAGE = "<|start_header_id|>", "<|end_header_id|>", "<image>"
SPECIAL = (MASK, EOS, BOS, EOT, HEADER_START, HEADER_END, IMAGE)
NO_IMAGE_TOKEN = -200  # the image mark of tokenizers without an image token, as in LLaDA-V
TINY_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>{{ m['content'] }}"
    "<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>"
)


class Codec:
    """A tokenizer with the ids that a diffusion model needs.

    Raises ValueError when the tokenizer lacks the mask, end-of-text or eot token, or a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        missing = [t for t in (MASK, EOS, EOT) if t not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)} token")
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template")
        self.mask_id, self.eos_id, self.eot_id = (vocabulary[t] for t in (MASK, EOS, EOT))
        self.image_id = vocabulary.get(IMAGE, NO_IMAGE_TOKEN)
        self.vocab_size = len(tokenizer)
        # A special token spelt out in a caption is plain text. Twenty times faster than calling `tokenizer`.
        self._plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True

    @classmethod
    def load(cls, path: str | Path) -> Codec:
        """Read `tokenizer.json` and its config from a local directory."""
        if not (Path(path) / "tokenizer.json").is_file():
            raise ValueError(f"no tokenizer in {path}: expected {Path(path) / 'tokenizer.json'}")
        return cls(PreTrainedTokenizerFast.from_pretrained(path))

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, alphabet: str = "seen") -> Codec:
        """A byte-level BPE tokenizer. `alphabet`: `seen` (characters of the texts) or `bytes` (any text at all)."""
        if alphabet not in ("seen", "bytes"):
            raise ValueError(f"alphabet must be 'seen' or 'bytes', got {alphabet!r}")
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        initial = pre_tokenizers.ByteLevel.alphabet() if alphabet == "bytes" else []
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=initial, show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=EOS, mask_token=MASK,
            additional_special_tokens=[EOT, HEADER_START, HEADER_END, IMAGE], clean_up_tokenization_spaces=False,
        )  # fmt: skip
        tokenizer.chat_template = TINY_TEMPLATE
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer files into a directory."""
        self.tokenizer.save_pretrained(path)

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary, merges and template: token ids on disk belong to one tokenizer."""
        state = self.tokenizer.backend_tokenizer.to_str() + str(self.tokenizer.chat_template)
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    @property
    def banned_ids(self) -> list[int]:
        """Special ids that a response never contains: everything special but eot and end of text."""
        keep = {self.eot_id, self.eos_id}
        return sorted(i for i in self.tokenizer.all_special_ids if i not in keep)

    @property
    def special(self) -> SpecialIds:
        """The ids as the maths takes them."""
        return SpecialIds(self.mask_id, self.eos_id, self.eot_id, tuple(self.banned_ids), self.vocab_size)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a response text, and the character range of each token."""
        found = self._plain.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response up to its first eot, without special tokens."""
        ids = list(ids)
        if self.eot_id in ids:
            ids = ids[: ids.index(self.eot_id)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def prompt_ids(self, question: str, *, image: bool = True) -> list[int]:
        """Ids of a one-turn prompt up to where the response starts; `image_id` stands where the image goes."""
        content = f"{IMAGE}{question}" if image else question
        text = str(self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
        head, mark, tail = text.partition(IMAGE)
        encode = lambda part: self.tokenizer(part, add_special_tokens=False)["input_ids"]  # noqa: E731
        return encode(head) + [self.image_id] * bool(mark) + (encode(tail) if mark else [])
