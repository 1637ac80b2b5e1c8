"""The training loop of one worker: it reads as prose, and everything in it happens alike on all ranks."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydiv import dist
from raydiv.config import Recipe
from raydiv.data.plan import Epochs, StepPlan
from raydiv.data.tokens import TokenizedExamples
from raydiv.train.step import StepExamples


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
    from raydiv.model.load import DTYPES, build_policy, quiet
    from raydiv.train.schedule import learning_rate
    from raydiv.train.step import Stepper

    recipe = given.recipe
    quiet()
    torch.manual_seed(recipe.seed)
    dtype = DTYPES[recipe.engine.precision]
    engine = Engine(recipe, lambda: build_policy(given.model_directory, recipe.model, dtype))
    head = LogProbHead(engine.model)
    head.check(engine, engine.device)
    stepper = Stepper(engine, head, recipe.loss.terms, recipe.batch.tokens_per_microbatch, recipe.seed)
    log = MetricsLog(given.run_directory / "metrics.jsonl")
    epochs = epochs_of(recipe, given.train.examples)
    steps = total_steps(recipe, epochs)
    log.write(_evaluation(stepper, given, step=0))
    for number in range(steps):
        started = time.perf_counter()
        plan = epochs.step(number)
        chosen = given.train.select(number, plan.rows)
        lr = learning_rate(recipe.optim, number, steps)
        metrics = stepper.step(chosen, lr)
        log.write(_step_record(plan, chosen, metrics, lr, time.perf_counter() - started))
        if recipe.evaluate.every and (number + 1) % recipe.evaluate.every == 0 and number + 1 < steps:
            log.write(_evaluation(stepper, given, step=number + 1))
    log.write(_evaluation(stepper, given, step=steps))
    save_policy(engine, head, given)


def _step_record(
    plan: StepPlan, chosen: StepExamples, metrics: dict[str, float], lr: float, seconds: float
) -> dict[str, float]:
    """A line of metrics.jsonl. ``tokens`` are real ones: padding, mismatched and dummy examples do not count."""
    tokens = sum(chosen.examples.lengths)
    return {
        "step": plan.step + 1,
        "epoch": plan.epoch,
        **metrics,
        "lr": lr,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "peak_memory_bytes": dist.max_over_ranks(_peak_memory()),
    }


def _evaluation(stepper: Any, given: WorkerInput, step: int) -> dict[str, float]:
    """Loss, divergence and rewards on the held-out examples, as ``eval/*``; empty without any. Changes no state."""
    from raydiv.train.judge import judge

    if given.eval is None:
        return {}
    everything = np.arange(len(given.eval.examples))
    batch = stepper.score(given.eval.select(step, everything))
    metrics = judge(stepper.terms, stepper.states, batch).metrics
    return {"step": step} | {f"eval/{name}": value for name, value in metrics.items()}


def _peak_memory() -> float:
    """Peak memory of this worker in bytes: the accelerator's where there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class MetricsLog:
    """metrics.jsonl, written by rank 0: the one record that progress, MLflow and the report are read from."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, record: dict[str, float]) -> None:
        if record and dist.rank() == 0:
            with self._path.open("a") as lines:
                lines.write(json.dumps(record) + "\n")


def save_policy(engine: Any, head: Any, given: WorkerInput) -> None:
    """Gather the trained weights and write them as a Hugging Face directory: the whole model, or the adapters."""
    head.remove()
    adapters = given.recipe.model.lora is not None
    state: dict[str, torch.Tensor] = {}
    for name, weight in engine.weights(trainable_only=adapters):
        if dist.rank() == 0:
            state[name] = weight
    if dist.rank() == 0:
        from raydiv.model.export import write_model

        write_model(engine.model, state, given.model_directory, given.recipe, given.run_directory / "model")
    dist.barrier()


def worker_entry(config: dict[str, Any]) -> None:
    """What Ray Train calls in each worker."""
    import ray

    torch.set_num_threads(int(config["threads"]))
    run_worker(ray.get(config["given"]))
