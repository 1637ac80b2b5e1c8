"""SIGTERM, with which a scheduler stops a command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGTERM_EXIT_STATUS = 143


class Terminated(BaseException):
    """SIGTERM arrived. The command stops, and what it leaves can be resumed."""


def _raise() -> None:
    raise Terminated("stopped by SIGTERM")


@contextmanager
def on_sigterm(handle: Callable[[], None] = _raise) -> Iterator[None]:
    """While the block runs, the first SIGTERM calls ``handle``; later ones raise Terminated.

    Python handles signals in the main thread only; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle_first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, lambda *_: _raise())
        handle()

    before = signal.signal(signal.SIGTERM, handle_first)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
