"""The run directory: what is followed arrives once and whole, and a run is never written over."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from raydiv.config import Recipe, load_recipe
from raydiv.runs import progress
from raydiv.runs.directory import RunDirectory
from raydiv.runs.progress import ProgressDisplay, step_note
from raydiv.utils.errors import UserError


def recipe(output: Path) -> Recipe:
    return load_recipe(
        {
            "name": "mine",
            "output_dir": str(output),
            "model": {"id": "m"},
            "loss": {"type": "dpo"},
            "optim": {"steps": 3},
        }
    )


def test_followers_see_every_line_once_and_never_half_of_one(tmp_path: Path) -> None:
    run, seen = RunDirectory(tmp_path), []
    with run.follow_metrics(seen.append):
        run.log_metrics({"step": 1})
        with (tmp_path / "metrics.jsonl").open("a") as lines:
            lines.write('{"step": ')
            lines.flush()
            time.sleep(0.7)
            assert seen == [{"step": 1}]
            lines.write("2}\n")
        run.log_metrics({"step": 3})
    assert seen == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert run.read_metrics() == seen


def test_an_empty_record_is_no_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log_metrics({"step": 1})
    run.log_metrics({})
    assert len(run.read_metrics()) == 1


def test_a_run_is_never_written_over(tmp_path: Path) -> None:
    mine = recipe(tmp_path)
    run = RunDirectory.of(mine)
    run.require_free()
    run.create(mine, {})
    assert run.read_recipe() == mine
    with pytest.raises(UserError, match="holds a run already"):
        RunDirectory.of(mine).require_free()


def test_claiming_drops_what_an_attempt_that_never_trained_left(tmp_path: Path) -> None:
    mine = recipe(tmp_path)
    run = RunDirectory.of(mine)
    run.path.mkdir()
    run.log_metrics({"step": 7})
    run.create(mine, {})
    run.log_metrics({"step": 1})
    assert run.read_metrics() == [{"step": 1}]


def test_a_place_that_cannot_be_written_is_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mine = recipe(tmp_path / "file")
    with pytest.raises(UserError, match="output_dir"):
        RunDirectory.of(mine).create(mine, {})


def test_the_bar_names_loss_divergence_margin_and_speed() -> None:
    note = step_note({"loss": 0.5, "divergence": 0.25, "reward/margin": 2.0, "tokens_per_second": 123.4, "lr": 1.0})
    assert note == "loss 0.5  div 0.25  margin 2  tok/s 123"


def test_progress_off_a_terminal_says_when_a_phase_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay().phase("tokens") as update:
        update(1, 2)
        update(2, 2)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("tokens: done in")


def test_a_long_phase_off_a_terminal_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with ProgressDisplay().phase("tokens") as update:
        for done, total in [(10, None), (20, None), (30, 60), (40, 60)]:
            now[0] += 15.0
            update(done, total)
    lines = capsys.readouterr().err.splitlines()
    # of how many is not known at first; from then on 10 every 15 seconds
    assert lines == ["tokens: 20    (30 s)", "tokens: 40/60    (60 s, 30 s left)", "tokens: done in 60.0 s"]
