"""Prompt sets: prompts with their label, for separation and for evaluation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from raydiv.config.recipe import Source
from raydiv.data.formats import BadRow, flag, prompt_of
from raydiv.data.sources import iterate_records
from raydiv.errors import UserError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A labelled prompt. ``kind`` says under which heading it is counted: harmful, ordinary, alarming, or the user's own."""

    text: str | list[dict[str, str]]
    harmful: bool
    kind: str
    id: str


def read_prompts(source: str) -> list[Prompt]:
    """Prompts of a file or bundled set: columns prompt and harmful, and optionally kind.

    Raises UserError for a set that is empty or lacks one of the two classes.
    """
    prompts = []
    for where, record in iterate_records(Source(path=source)):
        try:
            harmful = flag(record, "harmful")
            kind = str(record.get("kind") or ("harmful" if harmful else "ordinary"))
            prompts.append(Prompt(prompt_of(record), harmful, kind, where))
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None
    classes = Counter(prompt.harmful for prompt in prompts)
    if len(classes) < 2:
        found = f"{classes[True]} harmful and {classes[False]} harmless"
        raise UserError(f"{source}: needs harmful and harmless prompts, found {found}")
    return prompts
