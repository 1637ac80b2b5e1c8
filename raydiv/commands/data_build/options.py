"""The options of ``raydiv data build``, checked, and the command that repeats a build."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any, Literal, get_args

from raydiv.commands.data_build.prompts import AnsweredPrompt
from raydiv.config.source import Source
from raydiv.utils.cache import digest
from raydiv.utils.errors import UserError

Kind = Literal["compliance-refusal", "preference"]

CLASSES = {True: "harmful", False: "harmless"}
"""The classes of prompts, by ``harmful``."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The options of ``build_data``, documented there. Raises UserError for one that is unknown or does not apply."""

    harmful: Source
    harmless: Source
    kind: Kind
    refusals: str
    worse: str | None
    prompts: int | None
    recovery: int | None
    seed: int
    template: str | None
    max_new_tokens: int | None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"kind: unknown {self.kind!r} (known: {', '.join(get_args(Kind))})")
        if self.kind == "compliance-refusal" and self.worse is not None:
            raise UserError(
                "worse: does not apply to compliance-refusal, where harmless prompts are refused; leave it out"
            )
        if self.worse not in (None, "own", *self.models):
            raise UserError(f"worse: unknown {self.worse!r} (known: own, model:ID)")
        for key in ("prompts", "recovery", "max_new_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}: must be at least 1, found {value}")
        for key in ("template", "max_new_tokens"):
            if getattr(self, key) is not None and not self.models:
                raise UserError(f"{key}: applies to models alone, and none answers (refusals or worse: model:ID)")
        for source in self.sources.values():
            if source.weight != 1:
                raise UserError(f"{source.path}: weight does not apply: every prompt is used once")

    @property
    def sources(self) -> dict[bool, Source]:
        """The sources by the label of their prompts (``harmful``)."""
        return {True: self.harmful, False: self.harmless}

    @property
    def models(self) -> list[str]:
        """The models that answer, each once."""
        return list(dict.fromkeys(name for name in (self.refusals, self.worse) if name and name.startswith("model:")))

    @property
    def bank(self) -> Source | None:
        """Refusals for prompts that get none from their source or a model; None for the constant refusal."""
        if self.refusals == "constant":
            return None
        bundled = self.refusals in ("bank", "own", *self.models)
        return Source(path="bundled:refusals" if bundled else self.refusals)

    def refuses(self, prompt: AnsweredPrompt) -> bool:
        """Whether a prompt gets a refusal, as its aligned or as its unaligned response."""
        return prompt.harmful or self.kind == "compliance-refusal"

    def draw(self, purpose: str, prompt: AnsweredPrompt) -> int:
        """A number in [0, 2^128), a function of purpose, seed and prompt.

        Choice and order need different purposes: with one number for both, the class with more prompts would come
        first.
        """
        return int(digest(purpose, self.seed, prompt.key), 16)

    def command(self) -> str:
        """The command that repeats the build, in the folder OUTPUT."""
        options = {
            "harmful": as_option(self.harmful),
            "harmless": as_option(self.harmless),
            "kind": self.kind,
            "refusals": self.refusals,
            "worse": self.worse,
            "prompts": self.prompts,
            "recovery": self.recovery,
            "seed": self.seed,
            "template": self.template,
            "max-new-tokens": self.max_new_tokens,
            "output": "OUTPUT",
        }
        words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
        return shlex.join(["raydiv", "data", "build", *words])


def as_option(source: Source) -> str:
    """A source as an option that ``parse_source`` reads."""
    section: Any = source.model_dump()
    return section if isinstance(section, str) else json.dumps(section)
