"""What is to be built, out of what: the options of ``raydiv data build``, checked, and the command that says them again."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any, Literal, get_args

from raydiv.commands.data_build.answered import AnsweredPrompt
from raydiv.config.source import Source
from raydiv.utils.cache import digest
from raydiv.utils.errors import UserError

Kind = Literal["compliance-refusal", "preference"]

CLASSES = {True: "harmful", False: "harmless"}
"""The classes of prompts, by whether they are harmful."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The options of ``build_data``, which says what they mean.

    Raises UserError for one that is unknown or would be skipped.
    """

    harmful: Source
    harmless: Source
    kind: Kind
    refusals: str
    worse: str | None
    prompts: int | None
    seed: int
    template: str | None
    max_new_tokens: int | None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"kind: no {self.kind!r} (known: {', '.join(get_args(Kind))})")
        if self.kind == "compliance-refusal" and self.worse is not None:
            raise UserError(
                "worse: means nothing for compliance-refusal, where harmless prompts are refused; leave it out"
            )
        if self.worse not in (None, "own", *self.models):
            raise UserError(f"worse: no {self.worse!r} (known: own, model:ID)")
        for key in ("prompts", "max_new_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}: must be at least 1, found {value}")
        for key in ("template", "max_new_tokens"):
            if getattr(self, key) is not None and not self.models:
                raise UserError(f"{key}: means nothing where no model is asked (refusals or worse: model:ID)")
        for source in self.sources.values():
            if source.weight != 1:
                raise UserError(f"{source.path}: weight means nothing here: every prompt is used once")

    @property
    def sources(self) -> dict[bool, Source]:
        """The sources by whether their prompts are harmful."""
        return {True: self.harmful, False: self.harmless}

    @property
    def models(self) -> list[str]:
        """The models that are asked, each once."""
        return list(dict.fromkeys(way for way in (self.refusals, self.worse) if way and way.startswith("model:")))

    @property
    def bank(self) -> Source | None:
        """Refusals for where neither the harmful source nor a model gives any; None for the constant one."""
        if self.refusals == "constant":
            return None
        bundled = self.refusals in ("bank", "own", *self.models)
        return Source(path="bundled:refusals" if bundled else self.refusals)

    def refuses(self, prompt: AnsweredPrompt) -> bool:
        """Whether a prompt gets a refusal, as its aligned response or as a needless one."""
        return prompt.harmful or self.kind == "compliance-refusal"

    def draw(self, purpose: str, prompt: AnsweredPrompt) -> int:
        """A number in [0, 2^128) that follows from the seed and the prompt alone, another one for each purpose.

        Were prompts chosen and ordered by the same number, the class with more prompts to choose from would come first.
        """
        return int(digest(purpose, self.seed, prompt.key), 16)

    def command(self) -> str:
        """The command that builds the same again, in the folder OUTPUT."""
        options = {
            "harmful": written(self.harmful),
            "harmless": written(self.harmless),
            "kind": self.kind,
            "refusals": self.refusals,
            "worse": self.worse,
            "prompts": self.prompts,
            "seed": self.seed,
            "template": self.template,
            "max-new-tokens": self.max_new_tokens,
            "output": "OUTPUT",
        }
        words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
        return shlex.join(["raydiv", "data", "build", *words])


def written(source: Source) -> str:
    """A source as ``source_of`` reads it."""
    section: Any = source.model_dump()
    return section if isinstance(section, str) else json.dumps(section)
