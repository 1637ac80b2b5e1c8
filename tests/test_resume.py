"""Invariant 3: killed at any step and resumed, a run ends as if it had never stopped. Real processes, real SIGKILL."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cloudpickle
import numpy as np
import pytest
from ranks import run_on_ranks
from safetensors.numpy import load_file
from small_run import recipe_of, write_files

from raydiv.config import Recipe
from raydiv.preparation import fill, read
from raydiv.progress import Display
from raydiv.run import Metrics, RunDirectory
from raydiv.session import ray_session
from raydiv.training.worker import WorkerInput, run_worker

STEPS = 9
TIMED = {"tokens_per_second", "step_seconds", "data_seconds", "peak_memory_bytes"}
"""What a run that is made again does not repeat."""


@dataclass(frozen=True)
class Death:
    """A SIGKILL of one rank: at the ``when`` of step ``step``, or while its ``step``-th checkpoint is written."""

    rank: int
    step: int
    when: str


def local_steps(feed: Any, again: Any, start: int, stop: int) -> Iterator[Any]:
    """The stream without Ray Data's tasks."""
    for number in range(start, stop):
        plan = feed.plan.step(number)
        yield plan, feed.step(plan, feed.read(number))


def live(pickled: bytes, death: Death | None) -> int:
    """A worker's life; runs on every rank. Returns the step that it began after."""
    import cloudpickle

    import raydiv.checkpoint.shards as shards
    import raydiv.training.step as steps
    import raydiv.training.worker as worker
    from raydiv import dist

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    step, written, begun = steps.Stepper.step, shards._sha256, []
    if death is not None and dist.rank() == death.rank:

        def mortal(self: Any, chosen: Any, lr: float) -> dict[str, float]:
            if death.when == "start" and chosen.number == death.step:
                die()
            metrics = step(self, chosen, lr)
            if death.when == "end" and chosen.number == death.step:
                die()
            return metrics

        def half_written(path: Path) -> str:
            begun.append(path)
            if death.when == "checkpoint" and len(begun) == death.step:
                path.write_bytes(path.read_bytes()[:100])
                die()
            return written(path)

        steps.Stepper.step = mortal  # type: ignore[method-assign]
        shards._sha256 = half_written
    behind = []
    go_on = worker._go_on

    def noted(*arguments: Any) -> Any:
        found = go_on(*arguments)
        behind.append(found[0])
        return found

    with patch.object(worker, "stream_steps", local_steps), patch.object(worker, "_go_on", noted):
        run_worker(cloudpickle.loads(pickled), None)
    return int(behind[0])


def prepared(recipe: Recipe) -> WorkerInput:
    """What a run's workers are given, its directory claimed."""
    opened = read(recipe, Display(quiet=True))
    with ray_session(recipe.cluster):
        ready = fill(recipe, opened, Display(quiet=True))
    run = RunDirectory.of(recipe)
    run.claim(recipe, ready.fingerprints)
    run.note_began()
    return WorkerInput(recipe, ready.directory, run.path, ready.train, ready.eval)


def again(given: WorkerInput, name: str) -> WorkerInput:
    """The same run under another name."""
    recipe = given.recipe.model_copy(update={"name": name})
    run = RunDirectory.of(recipe)
    run.claim(recipe, {})
    run.note_began()
    return WorkerInput(recipe, given.model_directory, run.path, given.train, given.eval)


def weights(run: RunDirectory) -> dict[str, np.ndarray]:
    (file,) = run.model.glob("*.safetensors")
    return dict(load_file(file))


def untimed(run: RunDirectory) -> list[Metrics]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in run.metrics()]


def assert_same_run(found: RunDirectory, expected: RunDirectory) -> None:
    """Bitwise the same weights, and the same lines of metrics: no gap, no repeat."""
    assert untimed(found) == untimed(expected)
    mine, others = weights(found), weights(expected)
    assert mine.keys() == others.keys()
    assert all(np.array_equal(mine[name], others[name]) for name in mine)


VARIANTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "everything under kldo's moving average": (
        2,
        ("engine.zero_stage=3", "loss.skew=0", "loss.estimator=ema", "evaluate.every=2"),
    ),
    "adapters with dropout under kto": (
        2,
        ("engine.zero_stage=3", "model.lora={r: 4, dropout: 0.2}", "loss={type: kto}", "optim.schedule=linear"),
    ),
    "everything on one worker under bco": (1, ("engine.zero_stage=0", "loss={type: bco}")),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_any_step_it_ends_as_if_it_never_was(variant: str, tiny_model: Path, tmp_path: Path) -> None:
    ranks, overrides = VARIANTS[variant]
    overrides = (f"cluster.num_workers={ranks}", f"optim.steps={STEPS}", "checkpoint.every=2", *overrides)
    given = prepared(recipe_of(tiny_model, write_files(tmp_path), tmp_path / "runs", "whole", *overrides))
    assert run_on_ranks(live, ranks, tmp_path / "whole", cloudpickle.dumps(given), None) == [0] * ranks
    random = np.random.default_rng([ranks, len(variant)])
    for life in range(2):
        mortal = again(given, f"mortal{life}")
        run = RunDirectory.of(mortal.recipe)
        # one death for each way to die, at random steps and ranks
        kinds = random.permutation(["start", "end", "checkpoint"])
        for number, when in enumerate(kinds):
            last = 2 if when == "checkpoint" else STEPS
            death = Death(int(random.integers(ranks)), int(random.integers(1 if when == "checkpoint" else 0, last)), when)
            before = set(run.checkpoints(mortal.recipe).folders())
            try:
                run_on_ranks(live, ranks, tmp_path / f"{life}{number}", cloudpickle.dumps(mortal), death)
            except Exception as error:
                assert "SIGKILL" in str(error) or "Connection" in str(error) or "terminated" in str(error), error
            else:  # it had passed that step already
                assert run.stage().ended is not None or before
        if run.stage().ended is None:
            run_on_ranks(live, ranks, tmp_path / f"{life}last", cloudpickle.dumps(mortal), None)
        assert_same_run(run, RunDirectory.of(given.recipe))
