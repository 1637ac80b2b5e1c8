"""Cells from finished runs: those of the grid, and those that a study includes from run directories and MLflow."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.config import Recipe, with_changes
from raydiv.experiments.study.cells import Cell
from raydiv.experiments.study.grid import SECTION, PlannedCell, changes_of, data_name, loss_name, model_name
from raydiv.runs.directory import RunDirectory
from raydiv.runs.metrics_log import Metrics, last_values, numbers
from raydiv.runs.resume import comparable, differences
from raydiv.runs.tracker import download_runs, tracking_uri
from raydiv.utils.errors import UserError
from raydiv.utils.storage import read_json

MLFLOW = "mlflow:"
"""Prefix of an MLflow experiment in ``study.include``."""


def cell_of(run: RunDirectory, planned: PlannedCell) -> Cell:
    """The cell of a finished run of the grid."""
    return Cell(planned.model, planned.data, planned.loss, planned.seed, *_metrics(run), str(run.path))


def run_identity(run: RunDirectory) -> str:
    """The MLflow id of a finished run, which all copies of it share; its path if MLflow never had it."""
    result = read_json(run.result)
    return str((result.get("mlflow") or {}).get("run_id") or run.path.resolve())


def included_cells(recipe: Recipe) -> dict[str, Cell]:
    """The cells of ``study.include``, by their runs' ``run_identity``: a run in two places counts once.

    A cell has the names of the study's entries if their recipes are equal. If it differs in another key, such as
    optim.lr, its loss names that key, so that it does not count as a seed of the study's cell. Raises UserError for a
    place without a finished run.
    """
    assert recipe.study is not None
    cells: dict[str, Cell] = {}
    for place in recipe.study.include:
        runs = {run_identity(run): _included_cell(run, recipe, where) for run, where in _finished_runs(place, recipe)}
        if not runs:
            raise UserError(
                f"study.include: {place}: no finished run; set a run directory, a folder of them or {MLFLOW}NAME"
            )
        cells = runs | cells
    return cells


def _finished_runs(place: str, recipe: Recipe) -> Iterator[tuple[RunDirectory, str]]:
    """The finished runs of an entry of ``study.include``, each with its path or MLflow name."""
    if place.startswith(MLFLOW):
        with tempfile.TemporaryDirectory() as folder:
            experiment = place.removeprefix(MLFLOW)
            for path, run_id in download_runs(tracking_uri(recipe), experiment, Path(folder)):
                yield RunDirectory(path), f"{MLFLOW}{experiment}/{run_id}"
        return
    parent = Path(place).expanduser()
    for path in [parent, *sorted(parent.glob("*/"))]:
        run = RunDirectory(path)
        if run.holds_a_run and run.result.is_file() and run.metrics.path.is_file():
            yield run, str(path)


def _included_cell(run: RunDirectory, study: Recipe, where: str) -> Cell:
    recipe = run.read_recipe()
    keys, axes = comparable(recipe), {name: _Axis.of(study, name) for name in SECTION}
    model = axes["models"].entry_of(keys) or model_name(recipe)
    data = axes["data"].entry_of(keys) or data_name(recipe)
    loss = axes["losses"].entry_of(keys) or loss_name(recipe)
    other = [
        key
        for key in differences(comparable(study), keys)
        if key != "seed" and not any(axis.varies(key) for axis in axes.values())
    ]
    if other:
        loss += f" (other {', '.join(other)})"
    return Cell(model, data, loss, recipe.seed, *_metrics(run), where)


@dataclass(frozen=True, slots=True)
class _Axis:
    """An axis of a study: its section, the keys of other sections that an entry sets, and the recipe of each entry."""

    section: str
    other_keys: frozenset[str]
    entries: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, study: Recipe, axis: str) -> _Axis:
        assert study.study is not None
        recipes = {
            name: comparable(with_changes(study, changes_of(axis, entry)))
            for name, entry in getattr(study.study, axis).items()
        }
        base = comparable(study)
        other_keys = frozenset(key for recipe in recipes.values() for key in differences(base, recipe))
        return cls(SECTION[axis], other_keys, recipes)

    def varies(self, key: str) -> bool:
        """Whether the entries of this axis may differ in a key."""
        return key.startswith(f"{self.section}.") or key in self.other_keys

    def entry_of(self, recipe: Mapping[str, Any]) -> str | None:
        """The first entry that equals the recipe in all keys that this axis varies; None without one."""
        equal = (name for name, entry in self.entries.items() if not any(map(self.varies, differences(entry, recipe))))
        return next(equal, None)


def _metrics(run: RunDirectory) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics after training, and those of the model before it."""
    before = last_values(record for record in run.metrics.read() if record["step"] == 0)
    return _floats(run.metrics.trained_values()), _floats(before)


def _floats(metrics: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in numbers(metrics).items() if name != "step"}


def require_same_recipe(recipe: Recipe, run: RunDirectory) -> None:
    """Raises UserError if a finished run has another recipe than its cell has now."""
    different = differences(comparable(run.read_recipe()), comparable(recipe))
    if different:
        keys = ", ".join(different)
        raise UserError(
            f"{run.path}: this cell finished with another {keys}; remove it to run it again, or set another name=..."
        )
