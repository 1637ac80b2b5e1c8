"""Sweeps by Ray Tune over Ray Train runs of ZeRO workers, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from helpers.small_run import recipe_of, write_files
from raydiv.cli import main
from raydiv.config import Recipe, load_recipe, save_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.experiments.sweep.record import TrialRecord
from raydiv.experiments.sweep.sweep import SweepResult, sweep
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError

pytestmark = pytest.mark.slow

FATAL = 1e20
"""A learning rate after whose first update no loss is finite."""


YESTERDAY = date.today() - timedelta(days=1)

DATED_TEMPLATE = """{{ strftime_now('%d %b %Y') }}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


MAXIMIZE_MARGIN = {"metric": "eval/reward/margin", "direction": "maximize"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with ray_session(ClusterConfig(), dashboard=True):
        yield


def sweep_of(
    model: Path, files: dict[str, str], output: Path, name: str, section: dict[str, Any], *more: str
) -> Recipe:
    return recipe_of(
        model, files, output, name, "batch.tokens_per_microbatch=auto", f"sweep={json.dumps(section)}", *more
    )  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def grid(
    ray: None, tiny_model: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, SweepResult]:
    """Three trials of one worker each, as many at once as there is room for; one of them fails.

    The paths of its data are relative to the working directory. It began yesterday, and its template prints the date.
    """
    space = {"optim.lr": [1e-3, FATAL], "loss.beta": {"in": [0.1, 0.3], "when": {"optim.lr": 1e-3}}}
    section = {
        "space": space,
        "search": "grid",
        "objectives": [MAXIMIZE_MARGIN],
        "constraints": [{"metric": "eval/loss", "max": 100}],
    }
    output = tmp_path_factory.mktemp("sweeps")
    more = ["cluster.num_workers=1", "optim.steps=3", "data.train=train.jsonl", "data.eval=eval.jsonl"]
    recipe = sweep_of(tiny_model, files, output, "grid", section, *more)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"template": DATED_TEMPLATE})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raydiv.runs.resume.date", SimpleNamespace(today=lambda: YESTERDAY))
        patch.chdir(Path(files["train"]).parent)
        return recipe, sweep(recipe, display=ProgressDisplay(quiet=True))


def test_failed_trial_is_recorded_and_the_others_continue(grid: tuple[Recipe, SweepResult]) -> None:
    _, result = grid
    trials = {json.dumps(trial["values"]): trial for trial in result.report["trials"]}
    failed = trials.pop(json.dumps({"optim.lr": FATAL}))
    assert failed["status"] == "failed"
    assert "not finite" in failed["error"]
    assert [trial["status"] for trial in trials.values()] == ["finished"] * 2
    assert result.report["best"] == [
        max(trials.values(), key=lambda trial: trial["metrics"]["eval/reward/margin"])["number"]
    ]
    assert json.loads(result.directory.record.read_text()) == result.report


def test_trials_share_data_and_reference(grid: tuple[Recipe, SweepResult]) -> None:
    _, result = grid
    results = [json.loads(path.read_text()) for path in result.directory.trials.glob("*/result.json")]
    assert [content["data"]["reference"]["misses"] for content in results] == [0, 0]
    assert len({content["data"]["fingerprint"] for content in results}) == 1


def test_all_trials_have_the_date_on_which_the_sweep_began(grid: tuple[Recipe, SweepResult]) -> None:
    _, result = grid
    recipes = [load_recipe(path) for path in result.directory.trials.glob("*/recipe.yaml")]
    assert {recipe.data.template_date for recipe in recipes} == {YESTERDAY}
    assert result.directory.read_recipe().data.template_date == YESTERDAY


def test_only_the_best_trial_keeps_its_weights(grid: tuple[Recipe, SweepResult]) -> None:
    _, result = grid
    kept = [trial["number"] for trial in result.report["trials"] if trial["kept"]]
    assert kept == result.report["best"]
    assert [path.parent.name for path in result.directory.trials.glob("*/model")] == [f"{kept[0]:03d}"]


def test_mlflow_has_the_trials_nested_in_the_run_of_the_sweep(grid: tuple[Recipe, SweepResult]) -> None:
    from mlflow import MlflowClient

    _, result = grid
    client = MlflowClient(result.report["mlflow"]["uri"])
    parent = client.get_run(result.report["mlflow"]["run_id"])
    assert parent.info.status == "FINISHED"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=10
    )
    tags = {child.data.tags["raydiv.trial"]: child.data.tags for child in children}
    assert {number: trial["raydiv.status"] for number, trial in tags.items()} == {
        str(trial["number"]): trial["status"] for trial in result.report["trials"]
    }
    best = [int(number) for number, trial in tags.items() if trial["raydiv.best"] == "true"]
    assert best == result.report["best"]
    assert {child.info.status for child in children} == {"FINISHED", "FAILED"}
    assert {"sweep.json", "report.html"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}


def test_report_has_every_trial_and_loads_no_other_file(grid: tuple[Recipe, SweepResult]) -> None:
    _, result = grid
    page = result.directory.report.read_text()
    assert all(f"{trial['number']}" in page for trial in result.report["trials"])
    assert "src=" not in page
    assert list(result.directory.pictures.glob("*.png"))


def test_resumed_sweep_repeats_no_finished_trial(
    grid: tuple[Recipe, SweepResult],
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a trial killed while it trained and one killed before its report, only the first is trained again."""
    recipe, result = grid
    record = json.loads(result.directory.record.read_text())
    victim, *others = [trial for trial in record["trials"] if trial["status"] == "finished"]
    victim["status"] = "running"
    result.directory.record.write_text(json.dumps(record))
    (result.directory.path / victim["run"] / "result.json").unlink()
    unreported = result.directory.run(TrialRecord(others[0]["number"], {}))
    unreported.report.unlink()
    unreported.result.write_text(unreported.result.read_text().replace('"sent": true', '"sent": false'))
    before = {trial["number"]: _trained_at(result, trial) for trial in others}
    save_recipe(recipe, tmp_path / "recipe.yaml")
    monkeypatch.chdir(Path(files["train"]).parent)
    assert main(["sweep", str(tmp_path / "recipe.yaml"), "--resume", "--json"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert [trial["status"] for trial in resumed["trials"]] == [trial["status"] for trial in result.report["trials"]]
    assert {trial["number"]: _trained_at(result, trial) for trial in others} == before
    assert _trained_at(result, victim)
    assert unreported.report.is_file()
    assert json.loads(unreported.result.read_text())["mlflow"]["sent"]
    assert resumed["mlflow"]["run_id"] == result.report["mlflow"]["run_id"]
    for old, new in zip(result.report["trials"], resumed["trials"], strict=True):
        for name in ("loss", "eval/reward/margin"):
            assert old["metrics"].get(name) == pytest.approx(new["metrics"].get(name))


def _trained_at(result: SweepResult, trial: dict[str, Any]) -> int:
    return (result.directory.path / trial["run"] / "metrics.jsonl").stat().st_mtime_ns


def test_unknown_metric_is_an_error_before_the_first_trial(
    ray: None, tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    section: dict[str, Any] = {"space": {"loss.beta": [0.1]}, "search": "grid"}
    section["objectives"] = [{"metric": "evaluate/asr", "direction": "maximize"}]
    with pytest.raises(UserError, match=r"sweep\.objectives: evaluate/asr: .*eval/"):
        sweep(sweep_of(tiny_model, files, tmp_path, "bad", section), display=ProgressDisplay(quiet=True))
    assert not (tmp_path / "bad" / "trials").exists()


@pytest.mark.long
def test_trials_of_the_whole_cluster_take_turns_and_stopped_trials_free_their_workers(
    ray: None, tiny_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    """``max_concurrent`` is more than fit; each trial has two ZeRO-3 workers, with evaluation and separation.

    asha stops the later trials, which are worse: if one kept its workers, the next would never start.
    """
    section = {
        "space": {"optim.lr": [3e-3, 1e-9, 1e-8]},
        "search": "grid",
        "objectives": [MAXIMIZE_MARGIN],
        "scheduler": "asha",
        "grace": 1,
        "reduction": 2,
        "max_concurrent": 3,
        "keep": 0,
    }
    more = ["engine.zero_stage=3", "evaluate.every=1"]
    more += [f"separation.prompts={files['prompts']}", "separation.every=2"]
    recipe = sweep_of(tiny_model, files, tmp_path, "wide", section, *more)
    result = sweep(recipe, display=ProgressDisplay(quiet=True))
    statuses = [trial["status"] for trial in result.report["trials"]]
    assert statuses[0] == "finished"
    assert "stopped" in statuses
    assert set(statuses) <= {"finished", "stopped"}
    assert not list(result.directory.trials.glob("*/model"))
    assert _free_cpus() == 2


def _free_cpus() -> float:
    """Free CPUs of two, after waiting for the last stopped trial to end."""
    import ray

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        time.sleep(0.5)
    return float(ray.available_resources().get("CPU", 0)) / float(ray.cluster_resources()["CPU"]) * 2


@pytest.mark.long
def test_killed_half_way_and_resumed(tiny_model: Path, files: dict[str, str], tmp_path: Path) -> None:
    """A sweep by Optuna is killed after its first trial; the resumed sweep does not repeat that trial."""
    section = {
        "space": {"optim.lr": "loguniform(1e-4, 1e-2)"},
        "search": "tpe",
        "trials": 2,
        "goal": "maximize eval/reward/margin",
        "max_concurrent": 1,
    }
    recipe = sweep_of(tiny_model, files, tmp_path, "killed", section, "cluster.num_workers=1", "optim.steps=2")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True)))
    command = [sys.executable, "-m", "raydiv", "sweep", str(path)]
    process = subprocess.Popen(command, start_new_session=True)
    first = tmp_path / "killed" / "trials" / "001" / "result.json"
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    trained = first.with_name("metrics.jsonl").stat().st_mtime_ns
    done = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert [trial["status"] for trial in trials] == ["finished"] * 2
    assert first.with_name("metrics.jsonl").stat().st_mtime_ns == trained
    assert len({trial["values"]["optim.lr"] for trial in trials}) == 2
