"""report.html while the run goes on, in a browser."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raydiv.runs.directory import RunDirectory
from raydiv.runs.report.page import write_live_report

RENEWAL_SECONDS = 20
"""Drawing the page takes about a second of one CPU."""


@contextmanager
def live_report(run: RunDirectory, tell: Callable[[str], None]) -> Iterator[None]:
    """Open report.html in a browser, and renew it while the block runs. ``tell`` gets a line where there is no browser.

    A page that cannot be written is reported once, and does not stop the run.
    """
    run.metrics.path.touch()
    done = threading.Event()
    problems: set[str] = set()

    def write(renewal_seconds: int | None) -> None:
        try:
            write_live_report(run, renewal_seconds)
        except Exception as error:  # a picture is no reason to stop
            problem = f"{run.report}: cannot be renewed: {type(error).__name__}: {error}"
            if problem not in problems:
                problems.add(problem)
                tell(problem)

    def renew() -> None:
        while not done.wait(RENEWAL_SECONDS):
            write(RENEWAL_SECONDS)

    write(RENEWAL_SECONDS)
    if not (_has_browser() and webbrowser.open(run.report.resolve().as_uri())):
        tell(f"{run.report} renews itself; there is no browser here to open it with")
    renewal = threading.Thread(target=renew, daemon=True, name="report")
    renewal.start()
    try:
        yield
    finally:
        done.set()
        renewal.join()
        write(None)


def _has_browser() -> bool:
    """Whether a browser would open in a window: one of the terminal would take it from the run."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
