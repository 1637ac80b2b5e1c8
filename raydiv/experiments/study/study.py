"""``raydiv study``: run the cells of a grid as Ray jobs, and compare them in the papers' tables."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raydiv.config import Recipe, save_recipe
from raydiv.experiments.shared import RunGroup, distinct_preparations, evaluate_baseline, prepare_all
from raydiv.experiments.study.cells import BASE, NO_DATA, Cell, baseline_cells, trained_cells
from raydiv.experiments.study.collect import cell_of, included_cells, require_same_recipe, run_identity
from raydiv.experiments.study.grid import PlannedCell, StudyGrid
from raydiv.experiments.study.jobs import CellJob, run_jobs
from raydiv.experiments.study.page import write_study_report
from raydiv.experiments.study.regression import ClaimTest, claim_tests
from raydiv.experiments.study.regression_table import claim_table
from raydiv.experiments.study.table_io import Table, write_tables
from raydiv.experiments.study.tables import tables_of
from raydiv.runs.directory import RunDirectory
from raydiv.runs.output_directory import OutputDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runs.resume import with_template_date
from raydiv.runs.tracker import MlflowTracker, forwarded_uri
from raydiv.runtime.model_pool import end_pool
from raydiv.runtime.resources import concurrent_runs
from raydiv.runtime.session import ray_session, require_dashboard
from raydiv.utils.claim import claim
from raydiv.utils.errors import UserError
from raydiv.utils.storage import intact, read_json, write_json
from raydiv.utils.versions import versions


class StudyDirectory(OutputDirectory):
    """The directory of a study. ``cells/`` holds the run directory, the recipe and the log of each cell."""

    kind = "study"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.tables = path / "tables"
        self.cells = path / "cells"

    def create(self, recipe: Recipe, resume: bool) -> dict[str, Any]:
        """Create the directory or, with ``resume``, reuse it; returns the content of study.json.

        Raises UserError if it holds a study without ``resume``, or something else.
        """
        started = self.has_started(resume=resume)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.cells.mkdir(exist_ok=True)
        if not started:
            self.write({"mlflow": {}})
        save_recipe(recipe, self.recipe)
        with intact(self.record):
            record = dict(read_json(self.record))
            return record | {"mlflow": dict(record["mlflow"])}

    def write(self, content: Mapping[str, Any]) -> None:
        """Write study.json."""
        write_json(self.record, content, indent=1)

    def run(self, cell: PlannedCell) -> RunDirectory:
        return RunDirectory(self.cells / cell.name)

    def is_finished(self, cell: PlannedCell) -> bool:
        return self.run(cell).result.is_file()


@dataclass(frozen=True, slots=True)
class StudyResult:
    """A finished study: its cells, their tables and regressions, and the error of each failed cell by name."""

    directory: StudyDirectory
    cells: list[Cell]
    tables: list[Table]
    claims: list[ClaimTest]
    failures: Mapping[str, str]
    mlflow: Mapping[str, str | None]

    def as_json(self) -> dict[str, Any]:
        """The content of study.json."""
        return {
            "cells": [asdict(cell) for cell in self.cells],
            "tables": [asdict(table) for table in self.tables],
            "claims": [claim.as_json() for claim in self.claims],
            "failures": dict(self.failures),
            "mlflow": dict(self.mlflow),
            "versions": versions(),
        }


def study(recipe: Recipe, *, resume: bool = False, display: ProgressDisplay | None = None) -> StudyResult:
    """Run the unfinished cells of the recipe's study, and compare all of its cells.

    ``resume`` continues a stopped study, and one that has more cells now; finished cells are not run again. A failed
    cell is reported and left out.

    Raises UserError, before any cell starts, if the recipe or its directory must change, and RuntimeError if no cell
    remains to compare.
    """
    display = display or ProgressDisplay()
    directory = StudyDirectory.of(recipe)
    with claim(directory.path, display.print):
        return _study(recipe, directory, resume, display)


def _study(recipe: Recipe, directory: StudyDirectory, resume: bool, display: ProgressDisplay) -> StudyResult:
    if recipe.study is None:
        raise UserError("study: missing section; set the models, data and losses to compare")
    # one date for all cells, also of a study that lasts over midnight
    recipe = with_template_date(recipe, directory.read_recipe() if directory.has_started(resume=resume) else None)
    grid, included = StudyGrid.of(recipe), included_cells(recipe)
    for cell in grid.cells:
        if resume and directory.is_finished(cell):
            require_same_recipe(cell.recipe, directory.run(cell))
    earlier = directory.create(recipe, resume)
    tracker = MlflowTracker(recipe, {"raydiv.kind": "study"}, display.print, earlier["mlflow"])
    mlflow = {"uri": tracker.uri, "run_id": tracker.run_id}
    directory.write(earlier | {"mlflow": mlflow})
    with tracker.end_on_error():
        base_cells, failures = _run(recipe, grid, directory, tracker.run_id, display)
        finished = [cell for cell in grid.cells if directory.is_finished(cell)]
        cells = {run_identity(directory.run(cell)): cell_of(directory.run(cell), cell) for cell in finished}
        others = [cell for identity, cell in included.items() if identity not in cells]
        if len(others) < len(included):
            display.print(
                f"study.include: runs that are cells of this study, counted once: {len(included) - len(others)}"
            )
        result = _compare(directory, [*base_cells, *cells.values(), *others], failures, mlflow)
        for path in (directory.record, directory.recipe, directory.report, *sorted(directory.tables.iterdir())):
            tracker.log_artifact(path)
    tracker.finish()
    return result


def _run(
    recipe: Recipe, grid: StudyGrid, directory: StudyDirectory, mlflow_run: str | None, display: ProgressDisplay
) -> tuple[list[Cell], dict[str, str]]:
    """Measure the baselines and train the unfinished cells; returns base cells, and the error of each failed cell."""
    assert recipe.study is not None
    unfinished = [cell for cell in grid.cells if not directory.is_finished(cell)]
    if not unfinished and not grid.baselines:
        return [], {}
    with ray_session(recipe.cluster, dashboard=True):
        require_dashboard("raydiv study")
        base_cells = [_baseline_cell(name, baseline, display) for name, baseline in grid.baselines.items()]
        if not unfinished:
            return base_cells, {}
        prepare_all(distinct_preparations([cell.recipe for cell in unfinished]), display)
        end_pool()  # the cells have pools of their own
        runs, cluster = concurrent_runs(recipe.cluster, recipe.study.max_concurrent)
        group = RunGroup(directory.cells, cluster, forwarded_uri(recipe), mlflow_run)
        jobs = [_cell_job(cell, directory, group) for cell in unfinished]
        return base_cells, _run_jobs(jobs, runs, recipe.study.keep_models, display)


def _baseline_cell(name: str, recipe: Recipe, display: ProgressDisplay) -> Cell:
    """The base cell of a model that is measured and not trained."""
    metrics = evaluate_baseline(recipe, display)
    return Cell(name, NO_DATA, BASE, 0, metrics, metrics, recipe.model.id)


def _cell_job(cell: PlannedCell, directory: StudyDirectory, group: RunGroup) -> CellJob:
    """The job that trains a cell; writes its recipe."""
    tags = {"raydiv.model": cell.model, "raydiv.data": cell.data, "raydiv.loss": cell.loss}
    path = directory.cells / f"{cell.name}.yaml"
    save_recipe(group.member_recipe(cell.recipe, cell.name, tags), path)
    log = directory.cells / f"{cell.name}.log"
    return CellJob(cell.name, path, directory.run(cell).path, log, frozenset(cell.recipe.cluster.env))


def _run_jobs(jobs: Sequence[CellJob], runs: int, keep_models: bool, display: ProgressDisplay) -> dict[str, str]:
    """Run the jobs, ``runs`` at a time; returns the error of each failed one by name."""
    failures: dict[str, str] = {}
    ended: list[str] = []
    with display.phase("cells") as update:
        update(0, len(jobs))

        def on_end(job: CellJob, error: str | None) -> None:
            ended.append(job.name)
            if error is not None:
                failures[job.name] = error
                display.print(f"cell {job.name} failed: {error} ({job.log})")
            elif not keep_models:
                run = RunDirectory(job.run)
                shutil.rmtree(run.model, ignore_errors=True)
                run.remove_checkpoints()
            update(len(ended), len(jobs), job.name)

        run_jobs(jobs, runs, on_end, display.print)
    return failures


def _compare(
    directory: StudyDirectory, cells: Sequence[Cell], failures: Mapping[str, str], mlflow: Mapping[str, str | None]
) -> StudyResult:
    """Write tables, report and study.json. Raises RuntimeError without a cell."""
    if not cells:
        name, error = next(iter(failures.items()))
        raise RuntimeError(f"all cells failed; cell {name}: {error}")
    trained = trained_cells(cells)
    measured = {cell.model for cell in cells if cell.is_base}
    all_cells = [*(cell for cell in baseline_cells(trained) if cell.model not in measured), *cells]
    tables, claims = tables_of(all_cells), claim_tests(all_cells)
    result = StudyResult(directory, all_cells, tables, claims, failures, mlflow)
    for folder in (directory.tables, directory.pictures):  # an extended study has others
        shutil.rmtree(folder, ignore_errors=True)
    write_tables(directory.tables, [*tables, claim_table(claims)])
    directory.write(result.as_json())
    axes = {"Models": "model", "Data": "data", "Losses": "loss", "Seeds": "seed"}
    facts = {
        label: ", ".join(dict.fromkeys(str(getattr(cell, axis)) for cell in trained)) for label, axis in axes.items()
    }
    write_study_report(
        directory.report,
        directory.pictures,
        {
            "name": directory.path.name,
            "facts": facts,
            "cells": all_cells,
            "tables": tables,
            "claims": claims,
            "notes": [f"cell {name} failed and is left out: {error}" for name, error in failures.items()],
        },
    )
    return result
