"""Cells out of finished runs: in run directories, folders of them, or MLflow."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raydiv.comparison.cells import Cell
from raydiv.config import Recipe, changed
from raydiv.errors import UserError
from raydiv.run import Metrics, RunDirectory, last_values, numbers
from raydiv.studies.grid import Plan, changes_of, data_name, loss_name, model_name
from raydiv.track import downloaded_runs, tracking_uri

MLFLOW = "mlflow:"
"""How a place begins that is an experiment in MLflow."""


def cell_of(run: RunDirectory, plan: Plan) -> Cell:
    """The cell that a finished run of the grid is."""
    return Cell(plan.model, plan.data, plan.loss, plan.seed, *_measured(run), str(run.path))


def identity(run: RunDirectory) -> str:
    """What a finished run is known by wherever it is found: its id in MLflow, which it always has unless a server was away."""
    noted = json.loads(run.result.read_text()).get("mlflow") or {}
    return str(noted.get("run_id") or run.path.resolve())


def included(recipe: Recipe) -> dict[str, Cell]:
    """The cells that the study names as there already, by their runs' ``identity``: found in two places it is one.

    They are labelled as the study's own entries are where they are of the same recipe. Raises UserError for a place without a
    finished run.
    """
    study = recipe.study
    assert study is not None
    cells: dict[str, Cell] = {}
    for place in study.include:
        found = {identity(run): _labelled(run, recipe, where) for run, where in _runs(place, recipe)}
        if not found:
            raise UserError(f"study.include: {place}: holds no finished run")
        cells = found | cells
    return cells


def _runs(place: str, recipe: Recipe) -> Iterator[tuple[RunDirectory, str]]:
    """Finished runs of a place, and what each is called."""
    if place.startswith(MLFLOW):
        with tempfile.TemporaryDirectory() as folder:
            experiment = place.removeprefix(MLFLOW)
            for path, run_id in downloaded_runs(tracking_uri(recipe), experiment, Path(folder)):
                yield RunDirectory(path), f"{MLFLOW}{experiment}/{run_id}"
        return
    path = Path(place).expanduser()
    for one in [path, *sorted(path.glob("*/"))]:
        run = RunDirectory(one)
        if run.holds_a_run and run.result.is_file() and run.metrics_file.is_file():
            yield run, str(one)


def _labelled(run: RunDirectory, study: Recipe, where: str) -> Cell:
    own = run.read_recipe()
    model = _label(study, own, "models", "model") or model_name(own)
    data = _label(study, own, "data", "data") or data_name(own)
    loss = _label(study, own, "losses", "loss") or loss_name(own)
    return Cell(model, data, loss, own.seed, *_measured(run), where)


def _label(study: Recipe, own: Recipe, axis: str, section: str) -> str | None:
    """What the study calls the section of a run that is as one of its entries makes it."""
    assert study.study is not None
    entries: Mapping[str, Any] = getattr(study.study, axis)
    for name, said in entries.items():
        if _dumped(changed(study, changes_of(axis, said)), section) == _dumped(own, section):
            return name
    return None


def _dumped(recipe: Recipe, section: str) -> Any:
    return recipe.model_dump(mode="json", by_alias=True)[section]


def _measured(run: RunDirectory) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics after training, and those of the model before it."""
    before = last_values(record for record in run.metrics() if record["step"] == 0)
    return _figures(run.trained()), _figures(before)


def _figures(metrics: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in numbers(metrics).items() if name != "step"}


def require_same(recipe: Recipe, run: RunDirectory) -> None:
    """Raises UserError where a finished run was made from another recipe than its cell's now."""
    before, now = (_comparable(one) for one in (run.read_recipe(), recipe.model_copy(update={"name": run.path.name})))
    different = [key for key in now if before[key] != now[key]]
    if different:
        raise UserError(
            f"{run.path}: this cell was run with another {', '.join(different)}; remove it to run it again, or give the study "
            "another name"
        )


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """What a run is made of, without where and in what layout it was run."""
    tree: dict[str, Any] = json.loads(recipe.model_dump_json(by_alias=True, exclude={"cluster", "track", "output_dir"}))
    tree["engine"].pop("zero_stage")
    tree["batch"].pop("tokens_per_microbatch")
    return tree
