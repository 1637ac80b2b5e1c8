"""Invariant 3: killed at any step and resumed, a run ends as if it had never stopped. Real processes, real SIGKILL."""

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
from helpers.worker_alone import prepared, without_tasks
from raydiv.runs.directory import RunDirectory
from raydiv.training.worker import TrainTask, run_worker

STEPS = 9


@dataclass(frozen=True)
class Death:
    """A SIGKILL of one rank: at the ``when`` of step ``step``, or while its ``step``-th checkpoint is written."""

    rank: int
    step: int
    when: str


def live(pickled: bytes, death: Death | None) -> int:
    """A worker's life; runs on every rank. Returns the step that it began after."""
    import cloudpickle

    import raydiv.training.checkpoint.shards as shards
    import raydiv.training.step as steps
    import raydiv.training.worker as worker
    from raydiv.utils import distributed as dist

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    step, written, begun = steps.Stepper.step, shards.sha256_of, []
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
        shards.sha256_of = half_written
    behind = []
    go_on = worker._resume

    def noted(*arguments: Any) -> Any:
        found = go_on(*arguments)
        behind.append(found[0])
        return found

    with without_tasks(), patch.object(worker, "_resume", noted):
        run_worker(cloudpickle.loads(pickled), None)
    return int(behind[0])


def again(given: TrainTask, name: str) -> TrainTask:
    """The same run under another name."""
    recipe = given.recipe.model_copy(update={"name": name})
    run = RunDirectory.of(recipe)
    run.create(recipe, {})
    run.stage.training_started(recipe.optim.steps or 0)
    return TrainTask(recipe, given.model_directory, run.path, 0, given.train, given.eval)


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


def lives(given: TrainTask, ranks: int, folder: Path, death: Death | None = None) -> list[int] | None:
    """Where each rank began, or None when the death came."""
    try:
        return run_on_ranks(live, ranks, folder, cloudpickle.dumps(given), death)
    except (ProcessExitedException, ProcessRaisedException):  # the one that died, or one that waited for it
        assert death is not None
        return None


def died(given: TrainTask, ranks: int, folder: Path, deaths: Sequence[Death]) -> RunDirectory:
    """A run that dies of each in turn, and is then left to end."""
    run = RunDirectory.of(given.recipe)
    for number, death in enumerate([*deaths, None]):
        if run.stage.read().ended is None:
            lives(given, ranks, folder / str(number), death)
    assert run.stage.read().ended is not None
    return run


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_any_step_it_ends_as_if_it_never_was(variant: str, tiny_model: Path, tmp_path: Path) -> None:
    ranks, overrides = VARIANTS[variant]
    overrides = (f"cluster.num_workers={ranks}", f"optim.steps={STEPS}", "checkpoint.every=2", *overrides)
    given = prepared(recipe_of(tiny_model, write_files(tmp_path), tmp_path / "runs", "whole", *overrides))
    assert lives(given, ranks, tmp_path / "whole") == [0] * ranks
    random = np.random.default_rng([ranks, len(variant)])
    for life in range(2):
        # one death of each kind, at random steps and ranks
        kinds = random.permutation(["start", "end", "checkpoint"])
        most = {"start": STEPS, "end": STEPS, "checkpoint": 2}
        deaths = [Death(int(random.integers(ranks)), 1 + int(random.integers(most[kind] - 1)), kind) for kind in kinds]
        folder = tmp_path / f"life{life}"
        folder.mkdir()
        assert_same_run(died(again(given, f"mortal{life}"), ranks, folder, deaths), RunDirectory.of(given.recipe))


@pytest.mark.long
def test_a_run_goes_on_with_other_numbers_of_workers(tiny_model: Path, tmp_path: Path) -> None:
    """Two workers die, one goes on and dies, four end it: the curve is that of the run that nothing happened to."""
    overrides = (
        f"optim.steps={STEPS}",
        "checkpoint.every=2",
        "engine.zero_stage=3",
        "loss.skew=0",
        "loss.estimator=ema",
    )
    given = prepared(recipe_of(tiny_model, write_files(tmp_path), tmp_path / "runs", "whole", *overrides))
    assert lives(given, 2, tmp_path / "whole") == [0, 0]
    mortal = again(given, "mortal")
    run, whole = RunDirectory.of(mortal.recipe), RunDirectory.of(given.recipe)
    assert lives(mortal, 2, tmp_path / "two", Death(1, 3, "start")) is None
    assert lives(mortal, 1, tmp_path / "one", Death(0, 7, "start")) is None
    # the worker alone took the second checkpoint up, and left a third
    assert lives(mortal, 4, tmp_path / "four") == [6, 6, 6, 6]
    found, expected = run.metrics.read(), whole.metrics.read()
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        if "loss" in line:
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-5), line["step"]
    mine, others = weights(run), weights(whole)
    assert all(np.abs(mine[name] - others[name]).max() <= 1e-3 * np.abs(others[name]).max() for name in others)
    # the two before the first death are the same to the bit
    assert untimed(run)[: untimed(whole).index(next(line for line in untimed(whole) if line["step"] == 3))] == [
        line for line in untimed(whole) if line["step"] < 3
    ]
