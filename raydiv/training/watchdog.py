"""A watch over a training worker: it says from time to time where the worker is, and ends one that stands still.

A collective that waits for ever raises nothing, and one that gives up names the worker that waited, not the one that was
waited for. So each worker leaves a beat in the run directory, and whoever gives up first reads them all.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from raydiv.runs.directory import RunDirectory
from raydiv.runs.heartbeat import Heartbeat, diagnose_hang
from raydiv.training.step_timer import StepTimer
from raydiv.utils import distributed as dist

HEARTBEAT_SECONDS = 10.0
"""Seconds from beat to beat, or less under a short timeout."""

HUNG_EXIT_STATUS = 70
"""Exit status of a worker that stood still."""


class Watchdog:
    """Runs beside the block that it is entered for, in the thread of which the work is done."""

    def __init__(self, run: RunDirectory, phases: StepTimer, timeout: float) -> None:
        self._run, self._phases, self._timeout = run, phases, timeout
        self._every = min(HEARTBEAT_SECONDS, timeout / 10)
        self._rank, self._of = dist.rank(), dist.world_size()
        self._over = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            beat = self._beat()
            stands = beat.idle >= self._timeout
            # a full disk must not end the watch
            with suppress(OSError):
                self._run.heartbeats.write(replace(beat, where=_place(self._watched)) if stands else beat)
            if stands:
                self._give_up()
            if self._over.wait(self._every):
                return

    def _beat(self) -> Heartbeat:
        phases = self._phases
        return Heartbeat(
            self._rank, self._of, platform.node(), os.getpid(), phases.step, phases.name, phases.passed,
            round(phases.idle, 3), self._every,
        )  # fmt: skip

    def _give_up(self) -> None:
        """End the process, which ends what the others wait for; Ray Train starts all of them again, or fails the run."""
        with suppress(OSError):
            # those who stand still since a moment later are still to say so
            self._over.wait(2 * self._every)
            if self._run.heartbeats.claim_report("stalled"):
                self._run.events.log(str(diagnose_hang(self._run.heartbeats.read(), self._timeout)))
        os._exit(HUNG_EXIT_STATUS)


def _place(thread: int) -> str:
    """Where a thread of this process is: the innermost line, and raydiv's own that led there."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    stack = [(Path(line.filename), line) for line in traceback.extract_stack(frame)]
    ours = [found for found in stack if "raydiv" in found[0].parts]
    places = [f"{path.parent.name}/{path.name}:{line.lineno} ({line.name})" for path, line in [stack[-1], *ours[-1:]]]
    return " from ".join(dict.fromkeys(places))
