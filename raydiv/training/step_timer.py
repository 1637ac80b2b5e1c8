"""What a worker does, in phases one after another: how long each took, and how far it has come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")

STEP_PHASES = ("data", "score", "judge", "push", "optimizer")
"""Phases that make up a step; one that its loss does not need takes no time."""


class StepTimer:
    """``name`` is the phase that a worker is in, of the ``step`` that it makes or has made last.

    ``passed`` counts phases and forwards. Every rank goes through the same ones, so it compares them.
    """

    def __init__(self) -> None:
        self.name, self.step, self.passed = "start", 0, 0
        self._entered = self._went_on = self._began = time.perf_counter()
        self.until_judged = 0.0
        """Seconds from the beginning of the step to where the ranks meet, what the others wait for included in none."""
        self._spent: dict[str, float] = {}

    def enter(self, name: str) -> None:
        """The phase before is over, and another begins."""
        now = time.perf_counter()
        self._spent[self.name] = self._spent.get(self.name, 0.0) + now - self._entered
        if name == "data":
            self._began = now
        elif name == "judge":
            self.until_judged = now - self._began
        self.name, self._entered = name, now
        self.advance()

    def advance(self) -> None:
        """A part of the phase is done."""
        self.passed += 1
        self._went_on = time.perf_counter()

    @property
    def idle(self) -> float:
        """Seconds since the worker went on."""
        return time.perf_counter() - self._went_on

    def spent(self) -> dict[str, float]:
        """Seconds in each phase since the last call."""
        self.enter(self.name)
        spent, self._spent = self._spent, {}
        return spent

    def timed_steps(self, steps: Iterator[T], behind: int) -> Iterator[T]:
        """The steps after the first ``behind``; waiting for one is its phase ``data``."""
        self.step = behind
        while True:
            self.step += 1
            self.enter("data")
            try:
                step = next(steps)
            except StopIteration:
                return
            yield step
