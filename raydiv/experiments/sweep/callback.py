"""What is written down as Ray Tune's trials come and go."""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Callback

from raydiv.experiments.sweep.record import FAILED, FINISHED, OVER, RUNNING, STOPPED, SweepRecord, TrialRecord
from raydiv.experiments.sweep.trial import ERROR
from raydiv.runs.progress import Update


class SweepCallback(Callback):  # type: ignore[misc]
    """Keeps the record, and the disk: of trials that are over only the ``keep`` best have their weights."""

    def __init__(self, record: SweepRecord, keep: int, count: int, update: Update) -> None:
        self._record, self._keep, self._count, self._update = record, keep, count, update
        self._started: dict[int, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune keeps copies of what it is given, and a sweep goes on from its own record."""
        return {}

    def _mine(self, trial: Any) -> TrialRecord:
        """A trial of Tune's in the record; one that fails before it starts is new here."""
        number = int(trial.config["number"])
        return self._record.trials.setdefault(number, TrialRecord(number, dict(trial.config["values"])))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine = self._mine(trial)
        if mine.status not in OVER:
            mine.status = RUNNING
            self._started[mine.number] = time.monotonic()
        self._note()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Of a trial that was stopped no run is finished."""
        mine = self._mine(trial)
        self._over(mine, FINISHED if self._record.directory.run(mine).result.is_file() else STOPPED)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine = self._mine(trial)
        said = self._record.directory.run(mine).path / ERROR
        lines = str(trial.get_error()).strip().splitlines() or ["its process ended"]
        self._over(mine, FAILED, mine.error or (said.read_text() if said.is_file() else lines[-1]))

    def _over(self, trial: TrialRecord, status: str, error: str | None = None) -> None:
        started = self._started.pop(trial.number, None)
        trial.seconds = trial.seconds if started is None else round(time.monotonic() - started, 1)
        self._record.settle(trial, status, error)
        self._record.forget_weights(self._keep)
        self._note()

    def _note(self) -> None:
        self._record.write()
        over = sum(trial.status in OVER for trial in self._record.trials.values())
        best, first = self._record.best, self._record.objectives[0].metric
        self._update(over, self._count, f"best {first} {best[0].metrics[first]:.4g}" if best else "")
