"""What a model behind an OpenAI-compatible server accepts in a request.

    expert: {profile: vllm}                                          one of PROFILES
    expert: {profile: {target: src.chat.profiles.Profile, limit: max_tokens, temperature: true}}

`auto` chooses by the name of the model: models that think before they answer take no temperature. A server that
knows less than its profile says refuses the request, and its message names the parameter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.io.errors import UserError

OUTPUTS = ("json_schema", "json_object", "text")
_THINKS = re.compile(r"(^|/)(o\d|gpt-5)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """limit: the parameter that bounds the length of a reply, `max_completion_tokens` or `max_tokens`.

    output: `json_schema`, `json_object` or `text` (the form is asked for in words only)
    temperature, effort, seed: whether the model accepts them (effort: `reasoning_effort`)
    thinks: it writes hidden tokens first; they are paid for, and a dry run expects more of them
    """

    limit: str = "max_tokens"
    output: str = "text"
    temperature: bool = True
    effort: bool = False
    seed: bool = False
    thinks: bool = False

    def __post_init__(self) -> None:
        if self.limit not in ("max_completion_tokens", "max_tokens"):
            raise UserError(f"limit must be 'max_completion_tokens' or 'max_tokens', got {self.limit!r}")
        if self.output not in OUTPUTS:
            raise UserError(f"output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")

    def parameters(self, *, limit: int, given: Mapping[str, Any], name: str, schema: dict[str, Any]) -> dict[str, Any]:
        """The part of a request besides model and messages. given: temperature, effort, seed; None is left out.

        name, schema: of the JSON object that the reply has to be

        Raises UserError for a value that the model does not accept.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        if refused := [name for name in chosen if not getattr(self, name)]:
            raise UserError(f"the profile of this model does not accept {', '.join(refused)}; set it to null")
        if "effort" in chosen:
            chosen["reasoning_effort"] = chosen.pop("effort")
        if self.output == "json_schema":
            strict = {"name": name, "strict": True, "schema": schema}
            chosen["response_format"] = {"type": "json_schema", "json_schema": strict}
        elif self.output == "json_object":
            chosen["response_format"] = {"type": "json_object"}
        return {self.limit: limit, **chosen}


PROFILES = {
    "chat": Profile(limit="max_completion_tokens", output="json_schema", seed=True),
    "reasoning": Profile(
        limit="max_completion_tokens", output="json_schema", temperature=False, effort=True, seed=True, thinks=True
    ),
    "vllm": Profile(output="json_schema", seed=True),  # and SGLang
    "plain": Profile(),  # any other server; `transformers serve`
}


def choose(profile: str | Profile, model: str) -> Profile:
    """The profile of a name; `auto` looks at the name of the model."""
    if isinstance(profile, Profile):
        return profile
    if profile == "auto":
        return PROFILES["reasoning" if _THINKS.search(model) else "chat"]
    if not isinstance(profile, str) or profile not in PROFILES:
        raise UserError(f"profile must be auto or one of {', '.join(PROFILES)}, got {profile!r}")
    return PROFILES[profile]
