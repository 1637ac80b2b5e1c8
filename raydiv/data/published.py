"""Prompt sets that are known by their hub id: which split and configuration, and what a record of each says.

A new one is a row of ``PUBLISHED``. A source that names columns of its own is read as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raydiv.config.recipe import Source
from raydiv.data.formats import Record

Reading = Callable[[Record], Record | None]
"""From a record as published to prompt, harmful, kind and category; None for one that is not part of the evaluation."""


@dataclass(frozen=True, slots=True)
class Published:
    """A set's split, its configuration where it has several, and how it is read."""

    split: str
    read: Reading
    config: str | None = None


def published(source: Source) -> tuple[Source, Reading]:
    """The source with the split and configuration that its set is published under, and how its records are read."""
    known = PUBLISHED.get(source.path.removeprefix("hf://")) if source.path.startswith("hf://") else None
    if known is None or source.columns is not None:
        return source, lambda record: record
    given = {"split": source.split or known.split, "config": source.config or known.config}
    constants = source.constants
    return source.model_copy(update=given), lambda record: _over(known.read(record), constants)


def _over(read: Record | None, constants: dict[str, Any]) -> Record | None:
    return None if read is None else {**read, **constants}


PUBLISHED: dict[str, Published] = {}
"""By hub id."""
