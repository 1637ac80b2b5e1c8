"""Heartbeats of training workers, made by hand."""

from __future__ import annotations

from dataclasses import replace

from raydiv.runs.heartbeat import Heartbeat

BEAT = Heartbeat(rank=0, of=4, host="a", pid=7, step=6, phase="score", passed=50, idle=61.0, every=5.0)


def beats(*changes: dict[str, object]) -> list[Heartbeat]:
    return [replace(BEAT, rank=rank, **change) for rank, change in enumerate(changes)]  # type: ignore[arg-type]
