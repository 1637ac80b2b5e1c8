"""An unexpected error in any phase of a run: exit status 1, one line, and the path of its traceback."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers.small_run import recipe_of
from raydiv.cli import main
from raydiv.commands import train as train_module
from raydiv.config import save_recipe
from raydiv.runs.directory import RunDirectory
from raydiv.utils.storage import write_json

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray")]

PHASES = ("prepare_data", "_fit", "after")
LONG_PHASES = ("load_inputs", "require_ready", "resolve_layout", "MlflowTracker", "write_report")


@pytest.mark.parametrize("phase", [*PHASES, *(pytest.param(phase, marks=pytest.mark.long) for phase in LONG_PHASES)])
def test_an_unexpected_error_in_a_phase(
    phase: str,
    tiny_model: Path,
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("planted\nin two lines")

    def fit(recipe: Any, inputs: Any, prepared: Any, run: RunDirectory, *_: Any) -> None:
        write_json(run.layout, {"packing": "none", "why_not_packed": None})
        run.stage.training_ended("all steps are done")

    def run_or_fail(evaluation: Any, run: RunDirectory, name: str, *_: Any) -> None:
        if phase == "after" and name == "after":
            fail()
        run.metrics.append({"step": 0, "loss": 1.0})

    monkeypatch.setattr(train_module, "_fit", fit)
    monkeypatch.setattr(train_module.BeforeAfterEvaluation, "run", run_or_fail)
    if phase != "after":
        monkeypatch.setattr(train_module, phase, fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    recipe = recipe_of(tiny_model, files, tmp_path / "runs", "run", "data.eval=null")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    capsys.readouterr()
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("raydiv: ")]
    assert len(lines) == 1
    match = re.fullmatch(r"raydiv: the run failed: KeyError: .*planted.* \(traceback: (.*)\)", lines[0])
    assert match is not None, lines
    assert "Traceback" in Path(match[1]).read_text()
    assert list((tmp_path / "runs").glob(".*.claim")) == [], "the directory is free again"
