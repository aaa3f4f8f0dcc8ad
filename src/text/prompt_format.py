"""Prompt formats: chat template, system text, and how images and text are joined. One yaml file each.

PromptFormat.load("llada_v")                 a file in src/text/prompts
PromptFormat.load("formats/mine.yaml")       your own file; its keys are the fields of `PromptFormat`
format.messages("What is this?", images=1)   [{"role": ..., "content": ...}, ...], the input of the template
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from src.io.errors import UserError

IMAGE = "<image>"  # the image mark: where an image goes in a text
JOINS = ("keep", "upstream")
FOLDER = Path(__file__).parent / "prompts"


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How a question, its images and earlier turns become a prompt.

    template: jinja text over `messages`, each with `role` and `content`; it ends where the response starts
    system:   system text, the first message; null: none
    image:    inserted before a question without image marks, once per image
    join:     keep, or upstream: LLaDA-V's released inference, which trims the messages and drops the first token behind
        each image, as it expects the tokenizer to start every text with a special token
    suppress: tokens that a sampler never writes, besides mask and image mark; null: all special tokens but end
        of turn and end of text
    gap:      a special token without meaning: a sampler may write it and decoding strips it, so that a text can lose
        or gain tokens without moving the others (src/text/align.py); null: none
    """

    template: str
    system: str | None = None
    image: str = IMAGE
    join: str = "keep"
    suppress: Sequence[str] | None = None
    gap: str | None = None

    def __post_init__(self) -> None:
        for name, types in {"template": str, "system": str | None, "image": str, "gap": str | None}.items():
            if not isinstance(getattr(self, name), types):
                raise UserError(f"{name} must be a text, got {getattr(self, name)!r}")
        if self.image.count(IMAGE) != 1:
            raise UserError(f"image must contain {IMAGE} once, got {self.image!r}")
        if self.join not in JOINS:
            raise UserError(f"join must be one of {', '.join(JOINS)}, got {self.join!r}")
        if self.suppress is not None:
            if not isinstance(self.suppress, list | tuple) or {*map(type, self.suppress)} - {str}:
                raise UserError(f"suppress must be a list of tokens, got {self.suppress!r}")
            object.__setattr__(self, "suppress", tuple(self.suppress))
        object.__setattr__(self, "gap", self.gap or None)

    @classmethod
    def load(cls, name: str | Path) -> PromptFormat:
        """A format by name, or by the path of a .yaml file. Raises UserError for an unknown or invalid one."""
        path = Path(name) if str(name).endswith(".yaml") else FOLDER / f"{name}.yaml"
        if not path.is_file():
            names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
            raise UserError(f"no prompt format {str(name)!r}: use {', '.join(names)}, or the path of a .yaml file")
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError, yaml.YAMLError) as error:  # TypeError: an unknown or missing key
            reason = " ".join(str(error).split())
            keys = ", ".join(field.name for field in fields(cls))
            raise UserError(f"{path} is no prompt format, whose keys are {keys}: {reason}") from error

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True, width=1000), encoding="utf-8")

    def messages(self, question: str, *, images: int, turns: Sequence[tuple[str, str]] = ()) -> list[dict[str, str]]:
        """Messages up to the question, behind earlier (question, answer) pairs.

        Image marks are inserted before the first question, unless one of the texts contains some.
        """
        messages = [message for user, answer in turns for message in (("user", user), ("assistant", answer))]
        messages.append(("user", question))
        if not any(IMAGE in text for _, text in messages):
            messages[0] = ("user", self.image * images + messages[0][1])
        if self.system:
            messages.insert(0, ("system", self.system))
        trim = str.strip if self.join == "upstream" else str
        return [{"role": role, "content": trim(text)} for role, text in messages]
