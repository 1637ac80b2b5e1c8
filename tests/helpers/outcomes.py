"""How a call ends: what refuses it, and that it ends in time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raydiv.utils.errors import UserError


def refusal(read: Callable[[], Any]) -> str | None:
    """Why something is refused; None where it is read."""
    try:
        read()
    except UserError as error:
        return str(error)
    return None


@contextmanager
def bounded(what: object, seconds: int) -> Iterator[None]:
    """Fail where the block takes longer."""

    def stop(*_: object) -> None:
        raise AssertionError(f"{what}: still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
