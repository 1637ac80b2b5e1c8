"""What a person sees while it runs: phases with a counter, and a training bar read from metrics.jsonl."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

STEP_METRICS = {"loss": "loss", "divergence": "div", "reward/margin": "margin", "tokens_per_second": "tok/s"}
"""Step metrics on the training bar, and their labels there."""


class Display:
    """Progress on standard error, so that standard output stays free for results.

    On a terminal bars move; elsewhere a line is printed when a phase ends and, within a long one, every half minute.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)
        self._interval = 30.0

    @contextmanager
    def phase(self, name: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
        """A phase of ``total`` units; the context gives ``update(done, note)``."""
        columns: list[ProgressColumn] = [
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
        ]
        columns += [TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
        started = printed = time.monotonic()
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bars:
            task = bars.add_task(name, total=total, note="")

            def update(done: int, note: str = "") -> None:
                nonlocal printed
                bars.update(task, completed=done, note=note)
                now = time.monotonic()
                if not self.console.is_terminal and now - printed > self._interval:
                    printed = now
                    rate = (now - started) / max(done, 1)
                    left = f", {rate * (total - done):.0f} s left" if total else ""
                    self.console.print(
                        f"{name}: {done}/{total or '?'}  {note}  ({now - started:.0f} s{left})", soft_wrap=True
                    )

            yield update
        if not self.console.is_terminal:
            self.console.print(f"{name}: done in {time.monotonic() - started:.1f} s", soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def step_note(record: dict[str, float]) -> str:
    """A step's metrics as the bar shows them."""
    return "  ".join(f"{label} {record[key]:.3g}" for key, label in STEP_METRICS.items() if key in record)
