"""What a long computation reports while it runs."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int | None], None]
"""Called with the number of finished rows and the number of all rows (None: not known)."""


def no_progress(done: int, total: int | None) -> None:
    """A Progress that does nothing."""
