"""Cells out of finished runs: in run directories, folders of them, or MLflow."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.config import Recipe, changed
from raydiv.experiments.study.cells import Cell
from raydiv.experiments.study.grid import SECTION, PlannedCell, changes_of, data_name, loss_name, model_name
from raydiv.runs.directory import RunDirectory
from raydiv.runs.metrics_log import Metrics, last_values, numbers
from raydiv.runs.resume import comparable, differences
from raydiv.runs.tracker import downloaded_runs, tracking_uri
from raydiv.utils.errors import UserError

MLFLOW = "mlflow:"
"""How a place begins that is an experiment in MLflow."""


def cell_of(run: RunDirectory, plan: PlannedCell) -> Cell:
    """The cell that a finished run of the grid is."""
    return Cell(plan.model, plan.data, plan.loss, plan.seed, *_measured(run), str(run.path))


def identity(run: RunDirectory) -> str:
    """What a finished run is known by wherever it is found: its id in MLflow, which it always has unless a server was away."""
    noted = json.loads(run.result.read_text()).get("mlflow") or {}
    return str(noted.get("run_id") or run.path.resolve())


def included(recipe: Recipe) -> dict[str, Cell]:
    """The cells that the study names as there already, by their runs' ``identity``: found in two places it is one.

    They are labelled as the study's own entries are where they are of the same recipe. A run that differs in what no entry
    sets, such as another rate, has that beside its loss: it is no other seed of the study's. Raises UserError for a place
    without a finished run.
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
        if run.holds_a_run and run.result.is_file() and run.metrics.path.is_file():
            yield run, str(one)


def _labelled(run: RunDirectory, study: Recipe, where: str) -> Cell:
    recipe = run.read_recipe()
    own, axes = comparable(recipe), {axis: _Axis.of(study, axis) for axis in SECTION}
    model = axes["models"].label(own) or model_name(recipe)
    data = axes["data"].label(own) or data_name(recipe)
    loss = axes["losses"].label(own) or loss_name(recipe)
    other = [
        key
        for key in differences(comparable(study), own)
        if key != "seed" and not any(axis.says(key) for axis in axes.values())
    ]
    if other:
        loss += f" (other {', '.join(other)})"
    return Cell(model, data, loss, recipe.seed, *_measured(run), where)


@dataclass(frozen=True, slots=True)
class _Axis:
    """What a study varies along one axis: its section, the keys elsewhere that an entry sets, and each entry's recipe."""

    section: str
    elsewhere: frozenset[str]
    entries: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, study: Recipe, axis: str) -> _Axis:
        assert study.study is not None
        said: Mapping[str, Any] = getattr(study.study, axis)
        entries = {name: comparable(changed(study, changes_of(axis, one))) for name, one in said.items()}
        plain = comparable(study)
        return cls(
            SECTION[axis], frozenset(key for one in entries.values() for key in differences(plain, one)), entries
        )

    def says(self, key: str) -> bool:
        """Whether it is along this axis that a key may differ."""
        return key.startswith(f"{self.section}.") or key in self.elsewhere

    def label(self, own: Mapping[str, Any]) -> str | None:
        """What the study calls a run that is as one of its entries makes it."""
        as_it_is = (name for name, one in self.entries.items() if not any(map(self.says, differences(one, own))))
        return next(as_it_is, None)


def _measured(run: RunDirectory) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics after training, and those of the model before it."""
    before = last_values(record for record in run.metrics.read() if record["step"] == 0)
    return _figures(run.metrics.trained_values()), _figures(before)


def _figures(metrics: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in numbers(metrics).items() if name != "step"}


def require_same(recipe: Recipe, run: RunDirectory) -> None:
    """Raises UserError where a finished run was made from another recipe than its cell's now."""
    different = differences(comparable(run.read_recipe()), comparable(recipe))
    if different:
        raise UserError(
            f"{run.path}: this cell was run with another {', '.join(different)}; remove it to run it again, or give the study "
            "another name"
        )
