"""Prompt sets: labelled prompts for separation and evaluation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raydiv.config import Recipe, parse_source
from raydiv.config.source import Source
from raydiv.data.fields import BadRow, Record, bool_field, prompt_field
from raydiv.data.published import alternative_hint, as_published
from raydiv.data.readers import iterate_records
from raydiv.model.chat import ChatPrompt, as_messages
from raydiv.utils.errors import UserError

log = logging.getLogger("raydiv")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A labelled prompt.

    ``kind`` is the heading under which it is counted: harmful, ordinary, alarming, or the user's own. ``category`` is
    its topic, such as a kind of harm, as its set names it. ``id`` is its file and line; ``set`` the short name of its
    source. ``behavior`` and ``context``: the two parts of a prompt that asks about a text, which HarmBench's classifier
    is shown apart.
    """

    text: ChatPrompt
    harmful: bool
    kind: str
    id: str
    category: str | None = None
    set: str = ""
    behavior: str | None = None
    context: str | None = None


def read_prompts(sources: Sequence[Source], *, both: bool) -> list[Prompt]:
    """The prompts of all ``sources``: columns prompt and harmful, and optionally kind and category.

    Published sets are read in their own columns (see raydiv.data.published); plain text is a prompt a line. Raises
    UserError for sources without prompts, and with ``both`` for sources without harmful or without harmless prompts.
    """
    prompts = [prompt for source in sources for prompt in _prompts(source)]
    counts, name = Counter(prompt.harmful for prompt in prompts), set_name(sources)
    if not prompts:
        raise UserError(f"{name}: holds no prompts")
    if both and len(counts) < 2:
        raise UserError(
            f"{name}: needs harmful and harmless prompts, found {counts[True]} harmful and {counts[False]} harmless"
        )
    return prompts


def last_user_text(prompt: Prompt) -> str:
    """The last user turn of a prompt."""
    return str([turn for turn in as_messages(prompt.text) if turn["role"] == "user"][-1]["content"])


def prompt_sets(recipe: Recipe) -> list[tuple[list[Source], bool]]:
    """The recipe's prompt sets, and whether each needs both classes."""
    sets = ((recipe.evaluate.prompts, False), (recipe.separation.prompts, True))
    return [(sources, both) for sources, both in sets if sources]


@dataclass(frozen=True, slots=True)
class PromptSets:
    """The prompts of a recipe's prompt sets; empty if the recipe has no such set."""

    evaluate: list[Prompt]
    separation: list[Prompt]

    @classmethod
    def of(cls, recipe: Recipe) -> PromptSets:
        """Read the recipe's prompt sets. Raises UserError as ``read_prompts`` does."""
        evaluate, separation = recipe.evaluate.prompts, recipe.separation.prompts
        return cls(
            evaluate=read_prompts(evaluate, both=False) if evaluate else [],
            separation=read_prompts(separation, both=True) if separation else [],
        )

    def by_name(self, recipe: Recipe) -> dict[str, list[Prompt]]:
        """The prompt sets that the recipe has, by their names in reports."""
        sets = ((recipe.evaluate.prompts, self.evaluate), (recipe.separation.prompts, self.separation))
        return {set_name(sources): prompts for sources, prompts in sets if sources}


def set_name(sources: Sequence[Source]) -> str:
    """The name of a prompt set in messages and reports: the paths of its sources."""
    return ", ".join(source.path for source in sources)


def prompt_sets_of(
    prompts: str | Sequence[str], harmful: Sequence[str], harmless: Sequence[str], default: str
) -> list[list[Source]]:
    """The prompt sets of a command's options: each of ``prompts``, and one of all ``harmful`` and ``harmless`` sources.

    ``default`` if there are none.
    """
    paths = [prompts] if isinstance(prompts, str) else prompts
    labelled = [
        with_label(parse_source(path), label) for paths, label in ((harmful, True), (harmless, False)) for path in paths
    ]
    sets = [[parse_source(path)] for path in paths] + ([labelled] if labelled else [])
    return sets or [[Source(path=default)]]


def with_label(source: Source, harmful: bool) -> Source:
    """The source with one label for all of its prompts."""
    return source.model_copy(update={"constants": source.constants | {"harmful": harmful}})


def _prompts(source: Source) -> list[Prompt]:
    prompts, unlabelled = [], 0
    for part, parse in as_published(source):
        for where, record in _records(part):
            try:
                parsed = parse(record)
                if parsed is None:
                    unlabelled += 1
                else:
                    prompts.append(_prompt(parsed, where, source.short_name, source.constants.get("harmful")))
            except BadRow as error:
                raise UserError(f"{where}: {error}") from None
    if unlabelled:
        log.warning("%s: %d prompts have no label and are left out", source.path, unlabelled)
    return prompts


def _prompt(record: Record, where: str, name: str, label: bool | str | None) -> Prompt:
    """The prompt of a record; ``label`` is the label that the source has for all of its prompts. Raises BadRow."""
    if "harmful" not in record:
        raise BadRow("harmful is missing: add it, or give the set as --harmful or --harmless (constants in a recipe)")
    harmful = bool_field(record, "harmful")
    if label not in (None, harmful):
        raise BadRow(f"harmful is {str(harmful).lower()}, but {str(label).lower()} for the whole set")
    kind = str(record.get("kind") or ("harmful" if harmful else "ordinary"))
    category = None if record.get("category") is None else str(record["category"])
    parts = {part: record.get(part) for part in ("behavior", "context")}
    if not all(isinstance(part, str) and part for part in parts.values()):
        parts = {}
    return Prompt(prompt_field(record), harmful, kind, where, category, name, **parts)


def _records(source: Source) -> Iterator[tuple[str, Record]]:
    try:
        yield from iterate_records(source)
    except UserError as error:
        raise UserError(f"{error}{alternative_hint(source)}") from None
