"""Whole runs through Ray that lose a worker, all workers or their driver, hang, or get a signal, and resume."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.runs import assert_same_run, wait_for_checkpoint, wait_for_step
from helpers.small_run import recipe_of
from raydiv.commands import train as launch
from raydiv.commands.train import Result, train
from raydiv.config import Recipe, save_recipe
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.signals import Terminated

pytestmark = pytest.mark.slow

STEPS = 60
"""A step takes some 50 ms, and a run must last longer than a test takes to see its first steps."""


@pytest.fixture(scope="module")
def named(tiny_model: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """The recipe of these runs under a name. All share one MLflow store."""
    output = tmp_path_factory.mktemp("runs")

    def recipe(name: str, *overrides: str) -> Recipe:
        fixed = (f"optim.steps={STEPS}", "checkpoint.every=2", "evaluate.every=3", "engine.zero_stage=3")
        return recipe_of(tiny_model, files, output, name, *fixed, *overrides)

    return recipe


@pytest.fixture(scope="module")
def whole(ray: None, named: Callable[..., Recipe]) -> Result:
    """An uninterrupted run."""
    return train(named("whole"), ProgressDisplay(quiet=True))


def workers(driver: int | None = None) -> list[psutil.Process]:
    """The training workers' processes of a driver with a local Ray, by default of this process; no other ones."""
    processes = []
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # another child of Ray's may end after it was listed
            if "RayTrainWorker" in " ".join(process.cmdline()):
                processes.append(process)
    return processes


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Run ``act`` in a thread while the block runs; its exception is raised at the end."""
    failure: list[BaseException] = []

    def acting() -> None:
        try:
            act()
        except BaseException as error:
            failure.append(error)
            # end the block, which may wait for what ``act`` did not do
            interrupt_main()

    thread = threading.Thread(target=acting)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        if failure:
            raise failure[0]


def mlflow_steps(result: Result, metric: str) -> list[int]:
    from mlflow import MlflowClient

    client = MlflowClient(result.report["mlflow"]["uri"])
    return [entry.step for entry in client.get_metric_history(result.report["mlflow"]["run_id"], metric)]


def test_a_killed_worker_is_restarted_and_nothing_is_lost(
    whole: Result, named: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = named("worker", "cluster.max_failures=1")
    run = RunDirectory.of(recipe)

    def kill() -> None:
        wait_for_checkpoint(run, recipe, 4)
        workers()[0].kill()

    with meanwhile(kill):
        result = train(recipe)
    resumed = re.search(r"training resumes after step (\d+)", capsys.readouterr().err)
    assert resumed is not None
    assert 4 <= int(resumed[1]) < STEPS
    assert_same_run(run, whole.run)
    assert mlflow_steps(result, "loss") == list(range(1, STEPS + 1))
    assert mlflow_steps(result, "eval/loss") == mlflow_steps(whole, "eval/loss") == [0, *range(3, STEPS, 3), STEPS]
    assert result.report["mlflow"]["sent"]


@pytest.mark.long
def test_a_hang_ends_the_workers_and_training_resumes(
    whole: Result, named: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = named("still", "cluster.max_failures=1", "cluster.timeout_s=40")
    run = RunDirectory.of(recipe)
    stopped: list[psutil.Process] = []

    def stop() -> None:
        wait_for_checkpoint(run, recipe, 4)
        stopped.append(psutil.Process(run.heartbeats.read()[1].pid))
        stopped[0].suspend()

    with meanwhile(stop):
        train(recipe)
    output = capsys.readouterr().err
    assert re.search(
        rf"40 s \(cluster\.timeout_s\)\. Suspect: rank 1 \(\S+, pid {stopped[0].pid}\), in \w+ of step \d "
        r"\(no heartbeat for \d+ s\)\. Waiting .*: 1 rank, in \w+ of step \d",
        output,
    ), output
    assert re.search("training resumes after step ([468]|1[0-8])\n", output)
    assert_same_run(run, whole.run)
    assert not stopped[0].is_running()


def command(recipe: Recipe, path: Path, *more: str) -> list[str]:
    save_recipe(recipe, path)
    return [sys.executable, "-m", "raydiv", "train", str(path), *more]


PLANTED = {
    name: f"planted-{name.lower()}" for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")
}
"""Secrets in the environment of a command, none of which may appear in its files and output."""


def environment() -> dict[str, str]:
    """The environment of a command that starts its own Ray."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command in the background, which is killed at the latest when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def run(words: list[str], **more: str) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(words, env=environment() | more, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.long
def test_a_run_that_loses_all_workers_and_then_its_driver_resumes_where_it_was(
    whole: Result, named: Callable[..., Recipe], start: Start, tmp_path: Path
) -> None:
    recipe = named("killed")
    run = RunDirectory.of(recipe)
    words = command(recipe, tmp_path / "recipe.yaml")
    process = start(words)
    wait_for_step(run, 3)
    for worker in workers(process.pid):
        worker.kill()
    assert "raydiv: the run failed: training" in process.communicate(timeout=120)[1]
    assert process.returncode == 1
    first = json.loads(run.mlflow.read_text())
    process = start([*words, "--resume"])
    wait_for_step(run, 6)
    process.kill()
    process.wait()
    result = train(recipe, ProgressDisplay(quiet=True), resume=True)
    assert "training resumes after step" in run.events.path.read_text()
    assert_same_run(run, whole.run)
    assert result.report["mlflow"]["run_id"] == first["run_id"]
    assert mlflow_steps(result, "loss") == list(range(1, STEPS + 1))


@pytest.mark.long
def test_sigterm_leaves_a_checkpoint_of_the_last_step(
    whole: Result, named: Callable[..., Recipe], start: Start, tmp_path: Path
) -> None:
    recipe = named("term", "checkpoint.every=null")
    run = RunDirectory.of(recipe)
    process = start(command(recipe, tmp_path / "recipe.yaml"), **PLANTED)
    wait_for_step(run, 3)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[1]
    assert process.returncode == 143, output
    stopped = run.metrics.steps_taken()
    assert f"stopped after step {stopped}; the same command with --resume" in output
    assert stopped < STEPS
    assert [int(name.removeprefix("step-")) for name in run.checkpoints(recipe).folder_names()] == [stopped]
    again: Any = train(recipe, ProgressDisplay(quiet=True), resume=True)
    assert_same_run(run, whole.run)
    written = [path.read_bytes() for path in run.path.parent.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not any(secret.encode() in content for secret in PLANTED.values() for content in [*written, output.encode()])
    assert mlflow_steps(again, "loss") == list(range(1, STEPS + 1))
    with pytest.raises(Exception, match="another recipe"):
        train(named("term", "checkpoint.every=null", "loss.skew=0.25"), ProgressDisplay(quiet=True), resume=True)


@pytest.mark.long
def test_ctrl_c_exits_with_130_and_ends_the_mlflow_run(
    named: Callable[..., Recipe], start: Start, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    alone = ("cluster.num_workers=1", "engine.zero_stage=0")
    recipe = named("interrupted", "optim.steps=100000", "evaluate.every=null", "checkpoint.every=2", *alone)
    run = RunDirectory.of(recipe)
    process = start(command(recipe, tmp_path / "recipe.yaml"))
    wait_for_step(run, 3)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[1]
    assert process.returncode == 130, output
    assert "Traceback" not in output
    noted = json.loads(run.mlflow.read_text())
    assert MlflowClient(noted["uri"]).get_run(noted["run_id"]).info.status == "KILLED"
    assert run.checkpoints(recipe).folder_names()


@pytest.fixture
def raylets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of one raylet on this machine, at RAY_ADDRESS; each raylet has one CPU."""
    import ray
    from ray.cluster_utils import Cluster as Raylets

    ray.shutdown()
    for name in ("initial_delay", "period", "timeout"):
        monkeypatch.setenv(f"RAY_health_check_{name}_ms", "1000")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    raylets = Raylets(initialize_head=True, shutdown_at_exit=False, head_node_args={"num_cpus": 1})
    monkeypatch.setenv("RAY_ADDRESS", raylets.address)
    yield raylets
    ray.shutdown()
    raylets.shutdown()


@pytest.mark.long
def test_a_lost_node_is_replaced_by_another(whole: Result, named: Callable[..., Recipe], raylets: Any) -> None:
    recipe = named("node", "cluster.max_failures=2")
    run = RunDirectory.of(recipe)
    other = raylets.add_node(num_cpus=1)

    def lose() -> None:
        wait_for_checkpoint(run, recipe, 4)
        raylets.remove_node(other, allow_graceful=False)
        raylets.add_node(num_cpus=1)

    with meanwhile(lose):
        train(recipe, ProgressDisplay(quiet=True))
    # a lost node is noticed after a second, in which all steps may be taken
    assert re.search("training resumes after step [468]", run.events.path.read_text())
    assert_same_run(run, whole.run)


@pytest.mark.long
def test_workers_come_and_go_with_the_nodes(
    named: Callable[..., Recipe], raylets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "RESIZE_INTERVAL_S", 1.0)
    # after the loss of a node Ray Train waits so long for the two workers that it has counted before
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    elastic = ("cluster.min_workers=1", "cluster.cpus_per_worker=0.9", "cluster.max_failures=2")
    recipe = named("elastic", "optim.steps=100000", "evaluate.every=null", "checkpoint.every=10", *elastic)
    run = RunDirectory.of(recipe)

    def wait_for_workers(number: int) -> None:
        end = time.monotonic() + 180
        while {beat.of for beat in run.heartbeats.read()} != {number} or not run.heartbeats.read()[0].step:
            assert time.monotonic() < end, run.heartbeats.read()
            time.sleep(0.2)

    def come_and_go() -> None:
        wait_for_checkpoint(run, recipe, 10)
        wait_for_workers(1)
        other = raylets.add_node(num_cpus=1)
        wait_for_workers(2)
        wait_for_step(run, run.metrics.steps_taken() + 20)
        raylets.remove_node(other, allow_graceful=False)
        wait_for_workers(1)
        run.request_stop()

    with meanwhile(come_and_go), pytest.raises(Terminated):
        train(recipe, ProgressDisplay(quiet=True))
    steps = [record["step"] for record in run.metrics.read() if "loss" in record]
    assert steps == list(range(1, len(steps) + 1))
    assert run.events.path.read_text().count("training resumes after step") == 2
