"""Profiles: the request parameters that a model behind an OpenAI-compatible server accepts.

    expert: {profile: vllm}                                          one of PROFILES
    expert: {profile: {target: src.chat.profiles.Profile, limit: max_tokens, temperature: true}}

`auto` chooses by the model's name: reasoning models take no temperature. A server that supports less than its profile
claims rejects the request, and its message names the parameter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.io.errors import UserError

OUTPUTS = ("json_schema", "text")
THOUGHT_TOKENS = 1000  # hidden tokens before the reply of a reasoning model, for estimates
_REASONING = re.compile(r"(^|/)(o\d|gpt-5)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a model accepts in a request.

    limit: the parameter that bounds the tokens of a reply, `max_completion_tokens` or `max_tokens`
    output: `json_schema`, or `text` (only the prompt asks for JSON)
    temperature, effort, seed: whether the model accepts them (temperature: `top_p` as well; effort: `reasoning_effort`)
    thinks: whether it generates hidden reasoning tokens, which are billed; a dry run adds them to its estimate
    """

    limit: str = "max_tokens"
    output: str = "text"
    temperature: bool = True
    effort: bool = False
    seed: bool = False
    thinks: bool = False

    def __post_init__(self) -> None:
        if self.limit not in ("max_completion_tokens", "max_tokens"):  # a server may ignore any other one
            raise UserError(f"limit must be 'max_completion_tokens' or 'max_tokens', got {self.limit!r}")
        if self.output not in OUTPUTS:
            raise UserError(f"output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")

    def accepts(self, name: str) -> bool:
        return getattr(self, "temperature" if name == "top_p" else name)

    def parameters(
        self, *, limit: int, sampling: Mapping[str, Any], name: str, schema: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The fields of a request besides model and messages.

        sampling: temperature, top_p, effort, seed; None is left out
        name, schema: of the JSON object that the reply must be; schema=None: of any form

        Raises UserError for a parameter that the model does not accept.
        """
        fields = {name: value for name, value in sampling.items() if value is not None}
        if unsupported := [name for name in fields if not self.accepts(name)]:
            raise UserError(f"the profile of this model does not accept {', '.join(unsupported)}; set it to null")
        if "effort" in fields:
            fields["reasoning_effort"] = fields.pop("effort")
        if self.output == "json_schema" and schema:
            json_schema = {"name": name, "strict": True, "schema": schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        return {self.limit: limit, **fields}


PROFILES = {
    "chat": Profile(limit="max_completion_tokens", output="json_schema", seed=True),
    "reasoning": Profile(
        limit="max_completion_tokens", output="json_schema", temperature=False, effort=True, seed=True, thinks=True
    ),
    "vllm": Profile(output="json_schema", seed=True),  # and SGLang
    "plain": Profile(),  # `transformers serve`, and any other server
}


def choose(profile: str | Profile, model: str) -> Profile:
    """The profile with this name; `auto` chooses by the name of the model."""
    if isinstance(profile, Profile):
        return profile
    if profile == "auto":
        profile = "reasoning" if _REASONING.search(model) else "chat"
    if profile not in PROFILES:
        raise UserError(f"profile must be auto or one of {', '.join(PROFILES)}, got {profile!r}")
    return PROFILES[profile]
