"""``raydiv status``: the state of a run, read from its directory alone."""

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
from raydiv.commands import status as module
from raydiv.commands.status import status, status_lines
from raydiv.config.cluster import ClusterConfig
from raydiv.runs.directory import RunDirectory
from raydiv.runs.heartbeat import HeartbeatFolder
from raydiv.runtime.wait_for_nodes import report_waiting
from raydiv.training.checkpoint.manifest import CheckpointStore, Manifest
from raydiv.utils.claim import claim
from raydiv.utils.errors import UserError

FILES = {"train": "t", "eval": "e"}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run whose base model is evaluated, about to train for ten steps."""
    recipe = recipe_of(tmp_path / "m", FILES, tmp_path, "run", "optim.steps=10")
    run = RunDirectory.of(recipe)
    run.create(recipe, {})
    run.heartbeats.clear()
    run.metrics.append({"step": 0, "separation/d_b": 1.0})
    return run


def train_steps(run: RunDirectory, steps: int) -> None:
    run.stage.training_started(10)
    for step in range(1, steps + 1):
        run.metrics.append({"step": step, "loss": 1 / step, "step_seconds": 6.0})
    for beat in beats({"idle": 0.5}, {"idle": 0.7}):
        run.heartbeats.write(beat)
    checkpoints = CheckpointStore(run.checkpoints(run.read_recipe()))
    checkpoints.commit(Manifest(2, 2, 2, {}, {}, None, []))


def printed(report: dict[str, Any]) -> str:
    return "\n".join(f"{label}: {text}" for label, text in status_lines(report))


def test_a_run_in_training(run: RunDirectory) -> None:
    assert status(run.path)["state"] == "measuring"
    train_steps(run, 4)
    report = status(run.path)
    assert {key: report[key] for key in ("state", "step", "planned", "seconds_left", "checkpoint")} == {
        "state": "training",
        "step": 4,
        "planned": 10,
        "seconds_left": 36.0,
        "checkpoint": 2,
    }
    assert report["metrics"]["loss"] == 0.25
    assert [beat["idle"] for beat in report["workers"]] == [0.5, 0.7]
    assert "step: 4 of 10, about 1 min left" in printed(report)
    assert "rank 1 (a, pid 7), in score of step 6" in printed(report)


def test_a_run_without_heartbeats_is_stopped(run: RunDirectory) -> None:
    train_steps(run, 4)
    for path in (run.path / "workers").iterdir():
        os.utime(path, (1, time.time() - 4 * BEAT.every))
    report = status(run.path)
    assert report["state"] == "stopped"
    assert report["seconds_left"] is None
    assert "checkpoint: after step 2" in printed(report)
    assert "--resume" in printed(report)


def test_training_that_waits_for_nodes_is_reported_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run has workers and room, loses both, gets room again, and loses it again."""
    looks = iter([(0.0, None), (99.0, None), *[(99.0, "no room")] * 3, (99.0, None), *[(99.0, "no room")] * 2])
    now: list[Any] = [None, None]
    over = threading.Event()

    def seconds_since_last(_: HeartbeatFolder) -> float:
        try:
            now[:] = next(looks)
        except StopIteration:
            over.set()
        return float(now[0])

    monkeypatch.setattr("raydiv.runtime.wait_for_nodes.CHECK_INTERVAL_S", 0.001)
    monkeypatch.setattr(HeartbeatFolder, "seconds_since_last", seconds_since_last)
    monkeypatch.setattr("raydiv.runtime.wait_for_nodes.missing_worker_resources", lambda cluster: now[1])
    messages: list[str] = []
    with report_waiting(run.heartbeats.seconds_since_last, ClusterConfig(), messages.append):
        assert over.wait(60)
    assert messages == ["the workers are gone; training waits for nodes: no room"] * 2


def test_a_run_whose_model_is_written_and_a_finished_one(run: RunDirectory, tmp_path: Path) -> None:
    train_steps(run, 10)
    run.stage.training_ended("all steps are done")
    assert status(run.path)["state"] == "trained"
    run.result.write_text("{}")
    assert "finished (all steps are done)" in printed(status(run.path))


def test_the_command_prints_the_state_and_refuses_what_is_no_run(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "measuring"
    assert main(["status", str(tmp_path)]) == 2
    assert "recipe.yaml" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"stage\.json"):
        status(make_run(tmp_path).path)
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match=r"sweep.*/trials"):
        status(tmp_path / "many")


def test_it_is_followed_until_no_process_writes_into_the_run(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FOLLOW_SECONDS", 0.05)
    written: list[str] = []
    monkeypatch.setattr("raydiv.cli.runs.write_result", written.append)

    def wait_for(line: str) -> None:
        end = time.monotonic() + 60
        while f"{line}\n" not in written:
            assert time.monotonic() < end, written
            time.sleep(0.01)

    def work() -> None:
        with claim(run.path, print):
            claimed.set()
            wait_for("measuring, step 0")
            train_steps(run, 4)
            wait_for("training, step 4 of 10")
            run.stage.training_ended("all steps are done")
            run.result.write_text("{}")
            wait_for("finished, step 4 of 10")

    claimed = threading.Event()
    worker = threading.Thread(target=work)
    worker.start()
    assert claimed.wait(60)
    assert main(["status", str(run.path), "--follow"]) == 0
    worker.join()
    assert written[0] == "measuring, step 0\n"
    assert written[-1].startswith(f"run                {run.path}\nstate              finished (all steps are done)\n")


def test_a_run_that_nothing_writes_into_is_shown_once(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run.path), "--follow", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["running"] is False
