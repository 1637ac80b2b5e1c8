"""Asynchronous successive halving (Li et al. 2018, arXiv 1810.05934), by optimizer updates."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler

TRAINED = "trained"
"""True in the report of a trial whose training has ended, after however many updates."""


class TrialASHA(AsyncHyperBandScheduler):  # type: ignore[misc]
    """Ray Tune's scheduler, which never stops a trial whose training has ended: its evaluation and export remain."""

    def __init__(self, metric: str, direction: str, steps: int, grace: int, reduction: int) -> None:
        self._steps = steps
        super().__init__(
            time_attr="step",
            metric=metric,
            mode=direction[:3],
            max_t=steps,
            grace_period=grace,
            reduction_factor=reduction,
            stop_last_trials=False,
        )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get(TRAINED) or result.get("step", 0) >= self._steps:
            return str(self.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))
