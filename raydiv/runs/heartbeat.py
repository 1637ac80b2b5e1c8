"""What each training worker says of itself from time to time, and which of them the others wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NAMED = 4
"""Workers that a message says something of."""

MISSED_BEATS = 3
"""Beats in a row, after which a worker counts as silent."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker's state. ``passed`` counts what it has gone through, in the order that is the same for all workers.

    ``idle``: seconds since it went on; ``every``: seconds from beat to beat; ``where``: the place in the program, of one that
    stands still. ``silent``: seconds that it has said nothing, while another worker did.
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
        """It does not even say that it stands still: its process is stopped or gone, or its node is."""
        return self.silent > MISSED_BEATS * self.every

    @property
    def place(self) -> str:
        at = f", at {self.where}" if self.where else ""
        last = f" (says nothing since {self.silent:.0f} s)" if self.is_silent else ""
        return f"worker {self.rank} ({self.host}, process {self.pid}): {self.phase} of step {self.step}{at}{last}"


def diagnose_hang(beats: Sequence[Heartbeat], timeout: float) -> str | None:
    """Of workers that have stood still for ``timeout`` seconds, whom to look at; None where they have not.

    That is who says nothing any more; else who has come least far, since the others wait for it.
    """
    if not beats or max(beat.idle for beat in beats) < timeout:
        return None
    first = min((not beat.is_silent, beat.passed) for beat in beats)
    behind = [beat for beat in beats if (not beat.is_silent, beat.passed) == first]
    others = [beat for beat in beats if beat not in behind]
    told = "; ".join(beat.place for beat in behind[:NAMED])
    if len(behind) > NAMED:
        told += f"; and {len(behind) - NAMED} more there"
    if others:
        waiting = others[0]
        told += f"; {len(others)} other{'s' * (len(others) > 1)} waited, in {waiting.phase} of step {waiting.step}"
    return f"training has stood still for {timeout:g} s (cluster.timeout_s) at {told}"
