"""Progress of a command on the terminal, and its messages in the log of Python's ``raydiv`` logger."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from raydiv.runs.metrics_log import Metrics

LOGGER = logging.getLogger("raydiv")

STEP_METRICS = {"loss": "loss", "divergence": "div", "reward/margin": "margin", "tokens_per_second": "tok/s"}
"""Step metrics on the training bar, and their labels."""

LINE_SECONDS = 20.0
"""Seconds between lines of progress where the output is not a terminal."""


class Update(Protocol):
    def __call__(self, done: int, total: int | None, note: str = "") -> None: ...


def _columns() -> list[ProgressColumn]:
    return [
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]


class ProgressDisplay:
    """Shows progress on standard error, so that standard output stays free for results.

    A terminal shows bars. Any other output gets a line when a phase ends, and every LINE_SECONDS within a long one.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[Update]:
        """Show a phase of the work while the block runs; yields ``update(done, total, note)``."""
        started = printed = time.monotonic()
        first_update: tuple[float, int] | None = None
        with Progress(*_columns(), console=self.console, disable=not self.console.is_terminal) as bars:
            task = bars.add_task(name, total=None, note="")

            def update(done: int, total: int | None, note: str = "") -> None:
                nonlocal printed, first_update
                bars.update(task, completed=done, total=total, note=note)
                now = time.monotonic()
                first_update = first_update or (now, done)
                if not self.console.is_terminal and now - printed > LINE_SECONDS:
                    printed = now
                    # the time before the first update is start-up, which does not count for the estimate
                    first_time, first_done = first_update
                    if total and done > first_done:
                        left = f", {(now - first_time) / (done - first_done) * (total - done):.0f} s left"
                    else:
                        left = ""
                    count = f"{done}/{total}" if total else f"{done}"
                    self._print_line(f"{name}: {count}  {note}  ({now - started:.0f} s{left})")

            yield update
        if not self.console.is_terminal:
            self._print_line(f"{name}: done in {time.monotonic() - started:.1f} s")

    def print(self, message: str) -> None:
        """Print a message and log it. Its level is INFO: without a handler of the user's the terminal shows it once."""
        self._print_line(message)
        LOGGER.info(message)

    def _print_line(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)


def step_note(record: Metrics) -> str:
    """The metrics of a step as the training bar shows them."""
    return "  ".join(f"{label} {record[key]:.3g}" for key, label in STEP_METRICS.items() if key in record)
