"""The run directory: followers get every line once and whole, and no run is overwritten. Progress and its log."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from raydiv.config import Recipe, load_recipe
from raydiv.runs import progress
from raydiv.runs.directory import RunDirectory
from raydiv.runs.events import EventLog
from raydiv.runs.metrics_log import MetricsLog
from raydiv.runs.output_directory import RECORDS
from raydiv.runs.progress import ProgressDisplay, step_note
from raydiv.runs.stage import RunStage
from raydiv.utils.errors import UserError
from raydiv.utils.storage import write_json


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path)


def make_recipe(output: Path) -> Recipe:
    return load_recipe(
        {
            "name": "mine",
            "output_dir": str(output),
            "model": {"id": "m"},
            "loss": {"type": "dpo"},
            "optim": {"steps": 3},
        }
    )


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsLog:
    return MetricsLog(tmp_path / "metrics.jsonl")


def test_the_stage_of_a_run_of_an_earlier_version_is_read(recipe: Recipe) -> None:
    run = RunDirectory.of(recipe)
    run.create(recipe, {"data": "d", "model": "m"})
    earlier = {"id": "i", "of": {"data": "d"}, "began": 7, "ended": 9, "why": "all steps are done", "planned": 3}
    write_json(run.path / "stage.json", earlier)
    assert run.stage.read() == RunStage("i", {"data": "d"}, 7, 9, "all steps are done", 3)
    run.stage.training_ended("the margin is at optim.target_margin")
    assert run.stage.read().metrics_bytes_at_start == 7


def test_followers_get_every_line_once_and_never_half_of_one(metrics: MetricsLog) -> None:
    records = []
    with metrics.follow(records.append):
        metrics.append({"step": 1})
        with metrics.path.open("a") as file:
            file.write('{"step": ')
            file.flush()
            time.sleep(0.7)
            assert records == [{"step": 1}]
            file.write("2}\n")
        metrics.append({"step": 3})
    assert records == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert metrics.read() == records


def test_an_empty_record_adds_no_line(metrics: MetricsLog) -> None:
    metrics.append({"step": 1})
    metrics.append({})
    assert len(metrics.read()) == 1


def test_a_run_is_never_overwritten(recipe: Recipe) -> None:
    run = RunDirectory.of(recipe)
    assert not run.has_started(resume=False)
    assert not run.has_started(resume=True)
    run.create(recipe, {})
    assert run.read_recipe() == recipe
    assert run.has_started(resume=True)
    with pytest.raises(UserError, match=r"a run already.*--resume"):
        run.has_started(resume=False)


@pytest.mark.parametrize("kind", ["sweep", "study"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_does_not_start_in_the_directory_of_a_sweep_or_study(kind: str, resume: bool, recipe: Recipe) -> None:
    run = RunDirectory.of(recipe)
    run.path.mkdir()
    for name in ("recipe.yaml", RECORDS[kind]):
        (run.path / name).write_text("")
    with pytest.raises(UserError, match=f"a {kind} already; set another name"):
        run.has_started(resume=resume)


def test_a_new_run_removes_metrics_of_an_attempt_that_never_trained(recipe: Recipe) -> None:
    run = RunDirectory.of(recipe)
    run.path.mkdir()
    run.metrics.append({"step": 7})
    run.create(recipe, {})
    run.metrics.append({"step": 1})
    assert run.metrics.read() == [{"step": 1}]


def test_a_directory_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = make_recipe(tmp_path / "file")
    with pytest.raises(UserError, match="output_dir"):
        RunDirectory.of(recipe).create(recipe, {})


def test_the_training_bar_shows_loss_divergence_margin_and_speed() -> None:
    note = step_note({"loss": 0.5, "divergence": 0.25, "reward/margin": 2.0, "tokens_per_second": 123.4, "lr": 1.0})
    assert note == "loss 0.5  div 0.25  margin 2  tok/s 123"


def test_an_event_is_printed_once_and_logged_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    events = EventLog(tmp_path / "events.jsonl")
    events.log("of an earlier attempt")
    with (
        caplog.at_level(logging.INFO, "raydiv"),
        events.follow(ProgressDisplay().print, lambda place: f"train.jsonl:{place[2]}"),
    ):
        events.log("step 3 is refused", [(0, 0, 7)])
    message = "step 3 is refused (train.jsonl:7)"
    assert caplog.record_tuples == [("raydiv", logging.INFO, message)]
    assert capsys.readouterr().err == f"{message}\n"


def test_without_a_handler_of_the_user_messages_are_not_printed_by_logging(capsys: pytest.CaptureFixture[str]) -> None:
    assert logging.getLogger("raydiv").handlers == []
    ProgressDisplay(quiet=True).print("a message")
    assert capsys.readouterr().err == ""


def test_progress_outside_a_terminal_is_a_line_at_the_end_of_a_phase(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "raydiv"), ProgressDisplay().phase("tokens") as update:
        update(1, 2)
        update(2, 2)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("tokens: done in")
    assert caplog.records == []


def test_a_long_phase_outside_a_terminal_prints_lines_of_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with ProgressDisplay().phase("tokens") as update:
        for done, total in [(10, None), (20, None), (30, 60), (40, 60)]:
            now[0] += 15.0
            update(done, total)
    lines = capsys.readouterr().err.splitlines()
    # the total is unknown at first; from then on 10 every 15 seconds
    assert lines == ["tokens: 20    (30 s)", "tokens: 40/60    (60 s, 30 s left)", "tokens: done in 60.0 s"]
