"""Prompt sets: prompts with their label, for separation and for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raydiv.config import Recipe, source_of
from raydiv.config.source import Source
from raydiv.data.formats import BadRow, Record, flag, prompt_of
from raydiv.data.published import instead_of, published
from raydiv.data.sources import iterate_records
from raydiv.model.chat import Messages
from raydiv.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A labelled prompt.

    ``kind`` says under which heading it is counted: harmful, ordinary, alarming, or the user's own; ``category`` what it is
    about (a kind of harm, as its set has them); ``id`` its file and line; ``set`` the short name of the source it is from.
    """

    text: str | Messages
    harmful: bool
    kind: str
    id: str
    category: str | None = None
    set: str = ""


def read_prompts(sources: Sequence[Source], *, both: bool) -> list[Prompt]:
    """Prompts of several sources together: columns prompt and harmful, and optionally kind and category.

    Published sets are read as they are published (raydiv.data.published), plain text a prompt a line. Raises UserError for a
    set that is empty, and where ``both`` classes are asked for, for one that lacks one.
    """
    prompts = [prompt for source in sources for prompt in _prompts(source)]
    classes, name = Counter(prompt.harmful for prompt in prompts), named(sources)
    if not prompts:
        raise UserError(f"{name}: holds no prompts")
    if both and len(classes) < 2:
        found = f"{classes[True]} harmful and {classes[False]} harmless"
        raise UserError(f"{name}: needs harmful and harmless prompts, found {found}")
    return prompts


def prompt_sets(recipe: Recipe) -> list[tuple[list[Source], bool]]:
    """The recipe's prompt sets, each with whether it must hold both classes."""
    sets = ((recipe.evaluate.prompts, False), (recipe.separation.prompts, True))
    return [(sources, both) for sources, both in sets if sources]


@dataclass(frozen=True, slots=True)
class PromptSets:
    """The prompts that a recipe names; none where it names no set."""

    evaluate: list[Prompt]
    separation: list[Prompt]

    @classmethod
    def of(cls, recipe: Recipe) -> PromptSets:
        """Read them. Raises UserError as ``read_prompts`` does."""
        answered, apart = recipe.evaluate.prompts, recipe.separation.prompts
        return cls(
            read_prompts(answered, both=False) if answered else [], read_prompts(apart, both=True) if apart else []
        )

    def by_name(self, recipe: Recipe) -> dict[str, list[Prompt]]:
        """The sets that there are, by what reports call them."""
        sets = ((recipe.evaluate.prompts, self.evaluate), (recipe.separation.prompts, self.separation))
        return {named(sources): prompts for sources, prompts in sets if sources}


def named(sources: Sequence[Source]) -> str:
    """What messages and reports call several sources."""
    return ", ".join(source.path for source in sources)


def sets_of(
    prompts: str | Sequence[str], harmful: Sequence[str], harmless: Sequence[str], default: str
) -> list[list[Source]]:
    """Prompt sets as a user names them: each of ``prompts`` with its labels, and one of what is labelled here.

    ``default`` where there is none.
    """
    own = [prompts] if isinstance(prompts, str) else prompts
    labelled_here = [
        labelled(source_of(place), label) for places, label in ((harmful, True), (harmless, False)) for place in places
    ]
    found = [[source_of(place)] for place in own] + ([labelled_here] if labelled_here else [])
    return found or [[Source(path=default)]]


def labelled(source: Source, harmful: bool) -> Source:
    """The source with a label for all of its prompts."""
    return source.model_copy(update={"constants": source.constants | {"harmful": harmful}})


def _prompts(source: Source) -> list[Prompt]:
    name = source.short_name
    source, reading = published(source)
    found = []
    for where, record in _records(source):
        try:
            read = reading(record)
            if "harmful" not in read:
                raise BadRow(
                    "harmful is missing: add it, or give the set as --harmful or --harmless (constants in a recipe)"
                )
            harmful = flag(read, "harmful")
            if source.constants.get("harmful", harmful) != harmful:
                raise BadRow(f"harmful is {str(harmful).lower()} here, and the set is given as what is not")
            kind = str(read.get("kind") or ("harmful" if harmful else "ordinary"))
            category = None if read.get("category") is None else str(read["category"])
            found.append(Prompt(prompt_of(read), harmful, kind, where, category, name))
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None
    return found


def _records(source: Source) -> Iterator[tuple[str, Record]]:
    try:
        yield from iterate_records(source)
    except UserError as error:
        raise UserError(f"{error}{instead_of(source)}") from None
