"""``raydiv status``: where a run stands, by nothing but its directory."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.heartbeats import BEAT, beats
from helpers.made_run import make_run
from helpers.small_run import recipe_of
from raydiv.cli import main
from raydiv.commands.status import status, status_lines
from raydiv.config.cluster import ClusterConfig
from raydiv.runs.directory import RunDirectory
from raydiv.runtime.wait_for_nodes import report_waiting
from raydiv.training.checkpoint.manifest import CheckpointStore, Manifest
from raydiv.utils.errors import UserError

FILES = {"train": "t", "eval": "e"}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has measured its model, and is about to train for ten steps."""
    recipe = recipe_of(tmp_path / "m", FILES, tmp_path, "run", "optim.steps=10")
    found = RunDirectory.of(recipe)
    found.create(recipe, {})
    found.clear_heartbeats()
    found.log_metrics({"step": 0, "separation/d_b": 1.0})
    return found


def trains(run: RunDirectory, steps: int) -> None:
    run.training_started(10)
    for step in range(1, steps + 1):
        run.log_metrics({"step": step, "loss": 1 / step, "step_seconds": 6.0})
    for beat in beats({"idle": 0.5}, {"idle": 0.7}):
        run.write_heartbeat(beat)
    checkpoints = CheckpointStore(run.checkpoints(run.read_recipe()))
    checkpoints.commit(Manifest(2, 2, 2, {}, {}, None, []))


def text(found: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {said}" for name, said in status_lines(found))


def test_a_run_that_trains(run: RunDirectory) -> None:
    assert status(run.path)["state"] == "measuring"
    trains(run, 4)
    found = status(run.path)
    assert {key: found[key] for key in ("state", "step", "planned", "seconds_left", "checkpoint")} == {
        "state": "training",
        "step": 4,
        "planned": 10,
        "seconds_left": 36.0,
        "checkpoint": 2,
    }
    assert found["metrics"]["loss"] == 0.25
    assert [beat["idle"] for beat in found["workers"]] == [0.5, 0.7]
    assert "step: 4 of 10, about 1 min left" in text(found)
    assert "worker 1 (a, process 7): score of step 6" in text(found)


def test_one_whose_workers_say_nothing_any_more_is_stopped(run: RunDirectory) -> None:
    trains(run, 4)
    for path in (run.path / "workers").iterdir():
        os.utime(path, (1, time.time() - 4 * BEAT.every))
    found = status(run.path)
    assert found["state"] == "stopped"
    assert found["seconds_left"] is None
    assert "checkpoint: after step 2" in text(found)
    assert "--resume goes on" in text(found)


def test_training_that_waits_for_nodes_says_so_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has workers and room, loses both, gets room again, and loses it again."""
    looks = iter([(0.0, None), (99.0, None), *[(99.0, "no room")] * 3, (99.0, None), *[(99.0, "no room")] * 2])
    now: list[Any] = [None, None]
    over = threading.Event()

    def since_beat(_: RunDirectory) -> float:
        try:
            now[:] = next(looks)
        except StopIteration:
            over.set()
        return float(now[0])

    monkeypatch.setattr("raydiv.runtime.wait_for_nodes.EVERY_S", 0.001)
    monkeypatch.setattr(RunDirectory, "seconds_since_heartbeat", since_beat)
    monkeypatch.setattr("raydiv.runtime.wait_for_nodes.lack_of_workers", lambda cluster: now[1])
    said: list[str] = []
    with report_waiting(run.seconds_since_heartbeat, ClusterConfig(), said.append):
        assert over.wait(60)
    assert said == ["the workers are gone, and training waits for nodes: no room"] * 2


def test_one_whose_model_is_written_and_one_that_is_over(run: RunDirectory, tmp_path: Path) -> None:
    trains(run, 10)
    run.training_ended("all steps are done")
    assert status(run.path)["state"] == "trained"
    run.result.write_text("{}")
    assert "finished (all steps are done)" in text(status(run.path))


def test_the_command_prints_it_and_says_where_no_run_is(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "measuring"
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no stage\.json"):
        status(make_run(tmp_path).path)
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a sweep, and its runs are in .*/trials"):
        status(tmp_path / "many")
