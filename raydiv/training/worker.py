"""The training loop of one worker: it reads as prose, and everything in it happens alike on all ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from raydiv import dist
from raydiv.config import Recipe
from raydiv.data.plan import Epochs
from raydiv.data.tokens import TokenizedExamples
from raydiv.model.export import write_model
from raydiv.run import Metrics, RunDirectory
from raydiv.training.coefficients import judge
from raydiv.training.metrics import RunningMeans, estimate_facts, step_record
from raydiv.training.schedule import learning_rate
from raydiv.training.step import StepExamples, Stepper

if TYPE_CHECKING:
    from raydiv.engine import Engine


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Examples with the reference log-probs of each, and KTO's mismatched ones row by row, where the loss wants them."""

    examples: TokenizedExamples
    reference_logps: np.ndarray | None
    mismatched: TokenizedExamples | None = None
    mismatched_reference_logps: np.ndarray | None = None

    def select(self, number: int, rows: np.ndarray) -> StepExamples:
        """The examples of a step."""
        reference, others = self.reference_logps, self.mismatched
        others_reference = np.zeros(len(self.examples), np.float32)
        if self.mismatched_reference_logps is not None:
            others_reference = self.mismatched_reference_logps
        return StepExamples(
            number,
            self.examples.select(rows),
            self.examples.select([]) if others is None else others.select(rows),
            None if reference is None else torch.from_numpy(reference[rows]),
            torch.zeros(0) if others is None else torch.from_numpy(others_reference[rows]),
        )


@dataclass(frozen=True, slots=True)
class WorkerInput:
    """All that a worker is given; ``run_directory`` is on storage that the driver sees too."""

    recipe: Recipe
    model_directory: Path
    run_directory: Path
    train: ExampleSet
    eval: ExampleSet | None


def total_steps(recipe: Recipe, epochs: Epochs) -> int:
    """Optimizer updates of the run."""
    if recipe.optim.steps is not None:
        return recipe.optim.steps
    assert recipe.optim.epochs is not None
    return max(1, round(recipe.optim.epochs * epochs.steps_per_epoch))


def epochs_of(recipe: Recipe, examples: TokenizedExamples) -> Epochs:
    return Epochs(examples.units, recipe.batch.examples, recipe.seed, examples.fingerprint)


def run_worker(given: WorkerInput) -> None:
    """Train, log and save. Runs in every Ray Train worker, in the process group that Ray Train made."""
    from raydiv.engine import Engine
    from raydiv.model.head import LogProbHead
    from raydiv.model.load import DTYPES, build_policy
    from raydiv.model.quiet import quiet

    recipe, run = given.recipe, RunDirectory(given.run_directory)
    quiet()
    torch.manual_seed(recipe.seed)
    dtype = DTYPES[recipe.engine.precision]
    engine = Engine(recipe, lambda: build_policy(given.model_directory, recipe.model, dtype))
    head = LogProbHead(engine.model)
    head.check(engine, engine.device)
    stepper = Stepper(engine, head, recipe.loss.terms, recipe.batch.tokens_per_microbatch, recipe.seed)
    epochs = epochs_of(recipe, given.train.examples)
    steps = total_steps(recipe, epochs)
    means, facts = RunningMeans(), estimate_facts(recipe.loss.terms[0])
    _log(run, _held_out(stepper, given, step=0))
    for number in range(steps):
        started = time.perf_counter()
        plan = epochs.step(number)
        chosen = given.train.select(number, plan.rows)
        lr = learning_rate(recipe.optim, number, steps)
        metrics = stepper.step(chosen, lr)
        metrics |= means.update(metrics) | facts
        _log(run, step_record(plan, chosen.examples, metrics, lr, time.perf_counter() - started))
        last = number + 1 == steps or reached(recipe.optim.target_margin, metrics)
        if last or (recipe.evaluate.every and (number + 1) % recipe.evaluate.every == 0):
            _log(run, _held_out(stepper, given, step=number + 1))
        if last:
            break
    head.remove()
    _save(engine, given, run)


def reached(target_margin: float | None, metrics: dict[str, float]) -> bool:
    """Whether the running reward margin is where the recipe wants training to stop."""
    return target_margin is not None and metrics.get("reward/margin/ema", 0.0) >= target_margin


def _log(run: RunDirectory, record: Metrics) -> None:
    """Metrics are the same on every rank; one writes them."""
    if dist.rank() == 0:
        run.log(record)


def _held_out(stepper: Stepper, given: WorkerInput, step: int) -> dict[str, float]:
    """Loss, divergence and rewards on the held-out examples, as ``eval/*``; empty without any. Changes no state."""
    if given.eval is None:
        return {}
    everything = np.arange(len(given.eval.examples))
    batch = stepper.score(given.eval.select(step, everything))
    metrics = judge(stepper.terms, stepper.states, batch).metrics
    # the held-out set is judged as one more step would be, and the state after it thrown away
    return {"step": step} | {f"eval/{name}": number for name, number in metrics.items()}


def _save(engine: Engine, given: WorkerInput, run: RunDirectory) -> None:
    """Gather the trained weights and write them as a Hugging Face directory: the whole model, or the adapters."""
    adapters = given.recipe.model.lora is not None
    state: dict[str, torch.Tensor] = {}
    for name, weight in engine.weights(trainable_only=adapters):
        if dist.rank() == 0:
            state[name] = weight
    if dist.rank() == 0:
        write_model(engine.model, state, given.model_directory, given.recipe, run.model)
    dist.barrier()


def worker_entry(config: dict[str, Any]) -> None:
    """What Ray Train calls in each worker."""
    import ray

    torch.set_num_threads(int(config["threads"]))
    run_worker(ray.get(config["given"]))
