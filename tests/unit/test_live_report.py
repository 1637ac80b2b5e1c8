"""report.html of a run that goes on."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import pytest

from helpers.made_run import make_run
from raydiv.runs.directory import RunDirectory
from raydiv.runs.report import live
from raydiv.runs.report.live import live_report
from raydiv.runs.stage import RunStage

REFRESH = f'<meta http-equiv="refresh" content="{live.RENEWAL_SECONDS}">'


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = make_run(tmp_path)
    made.stage.write(RunStage("id", {}, 0, planned_steps=99))
    made.result.unlink()
    return made


def test_the_page_renews_itself_until_the_run_ends(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: not opened.append(address))
    monkeypatch.setenv("DISPLAY", ":0")
    with live_report(run, pytest.fail):
        page = run.report.read_text()
        assert REFRESH in page
        assert "of 99" in page
        assert "attack success" in page
        assert "<svg" in page
    assert opened == [run.report.resolve().as_uri()]
    stopped = run.report.read_text()
    assert "http-equiv" not in stopped
    assert "--resume" in stopped


def test_new_metrics_appear(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "RENEWAL_SECONDS", 0.05)
    run.metrics.truncate(0)
    with live_report(run, lambda line: None):
        assert "No update has been logged yet" in run.report.read_text()
        run.metrics.append({"step": 1, "loss": 0.5})
        for _ in range(600):
            if "No update" not in run.report.read_text():
                break
            live.threading.Event().wait(0.05)
        assert "1 of 99" in run.report.read_text()


def test_without_a_browser_the_page_is_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(webbrowser, "open", pytest.fail)
    told: list[str] = []
    with live_report(run, told.append):
        pass
    assert len(told) == 1
    assert str(run.report) in told[0]


def test_a_page_that_cannot_be_written_does_not_stop_the_run(run: RunDirectory) -> None:
    run.metrics.path.write_text("not JSON\n")
    told: list[str] = []
    with live_report(run, told.append):
        pass
    assert [line for line in told if "cannot be renewed" in line][1:] == []
    assert any("metrics.jsonl:1" in line for line in told)
