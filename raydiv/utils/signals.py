"""SIGTERM: what a scheduler sends to a command that has to go."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 143
"""Exit status of a command that SIGTERM ended."""


class Terminated(BaseException):
    """SIGTERM has arrived; what the command leaves can be gone on with."""


def _raise() -> None:
    raise Terminated("stopped by SIGTERM")


@contextmanager
def on_sigterm(handle: Callable[[], None] = _raise) -> Iterator[None]:
    """While the block runs, the first SIGTERM calls ``handle``, and the next ones raise Terminated where the program is.

    Only the main thread of a process hears signals; in another nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, lambda *_: _raise())
        handle()

    before = signal.signal(signal.SIGTERM, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
