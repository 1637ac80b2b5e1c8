"""The hint in the error message for an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, count: int = 1, otherwise: str | None = None) -> str:
    """`` (did you mean A or B?)`` with at most ``count`` similar names.

    Without a similar one `` (OTHERWISE)``, by default `` (known: ...)`` with all names.
    """
    names = sorted(known)
    similar = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    if similar:
        return f" (did you mean {' or '.join(similar)}?)"
    return f" ({otherwise or 'known: ' + ', '.join(names)})"
