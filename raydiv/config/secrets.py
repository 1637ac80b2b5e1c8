"""Secrets have no place in a recipe: it is written into every run, to MLflow and to the cluster's list of jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NAMED = re.compile(r"(?:^|_|-|\.)(?:tokens?|secrets?|passwords?|passwd|keys?|credentials?)(?:$|_|-|\.)", re.IGNORECASE)
"""Names of variables and tags that say that their value is one, such as HF_TOKEN and AWS_SECRET_ACCESS_KEY."""

LOGIN = re.compile(r"^[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@", re.IGNORECASE)
"""The beginning of a URI with a password in it."""

FREELY_NAMED = (("cluster", "env"), ("track", "tags"))
"""Sections whose keys are the user's own."""

INSTEAD = (
    "a recipe is written into every run, so no secret belongs there: set it in the environment of the command, and of each "
    "node of a cluster"
)


def secrets_in(recipe: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an unchecked recipe, without any of the values."""
    for section, key in FREELY_NAMED:
        named = recipe.get(section)
        held = named.get(key) if isinstance(named, Mapping) else None
        for name in held if isinstance(held, Mapping) else ():
            if NAMED.search(str(name)):
                yield f"{section}.{key}.{name}: {INSTEAD}"
    for path in _with_password(recipe, ""):
        yield f"{path}: has a password in its address; {INSTEAD}"


def _with_password(value: Any, path: str) -> Iterator[str]:
    """Paths of addresses with a password."""
    if isinstance(value, str):
        if LOGIN.match(value):
            yield path
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _with_password(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, Sequence):
        for number, inner in enumerate(value):
            yield from _with_password(inner, f"{path}.{number}")
