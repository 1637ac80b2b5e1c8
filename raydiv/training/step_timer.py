"""The phases of a worker: how long each took, and how far the worker has come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")

STEP_PHASES = ("data", "score", "judge", "push", "optimizer")
"""Phases that make up a step; one that the loss does not need takes no time."""


class StepTimer:
    """``phase`` is what a worker does now, at step number ``step`` (from 1).

    ``progress`` counts phases and forwards. Every rank goes through the same sequence, so the counts are comparable.
    """

    def __init__(self) -> None:
        self.phase, self.step, self.progress = "start", 0, 0
        self._phase_start = self._last_progress = self._step_start = time.perf_counter()
        self.seconds_to_judge = 0.0
        """Seconds from the start of the step to the collective that all ranks wait in, without that wait."""
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """End the current phase and begin ``phase``."""
        now = time.perf_counter()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._phase_start
        if phase == "data":
            self._step_start = now
        elif phase == "judge":
            self.seconds_to_judge = now - self._step_start
        self.phase, self._phase_start = phase, now
        self.advance()

    def advance(self) -> None:
        """Note that a part of the phase is done."""
        self.progress += 1
        self._last_progress = time.perf_counter()

    @property
    def idle(self) -> float:
        """Seconds since the last progress."""
        return time.perf_counter() - self._last_progress

    def take_seconds(self) -> dict[str, float]:
        """Seconds in each phase since the last call."""
        self.enter(self.phase)
        seconds, self._seconds = self._seconds, {}
        return seconds

    def timed_steps(self, steps: Iterator[T], behind: int) -> Iterator[T]:
        """The ``steps``, which come after the first ``behind`` of a run; the wait for each is its phase ``data``."""
        self.step = behind
        while True:
            self.step += 1
            self.enter("data")
            try:
                step = next(steps)
            except StopIteration:
                return
            yield step
