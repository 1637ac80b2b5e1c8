"""The watchdog of a training worker: it sends heartbeats, and ends a worker that hangs.

A collective that waits for ever raises nothing, and one that times out names the rank that waited, not the straggler.
So each worker leaves heartbeats in the run directory, and the first to give up reads them all.
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
"""Seconds between heartbeats, less under a short timeout."""

HUNG_EXIT_STATUS = 70
"""Exit status of a worker that hung."""


class Watchdog:
    """Watches the thread that enters this context, from a thread of its own."""

    def __init__(self, run: RunDirectory, timer: StepTimer, timeout: float) -> None:
        self._run, self._timer, self._timeout = run, timer, timeout
        self._every = min(HEARTBEAT_SECONDS, timeout / 10)
        self._rank, self._world_size = dist.rank(), dist.world_size()
        self._done = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            beat = self._heartbeat()
            hangs = beat.idle >= self._timeout
            # a full disk must not end the watchdog
            with suppress(OSError):
                self._run.heartbeats.write(replace(beat, where=_current_line(self._watched)) if hangs else beat)
            if hangs:
                self._give_up()
            if self._done.wait(self._every):
                return

    def _heartbeat(self) -> Heartbeat:
        timer = self._timer
        return Heartbeat(
            self._rank, self._world_size, platform.node(), os.getpid(), timer.step, timer.phase, timer.progress,
            round(timer.idle, 3), self._every,
        )  # fmt: skip

    def _give_up(self) -> None:
        """End the process: the collectives of the others fail, and Ray Train restarts all workers or fails the run."""
        with suppress(OSError):
            # ranks that began to hang a moment later still have to write their heartbeat
            self._done.wait(2 * self._every)
            if self._run.heartbeats.claim_report("stalled"):
                self._run.events.log(str(diagnose_hang(self._run.heartbeats.read(), self._timeout)))
        os._exit(HUNG_EXIT_STATUS)


def _current_line(thread: int) -> str:
    """The innermost line of code that a thread of this process runs, and the line of raydiv that led there."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    stack = [(Path(line.filename), line) for line in traceback.extract_stack(frame)]
    raydiv_lines = [(path, line) for path, line in stack if "raydiv" in path.parts]
    lines = [
        f"{path.parent.name}/{path.name}:{line.lineno} ({line.name})" for path, line in [stack[-1], *raydiv_lines[-1:]]
    ]
    return " from ".join(dict.fromkeys(lines))
