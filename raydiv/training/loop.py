"""The training loop of one worker. All ranks run it in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from raydiv.config import Recipe
from raydiv.data.tokens import StoredExamples
from raydiv.runs.directory import RunDirectory
from raydiv.runs.metrics_log import Metrics
from raydiv.training.checkpoint.manager import CheckpointManager
from raydiv.training.coefficients import NotFiniteError
from raydiv.training.depth_probe import DepthMeasurement
from raydiv.training.held_out import HeldOutEvaluation
from raydiv.training.metrics import estimate_facts, log_metrics, step_record
from raydiv.training.profiler import StepProfiler
from raydiv.training.schedule import learning_rate
from raydiv.training.separation_probe import SeparationMeasurement
from raydiv.training.state import TrainState
from raydiv.training.step import RankStep, Stepper
from raydiv.training.utilisation import Utilisation
from raydiv.utils import distributed as dist

NAMED_EXAMPLES = 10
"""Examples of a refused step that its event names."""


@dataclass(frozen=True, slots=True)
class TrainingLoop:
    """Trains step by step, and calls what follows a step: profiler, separation, depth, held-out evaluation,
    checkpoints.
    """

    updates: Updates
    state: TrainState
    profiler: StepProfiler
    separation: SeparationMeasurement
    depth: DepthMeasurement
    held_out: HeldOutEvaluation
    checkpoints: CheckpointManager

    def train(self, steps: Iterator[RankStep]) -> bool:
        """Train until there is a reason to end, which is then in ``state.ended``.

        Returns True instead where the run was asked to stop, after a checkpoint.
        """
        for step in steps:
            done = step.number + 1
            self.profiler.before_step(done)
            metrics = self.updates.make(step)
            self.state.end_reason = self.updates.reason_to_end(done, metrics)
            self.profiler.after_step(done, last=self.state.end_reason is not None)
            metrics |= self.separation.after_step(done, self.state)
            metrics |= self.depth.after_step(done, self.state)
            metrics |= self.held_out.after_step(done, self.state)
            self.updates.stepper.timer.enter("checkpoint")
            if self.checkpoints.after_step(done, self._carried, metrics, last=self.state.end_reason is not None):
                return True
            if self.state.end_reason is not None:
                break
        return False

    def _carried(self) -> dict[str, object]:
        """What a checkpoint holds of the loop."""
        return self.state.as_json(self.updates.stepper.states, self.updates.run.metrics.size)


@dataclass(frozen=True, slots=True)
class Updates:
    """Makes the updates of a run of ``steps`` steps and logs their metrics; a step that is not finite is left out."""

    recipe: Recipe
    run: RunDirectory
    stepper: Stepper
    state: TrainState
    examples: StoredExamples
    steps: int
    utilisation: Utilisation | None = None

    def make(self, step: RankStep) -> Metrics:
        """Make and log one update; returns its metrics. Raises FloatingPointError as ``attempt`` does."""
        lr = learning_rate(self.recipe.optim, step.number, self.steps)
        metrics: Metrics = self.attempt(step, lr)
        metrics |= self.state.means.update(metrics) | estimate_facts(self.recipe.loss)
        timer = self.stepper.timer
        timer.enter("log")
        log_metrics(self.run, step_record(step.plan, sum(step.examples.lengths), metrics, lr, timer, self.utilisation))
        return metrics

    def attempt(self, step: RankStep, lr: float) -> dict[str, float]:
        """The metrics of an update. A step that is not finite is refused: it changes nothing and is counted.

        Raises FloatingPointError after more than ``optim.max_refused`` refusals, or where the last step is refused,
        since no further step would show that the model is still sound.
        """
        counted = {"refused_steps": float(self.state.refused)} if self.state.refused else {}
        try:
            return self.stepper.step(step, lr) | counted
        except NotFiniteError as error:
            self.state.refused += 1
            done, most = step.number + 1, self.recipe.optim.max_refused
            if dist.rank() == 0:
                rows = step.plan.rows[error.positions[:NAMED_EXAMPLES]]
                self.run.events.log(f"step {done}: not applied: {error}", self.examples.places(rows))
            if self.state.refused > most:
                raise FloatingPointError(
                    f"step {done}: not applied: {error}; more than optim.max_refused: {most}"
                ) from None
            if done == self.steps:
                raise FloatingPointError(f"step {done}: not applied: {error}; it is the last step") from None
            return {"refused_steps": float(self.state.refused)}

    def reason_to_end(self, done: int, metrics: Metrics) -> str | None:
        """Why training ends after ``done`` steps, if it does."""
        if done == self.steps:
            return "all steps are done"
        target = self.recipe.optim.target_margin
        if target is not None and metrics.get("reward/margin/ema", 0.0) >= target:
            return "the margin is at optim.target_margin"
        return None
