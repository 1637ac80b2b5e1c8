"""``raydiv status``: the state of a run, read from its directory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raydiv.runs.directory import RunDirectory
from raydiv.runs.heartbeat import MISSED_BEATS, Heartbeat
from raydiv.runs.metrics_log import Metrics
from raydiv.runs.output_directory import directory_kind
from raydiv.training.checkpoint.manifest import CheckpointStore
from raydiv.utils.claim import is_claimed
from raydiv.utils.errors import UserError

MEMBERS = {"sweep": "trials", "study": "cells"}
"""The folder of the runs of a sweep and of a study."""

RECENT_STEPS = 20
"""Steps whose median duration predicts the time left."""


def status(run: Path) -> dict[str, Any]:
    """The ``state`` of a run (``measuring``, ``training``, ``stopped``, ``trained`` or ``finished``) and its progress.

    ``running``: whether a process writes into the directory. ``step`` of ``planned`` steps; ``seconds_left`` while it
    trains; the last ``metrics``; the step of the ``checkpoint`` from which it would resume; the last heartbeats of its
    ``workers``. ``measuring`` and ``trained`` are also the states of a run that was stopped while a model was
    evaluated.

    Raises UserError where there is no run, and in the directory of a sweep or study.
    """
    directory = RunDirectory(run)
    kind = directory_kind(run)
    if kind is None:
        raise UserError(f"{run}: no run in this directory (a run has a recipe.yaml)")
    if kind in MEMBERS:
        raise UserError(f"{run}: is the directory of a {kind}; name one of its runs, in {run / MEMBERS[kind]}")
    stage, beats = directory.stage.read(), directory.heartbeats.read()
    records = directory.metrics.read() if directory.metrics.path.exists() else []
    steps = [record for record in records if "step_seconds" in record]
    alive = bool(beats) and directory.heartbeats.seconds_since_last() <= MISSED_BEATS * beats[0].every
    if directory.result.exists():
        state = "finished"
    elif stage.metrics_bytes_at_end is not None:
        state = "trained"
    elif stage.metrics_bytes_at_start is None:
        state = "measuring"
    else:
        state = "training" if alive else "stopped"
    return {
        "run": str(run),
        "state": state,
        "running": is_claimed(run),
        "step": int(steps[-1]["step"]) if steps else 0,
        "planned": stage.planned_steps,
        "ended": stage.end_reason,
        "seconds_left": _seconds_left(steps, stage.planned_steps) if state == "training" else None,
        "metrics": directory.metrics.trained_values() if records else {},
        "checkpoint": next(iter(CheckpointStore(directory.checkpoints(directory.read_recipe())).steps()), None),
        "workers": [asdict(beat) for beat in beats] if state in ("training", "stopped") else [],
    }


def follow_status(run: Path) -> Iterator[dict[str, Any]]:
    """The status every FOLLOW_SECONDS, until no process writes into the directory. Raises as ``status`` does."""
    report = status(run)
    yield report
    while report["running"]:
        time.sleep(FOLLOW_SECONDS)
        report = status(run)
        yield report


FOLLOW_SECONDS = 1.0


def _seconds_left(steps: list[Metrics], planned: int | None) -> float | None:
    if not steps or planned is None:
        return None
    seconds = statistics.median(record["step_seconds"] for record in steps[-RECENT_STEPS:])
    return float((planned - int(steps[-1]["step"])) * seconds)


SHOWN = ("loss", "divergence", "reward/margin", "reward/accuracy", "eval/loss", "tokens_per_second", "refused_steps")
NEXT = {
    "measuring": "the base model is evaluated, or the command was stopped: raydiv train RECIPE --resume continues",
    "stopped": "raydiv train RECIPE --resume continues",
    "trained": "the trained model is evaluated, or the command was stopped: raydiv train RECIPE --resume continues",
}
"""What to do next, by state."""


def status_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Labels and texts of the lines that ``raydiv status`` prints."""
    planned = f" of {report['planned']}" if report["planned"] else ""
    left = f", about {report['seconds_left'] / 60:.0f} min left" if report["seconds_left"] is not None else ""
    reason = f" ({report['ended']})" if report["ended"] else ""
    lines = [
        ("run", report["run"]),
        ("state", f"{report['state']}{reason}"),
        ("step", f"{report['step']}{planned}{left}"),
        *((name, f"{report['metrics'][name]:.4g}") for name in SHOWN if name in report["metrics"]),
    ]
    if report["checkpoint"] is not None:
        lines.append(("checkpoint", f"after step {report['checkpoint']}"))
    lines += [("", Heartbeat(**beat).place) for beat in report["workers"]]
    if report["state"] in NEXT:
        lines.append(("next", NEXT[report["state"]]))
    return lines
