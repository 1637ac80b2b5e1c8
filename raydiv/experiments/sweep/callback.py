"""The callback that keeps a sweep's record while Ray Tune runs its trials."""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Callback

from raydiv.experiments.sweep.record import ENDED, FAILED, FINISHED, RUNNING, STOPPED, SweepRecord, TrialRecord
from raydiv.experiments.sweep.trial import ERROR
from raydiv.runs.progress import Update


class SweepCallback(Callback):  # type: ignore[misc]
    """Updates the record, and removes the weights of ended trials but the ``keep`` best; ``count`` is of all trials."""

    def __init__(self, record: SweepRecord, keep: int, count: int, update: Update) -> None:
        self._record, self._keep, self._count, self._update = record, keep, count, update
        self._started: dict[int, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune saves its callbacks, but a sweep resumes from its own record."""
        return {}

    def _record_of(self, tune_trial: Any) -> TrialRecord:
        """The record of a trial of Tune's; a trial that fails before it starts has none yet."""
        number = int(tune_trial.config["number"])
        return self._record.trials.setdefault(number, TrialRecord(number, dict(tune_trial.config["values"])))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._record_of(trial)
        if record.status not in ENDED:
            record.status = RUNNING
            self._started[record.number] = time.monotonic()
        self._write()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial that the scheduler stopped has no result."""
        record = self._record_of(trial)
        self._end(record, FINISHED if self._record.directory.run(record).result.is_file() else STOPPED)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._record_of(trial)
        file = self._record.directory.run(record).path / ERROR
        lines = str(trial.get_error()).strip().splitlines() or ["its process ended"]
        self._end(record, FAILED, record.error or (file.read_text() if file.is_file() else lines[-1]))

    def _end(self, trial: TrialRecord, status: str, error: str | None = None) -> None:
        started = self._started.pop(trial.number, None)
        trial.seconds = trial.seconds if started is None else round(time.monotonic() - started, 1)
        self._record.end_trial(trial, status, error)
        self._record.remove_weights(self._keep)
        self._write()

    def _write(self) -> None:
        self._record.write()
        ended = sum(trial.status in ENDED for trial in self._record.trials.values())
        best, metric = self._record.best, self._record.objectives[0].metric
        self._update(ended, self._count, f"best {metric} {best[0].metrics[metric]:.4g}" if best else "")
