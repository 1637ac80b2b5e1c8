"""Evaluation on the held-out examples during training, and early stopping by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raydiv.config import Recipe
from raydiv.data.batching import SequentialPlan
from raydiv.losses import Batch, State, Term
from raydiv.runs.directory import RunDirectory
from raydiv.training.coefficients import NotFiniteError, evaluate_objective
from raydiv.training.dataloader import ExampleSet, RankShard, StepLoader, read_steps
from raydiv.training.metrics import log_metrics, rewards
from raydiv.training.schedule import is_due
from raydiv.training.state import TrainState
from raydiv.training.step import RankStep, Stepper, concatenate_batches, select_examples
from raydiv.utils import distributed as dist
from raydiv.utils.storage import write_json

EQUAL_SIZE = "eval/divergence/equal_size"

PART_EXAMPLES = 256
"""Held-out examples that are read and scored at a time."""


@dataclass(frozen=True, slots=True)
class HeldOutEvaluation:
    """Evaluates the loss on held-out ``examples``; without any it does nothing. All ranks must call its methods."""

    recipe: Recipe
    run: RunDirectory
    stepper: Stepper
    examples: ExampleSet | None

    def before_training(self) -> None:
        """Log the metrics of the policy as it starts: as its reference, whose log-probs are stored with most losses."""
        is_stored = self.recipe.loss.needs_reference and self.recipe.model.reference == "store"
        self._evaluate(0, self.stepper.score_at_start if is_stored else self.stepper.score)

    def evaluate(self, step: int) -> dict[str, float]:
        """Log and return loss, divergence and rewards as ``eval/*``, which leaves the running states as they were.

        Where the examples are of several sources, ``eval/SOURCE/*`` are those of each. Where there is a reference, each
        example's reward is written into the run. Values that are not finite make an event in place of metrics.
        """
        return self._evaluate(step, self.stepper.score)

    def _evaluate(self, step: int, score: Callable[[RankStep], Batch]) -> dict[str, float]:
        if self.examples is None:
            return {}
        self.stepper.timer.enter("evaluate")
        stored = self.examples.examples
        shard = RankShard(self.stepper.layout, dist.rank(), trains=False, scores=True)
        plan = SequentialPlan(stored.lengths, PART_EXAMPLES)
        steps = read_steps(StepLoader(self.examples, plan, shard), 0, plan.steps)
        batch = concatenate_batches([score(part) for part in steps], plan.order, stored.units)
        values = self._values(batch, "eval", step)
        if not values:
            return {}
        equal_size = divergence_of_groups(self.stepper.terms, self.stepper.states, batch, self.recipe.batch.examples)
        values |= {} if equal_size is None else {EQUAL_SIZE: equal_size}
        names = np.array(self.recipe.data.held_out_names)
        for name in dict.fromkeys(names.tolist()):
            rows = np.flatnonzero(names[stored.source] == name)
            if len(rows):  # a fraction of the prompts may leave a small source out
                values |= self._values(select_examples(batch, rows), f"eval/{name}", step)
        if dist.rank() == 0 and self.recipe.loss.needs_reference:
            reward = rewards(batch, self.stepper.terms[0].reward_scale)
            classes = {"aligned": batch.aligned, "unaligned": ~batch.aligned}
            write_json(self.run.rewards, {name: reward[mask].tolist() for name, mask in classes.items()})
        metrics = {"step": step} | values
        log_metrics(self.run, metrics)
        return metrics

    def _values(self, batch: Batch, prefix: str, step: int) -> dict[str, float]:
        """The metrics of a batch, by name after ``prefix``; none where they are not finite."""
        try:
            values = evaluate_objective(self.stepper.terms, self.stepper.states, batch).metrics
        except NotFiniteError as error:
            if dist.rank() == 0:
                self.run.events.log(f"step {step}: no {prefix}/* metrics of the held-out examples: {error}")
            return {}
        return {f"{prefix}/{name}": value for name, value in values.items()}

    def after_step(self, step: int, state: TrainState) -> dict[str, float]:
        """The metrics of an evaluation that is due after ``step``, or at the end of training; empty otherwise.

        Ends training where ``optim.early_stop`` says so.
        """
        if state.end_reason is None and not is_due(self.recipe.evaluate.every, step):
            return {}
        metrics = self.evaluate(step)
        early_stop = self.recipe.optim.early_stop
        if early_stop is None:
            return metrics
        if early_stop.metric not in metrics:
            self._log_missing(early_stop.metric, step)
        elif state.early_stopping.update(early_stop, metrics[early_stop.metric]) and state.end_reason is None:
            state.end_reason = (
                f"{early_stop.metric} was no better in {early_stop.patience} evaluations (optim.early_stop)"
            )
        return metrics

    def _log_missing(self, metric: str, step: int) -> None:
        if dist.rank() == 0:
            self.run.events.log(
                f"optim.early_stop.metric: {metric} has no value at step {step}; early stopping ignores this evaluation"
            )


def divergence_of_groups(terms: Sequence[Term], states: Sequence[State], batch: Batch, size: int) -> float | None:
    """The mean estimate over random groups of ``size`` examples, or of pairs with as many; None where there is none.

    An estimate by a logarithm of a mean over few examples is biased: that of a step more than that of all held-out
    examples, so that these two differ without over-fitting. Objectives on pairs estimate by means over pairs, which
    have no such bias. A group that lacks a class has no estimate.
    """
    if terms[0].divergence == "none" or terms[0].objective.data == "paired":
        return None
    units = batch.pairs.numpy() if len(batch.pairs) else np.arange(len(batch.logps))[:, None]
    order, found = np.random.default_rng(0).permutation(len(units)), []
    count = max(1, size // units.shape[1])
    for start in range(0, len(order) - count + 1, count):
        part = select_examples(batch, units[order[start : start + count]].ravel())
        if part.aligned.any() and not part.aligned.all():
            try:
                metrics = evaluate_objective(terms, states, part).metrics
            except NotFiniteError:
                return None
            found += [metrics["divergence"]] if "divergence" in metrics else []
    return float(np.mean(found)) if found else None
