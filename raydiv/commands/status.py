"""Where a run stands, from what its directory says: whether it trains, who does what there, and what is left to do."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raydiv.runs.directory import Metrics, RunDirectory
from raydiv.runs.heartbeat import MISSED_BEATS, Heartbeat
from raydiv.training.checkpoint.manifest import CheckpointStore
from raydiv.utils.errors import UserError

RECENT = 20
"""Steps by whose median duration the rest is timed."""


def status(run: Path) -> dict[str, Any]:
    """``state`` (``measuring``, ``training``, ``stopped``, ``trained`` or ``finished``) and what goes with it.

    ``step`` of ``planned`` ones, ``seconds_left`` while it trains, the last ``metrics``, the ``checkpoint`` that it would go on
    from, and a beat of each worker of the last start. Nothing tells a run that measures a model from one that was killed then.

    Raises UserError where no run is, but a sweep or a study of several, or nothing.
    """
    directory = RunDirectory(run)
    for what, inside in (("sweep", "trials"), ("study", "cells")):
        if (run / f"{what}.json").is_file():
            raise UserError(f"{run}: is a {what}, and its runs are in {run / inside}: ask of one of those")
    if not directory.holds_a_run:
        raise UserError(f"{run}: holds no run (a run directory has a recipe.yaml)")
    stage, beats = directory.stage(), directory.heartbeats()
    records = directory.read_metrics() if directory.metrics_file.exists() else []
    steps = [record for record in records if "step_seconds" in record]
    done = int(steps[-1]["step"]) if steps else 0
    alive = bool(beats) and directory.seconds_since_heartbeat() <= MISSED_BEATS * beats[0].every
    state = "stopped"
    if directory.result.exists():
        state = "finished"
    elif stage.ended is not None:
        state = "trained"
    elif stage.began is None:
        state = "measuring"
    elif alive:
        state = "training"
    return {
        "run": str(run),
        "state": state,
        "step": done,
        "planned": stage.planned,
        "ended": stage.why,
        "seconds_left": _left(steps, stage.planned) if state == "training" else None,
        "metrics": directory.trained_metrics() if records else {},
        "checkpoint": next(iter(CheckpointStore(directory.checkpoints(directory.read_recipe())).steps()), None),
        "workers": [asdict(beat) for beat in beats] if state in ("training", "stopped") else [],
    }


def _left(steps: list[Metrics], planned: int | None) -> float | None:
    if not steps or planned is None:
        return None
    each = statistics.median(record["step_seconds"] for record in steps[-RECENT:])
    return float((planned - int(steps[-1]["step"])) * each)


SHOWN = ("loss", "divergence", "reward/margin", "reward/accuracy", "eval/loss", "tokens_per_second", "refused_steps")
NEXT = {
    "measuring": "the model is measured before it is trained, or the command was stopped then: --resume goes on",
    "training": "",
    "stopped": "raydiv train RECIPE --resume goes on",
    "trained": "the model is written and is measured, or the command was stopped then: --resume goes on",
    "finished": "",
}
"""What a state means for who asks."""


def status_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say, line by line."""
    of = f" of {found['planned']}" if found["planned"] else ""
    left = f", about {found['seconds_left'] / 60:.0f} min left" if found["seconds_left"] is not None else ""
    why = f" ({found['ended']})" if found["ended"] else ""
    lines = [
        ("run", found["run"]),
        ("state", f"{found['state']}{why}"),
        ("step", f"{found['step']}{of}{left}"),
        *((name, f"{found['metrics'][name]:.4g}") for name in SHOWN if name in found["metrics"]),
    ]
    if found["checkpoint"] is not None:
        lines.append(("checkpoint", f"after step {found['checkpoint']}"))
    lines += [("", Heartbeat(**beat).place) for beat in found["workers"]]
    return [*lines, *([("next", NEXT[found["state"]])] if NEXT[found["state"]] else [])]
