"""Worker heartbeats, and the diagnosis of a hang: which rank is stuck or straggling."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from raydiv.utils.storage import read_json, write_json

NAMED_SUSPECTS = 4
"""Ranks that the diagnosis names; it counts the rest."""

CONNECT = "connect"
"""The phase of a worker's first collective."""

MISSED_BEATS = 3
"""Missed heartbeats in a row after which a worker counts as silent."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The state of a worker, and the content of its file.

    ``of`` is the number of workers. ``passed`` counts phases and forwards, in an order that all ranks share, so the
    straggler has the lowest count. ``idle``: seconds since the last progress. ``every``: seconds between heartbeats.
    ``where``: the line of code of a worker that hangs. ``silent``: seconds without a heartbeat while another worker
    sent some.
    """

    rank: int
    of: int
    host: str
    pid: int
    step: int
    phase: str
    passed: int
    idle: float
    every: float
    where: str = ""
    silent: float = 0.0

    @property
    def is_silent(self) -> bool:
        """Whether the process or its node is gone: the watchdog sends heartbeats even during a hang."""
        return self.silent > MISSED_BEATS * self.every

    @property
    def place(self) -> str:
        """Rank, host, process, phase and step, as status and the diagnosis show them."""
        line = f" at {self.where}" if self.where else ""
        silence = f" (no heartbeat for {self.silent:.0f} s)" if self.is_silent else ""
        return f"rank {self.rank} ({self.host}, pid {self.pid}), in {self.phase} of step {self.step}{line}{silence}"


class HeartbeatFolder:
    """The last heartbeat of each training worker, in a file by rank."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def clear(self) -> None:
        """Make the folder, without the heartbeats of an earlier start."""
        shutil.rmtree(self._path, ignore_errors=True)
        # another rank may have written its first one into it again
        self._path.mkdir(parents=True, exist_ok=True)

    def write(self, beat: Heartbeat) -> None:
        write_json(self._path / f"{beat.rank}.json", asdict(beat))

    def read(self) -> list[Heartbeat]:
        """The last heartbeat of every worker, by rank."""
        # silence is measured by the files' times, which come from one clock; those of the nodes differ
        beats = [(path.stat().st_mtime, read_json(path)) for path in self._path.glob("*.json")]
        newest = max((written for written, _ in beats), default=0.0)
        read = [Heartbeat(**beat | {"silent": round(newest - written, 3)}) for written, beat in beats]
        return sorted(read, key=lambda beat: beat.rank)

    def seconds_since_last(self) -> float:
        """Seconds since the last heartbeat of any worker; infinite where there is none."""
        times = []
        for path in self._path.glob("*.json"):
            with suppress(FileNotFoundError):  # another start clears the folder
                times.append(path.stat().st_mtime)
        return time.time() - max(times, default=-math.inf)

    def claim_report(self, name: str) -> bool:
        """Whether this worker is the first to claim the report ``name``, and so is the one to log it."""
        try:
            (self._path / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def diagnose_hang(beats: Sequence[Heartbeat], timeout: float) -> str | None:
    """A message that names the suspects of a hang; None where no worker has been idle for ``timeout`` seconds.

    Suspects are the silent workers; without any, the stragglers, for which the others wait.
    """
    if not beats or max(beat.idle for beat in beats) < timeout:
        return None
    progress = [(not beat.is_silent, beat.passed) for beat in beats]
    suspects = [beat for beat, made in zip(beats, progress, strict=True) if made == min(progress)]
    waiting = [beat for beat in beats if beat not in suspects]
    message = f"no progress for {timeout:g} s (cluster.timeout_s). Suspect{'s' * (len(suspects) > 1)}: " + "; ".join(
        beat.place for beat in suspects[:NAMED_SUSPECTS]
    )
    if len(suspects) > NAMED_SUSPECTS:
        message += f"; and {len(suspects) - NAMED_SUSPECTS} more in the same phase"
    if waiting:
        ranks = f"{len(waiting)} rank{'s' * (len(waiting) > 1)}"
        message += f". Waiting in a collective: {ranks}, in {waiting[0].phase} of step {waiting[0].step}"
    if any(beat.phase == CONNECT for beat in beats):
        message += (
            ". Workers have not reached each other: set NCCL_SOCKET_IFNAME (on CPUs GLOO_SOCKET_IFNAME) in cluster.env "
            "to the interface that joins the nodes; NCCL_DEBUG: INFO shows what NCCL tries"
        )
    return message
