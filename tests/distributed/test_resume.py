"""Invariant 3: a run that is killed at any step and resumed ends as one that never stopped. Real SIGKILLs."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cloudpickle
import numpy as np
import pytest
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from helpers.ranks import run_on_ranks
from helpers.runs import assert_same_run, untimed, weights
from helpers.small_run import recipe_of, write_files
from helpers.worker_alone import prepared
from raydiv.runs.directory import RunDirectory
from raydiv.training.worker import TrainTask, run_worker

STEPS = 9


@dataclass(frozen=True)
class Death:
    """A SIGKILL of one rank: at the ``when`` of step ``step``, or while its ``step``-th checkpoint is written."""

    rank: int
    step: int
    when: str


def worker_life(pickled: bytes, death: Death | None) -> int:
    """Run a worker until it ends or dies; runs on every rank. Returns the number of steps before its start."""
    import cloudpickle

    import raydiv.training.checkpoint.shards as shards
    import raydiv.training.step as steps
    import raydiv.training.worker as worker
    from raydiv.utils import distributed as dist

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    step, write, begun = steps.Stepper.step, shards._write_safetensors, []
    if death is not None and dist.rank() == death.rank:

        def step_or_die(self: Any, rank_step: Any, lr: float) -> dict[str, float]:
            if death.when == "start" and rank_step.number == death.step:
                die()
            metrics = step(self, rank_step, lr)
            if death.when == "end" and rank_step.number == death.step:
                die()
            return metrics

        def write_half_and_die(path: Path, tensors: Any) -> tuple[int, str]:
            begun.append(path)
            written = write(path, tensors)
            if death.when == "checkpoint" and len(begun) == death.step:
                path.write_bytes(path.read_bytes()[:100])
                die()
            return written

        steps.Stepper.step = step_or_die  # type: ignore[method-assign]
        shards._write_safetensors = write_half_and_die
    behind = []
    resume = worker._resume

    def record_behind(*arguments: Any) -> Any:
        result = resume(*arguments)
        behind.append(result[0])
        return result

    with patch.object(worker, "_resume", record_behind):
        run_worker(cloudpickle.loads(pickled), None)
    return int(behind[0])


def renamed(task: TrainTask, name: str) -> TrainTask:
    """The same run under another name."""
    recipe = task.recipe.model_copy(update={"name": name})
    run = RunDirectory.of(recipe)
    run.create(recipe, {})
    run.stage.training_started(recipe.optim.steps or 0)
    return TrainTask(recipe, task.model_directory, run.path, 0, task.train, task.eval)


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


def run_workers(task: TrainTask, ranks: int, folder: Path, death: Death | None = None) -> list[int] | None:
    """The number of steps before each rank's start; None where a rank died."""
    try:
        return run_on_ranks(worker_life, ranks, folder, cloudpickle.dumps(task), death)
    except (ProcessExitedException, ProcessRaisedException):  # of the rank that died, or of one that waited for it
        assert death is not None
        return None


def run_with_deaths(task: TrainTask, ranks: int, folder: Path, deaths: Sequence[Death]) -> RunDirectory:
    """A run that suffers each death in turn, and then ends."""
    run = RunDirectory.of(task.recipe)
    for number, death in enumerate([*deaths, None]):
        if run.stage.read().metrics_bytes_at_end is None:
            run_workers(task, ranks, folder / str(number), death)
    assert run.stage.read().metrics_bytes_at_end is not None
    return run


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_ends_as_one_that_was_never_killed(variant: str, tiny_model: Path, tmp_path: Path) -> None:
    ranks, overrides = VARIANTS[variant]
    overrides = (f"cluster.num_workers={ranks}", f"optim.steps={STEPS}", "checkpoint.every=2", *overrides)
    task = prepared(recipe_of(tiny_model, write_files(tmp_path), tmp_path / "runs", "whole", *overrides))
    assert run_workers(task, ranks, tmp_path / "whole") == [0] * ranks
    random = np.random.default_rng([ranks, len(variant)])
    for life in range(2):
        # one death of each kind, at random steps and ranks
        kinds = random.permutation(["start", "end", "checkpoint"])
        most = {"start": STEPS, "end": STEPS, "checkpoint": 2}
        deaths = [Death(int(random.integers(ranks)), 1 + int(random.integers(most[kind] - 1)), kind) for kind in kinds]
        folder = tmp_path / f"life{life}"
        folder.mkdir()
        assert_same_run(
            run_with_deaths(renamed(task, f"killed{life}"), ranks, folder, deaths), RunDirectory.of(task.recipe)
        )


@pytest.mark.long
def test_a_run_resumes_with_other_numbers_of_workers(tiny_model: Path, tmp_path: Path) -> None:
    """Two workers die, one resumes and dies, four end the run: its curve is that of an uninterrupted run."""
    overrides = (
        f"optim.steps={STEPS}",
        "checkpoint.every=2",
        "engine.zero_stage=3",
        "loss.skew=0",
        "loss.estimator=ema",
    )
    task = prepared(recipe_of(tiny_model, write_files(tmp_path), tmp_path / "runs", "whole", *overrides))
    assert run_workers(task, 2, tmp_path / "whole") == [0, 0]
    killed = renamed(task, "killed")
    run, whole = RunDirectory.of(killed.recipe), RunDirectory.of(task.recipe)
    assert run_workers(killed, 2, tmp_path / "two", Death(1, 3, "start")) is None
    assert run_workers(killed, 1, tmp_path / "one", Death(0, 7, "start")) is None
    # the single worker resumed from the second checkpoint and wrote a third
    assert run_workers(killed, 4, tmp_path / "four") == [6, 6, 6, 6]
    metrics, expected = run.metrics.read(), whole.metrics.read()
    assert [line["step"] for line in metrics] == [line["step"] for line in expected]
    for line, other in zip(metrics, expected, strict=True):
        if "loss" in line:
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-5), line["step"]
    resumed, uninterrupted = weights(run), weights(whole)
    assert all(
        np.abs(resumed[name] - uninterrupted[name]).max() <= 1e-3 * np.abs(uninterrupted[name]).max()
        for name in uninterrupted
    )
    # the two steps before the first death are the same to the bit
    assert untimed(run)[: untimed(whole).index(next(line for line in untimed(whole) if line["step"] == 3))] == [
        line for line in untimed(whole) if line["step"] < 3
    ]
