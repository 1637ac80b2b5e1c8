"""What a person sees while it runs: phases with a counter, and a training bar read from metrics.jsonl."""

from __future__ import annotations

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

from raydiv.runs.directory import Metrics

STEP_METRICS = {"loss": "loss", "divergence": "div", "reward/margin": "margin", "tokens_per_second": "tok/s"}
"""Step metrics on the training bar, and their labels there."""


QUIET_SECONDS = 20.0
"""Where bars cannot move, a line is printed this often."""


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
    """Progress on standard error, so that standard output stays free for results.

    On a terminal bars move; elsewhere a line is printed when a phase ends, and now and then within a long one.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[Update]:
        """A phase of the work; the context gives ``update(done, total, note)``."""
        started = printed = time.monotonic()
        first: tuple[float, int] | None = None
        with Progress(*_columns(), console=self.console, disable=not self.console.is_terminal) as bars:
            task = bars.add_task(name, total=None, note="")

            def update(done: int, total: int | None, note: str = "") -> None:
                nonlocal printed, first
                bars.update(task, completed=done, total=total, note=note)
                now = time.monotonic()
                first = first or (now, done)
                if not self.console.is_terminal and now - printed > QUIET_SECONDS:
                    printed = now
                    # what came before the first unit was start-up, and says nothing of the rest
                    eta = (now - first[0]) / (done - first[1]) * (total - done) if total and done > first[1] else None
                    left = "" if eta is None else f", {eta:.0f} s left"
                    self.print(f"{name}: {done}{f'/{total}' if total else ''}  {note}  ({now - started:.0f} s{left})")

            yield update
        if not self.console.is_terminal:
            self.print(f"{name}: done in {time.monotonic() - started:.1f} s")

    def print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def step_note(record: Metrics) -> str:
    """A step's metrics as the bar shows them."""
    return "  ".join(f"{label} {record[key]:.3g}" for key, label in STEP_METRICS.items() if key in record)
