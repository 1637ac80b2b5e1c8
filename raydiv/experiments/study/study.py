"""``raydiv study``: run the cells of a grid as Ray jobs, and print the papers' tables of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raydiv.config import Recipe, save_recipe
from raydiv.experiments.shared import RunGroup, distinct_preparations, evaluate_baseline, prepare_all
from raydiv.experiments.study.cells import BASE, NO_DATA, Cell, baseline_cells, trained_cells
from raydiv.experiments.study.collect import cell_of, identity, included, require_same
from raydiv.experiments.study.grid import PlannedCell, baselines, planned_cells
from raydiv.experiments.study.jobs import CellJob, run_jobs
from raydiv.experiments.study.page import write_study_report
from raydiv.experiments.study.regression import ClaimTest, claim_table, claim_tests
from raydiv.experiments.study.table_io import Table, write_tables
from raydiv.experiments.study.tables import tables_of
from raydiv.runs.directory import RunDirectory
from raydiv.runs.output_directory import OutputDirectory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runs.tracker import MlflowTracker, forwarded_environment
from raydiv.runtime.resources import concurrent_runs
from raydiv.runtime.session import ray_session, require_dashboard
from raydiv.utils.errors import UserError
from raydiv.utils.storage import read_json, write_json
from raydiv.utils.versions import versions


class StudyDirectory(OutputDirectory):
    """The directory of a study; its cells are runs under ``cells/``, with the recipe and the log of each beside it."""

    kind = "study"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.tables = path / "tables"
        self.cells = path / "cells"

    def create(self, recipe: Recipe, resume: bool) -> dict[str, Any]:
        """Make the directory this study's; returns what an earlier attempt wrote into study.json.

        Raises UserError where something else is there, or a study that is not to be resumed.
        """
        begun = self.has_started(resume=resume)
        self.cells.mkdir(parents=True, exist_ok=True)
        if not begun:
            self.write({"mlflow": {}})
        save_recipe(recipe, self.recipe)
        record: dict[str, Any] = read_json(self.record)
        return record

    def write(self, content: Mapping[str, Any]) -> None:
        """Write study.json."""
        write_json(self.record, content, indent=1)

    def run(self, plan: PlannedCell) -> RunDirectory:
        return RunDirectory(self.cells / plan.name)


@dataclass(frozen=True, slots=True)
class StudyResult:
    """A finished study: its directory, its cells, their tables and the test of the claim, and why cells failed, by name."""

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
            "claims": [asdict(claim) for claim in self.claims],
            "failures": dict(self.failures),
            "mlflow": dict(self.mlflow),
            "versions": versions(),
        }


def study(recipe: Recipe, *, resume: bool = False, display: ProgressDisplay | None = None) -> StudyResult:
    """Run the cells of the recipe's study that are not finished, and compare all of them.

    ``resume`` goes on with a study that was stopped, or that has more cells now; finished ones are not run again. A cell that
    fails is left out, and said. Raises UserError for what the user must change, before any cell starts; RuntimeError when there
    is no cell to compare.
    """
    display = display or ProgressDisplay()
    if recipe.study is None:
        raise UserError("the recipe has no section study: it says which models, data and losses are compared")
    grid, plain, there = planned_cells(recipe), baselines(recipe), included(recipe)
    directory = StudyDirectory.of(recipe)
    for plan in grid:
        if resume and directory.run(plan).result.is_file():
            require_same(plan.recipe, directory.run(plan))
    earlier = directory.create(recipe, resume)
    tracker = MlflowTracker(recipe, {"raydiv.kind": "study"}, display.print, earlier["mlflow"])
    mlflow = {"uri": tracker.uri, "run_id": tracker.run_id}
    directory.write(earlier | {"mlflow": mlflow})
    missing = [plan for plan in grid if not directory.run(plan).result.is_file()]
    with tracker.told_of_its_end():
        measured, failures = _run(recipe, directory, missing, plain, tracker.run_id, display)
        finished = [plan for plan in grid if directory.run(plan).result.is_file()]
        own = {identity(directory.run(plan)): cell_of(directory.run(plan), plan) for plan in finished}
        others = [cell for run, cell in there.items() if run not in own]
        if len(others) < len(there):
            display.print(
                f"included runs that are cells of the study itself: {len(there) - len(others)}; each counts once"
            )
        cells = [*measured, *own.values(), *others]
        found = _conclude(directory, cells, failures, mlflow)
        for path in (directory.record, directory.recipe, directory.report, *sorted(directory.tables.iterdir())):
            tracker.artifact(path)
    tracker.finish()
    return found


def _run(
    recipe: Recipe,
    directory: StudyDirectory,
    missing: Sequence[PlannedCell],
    plain: Mapping[str, Recipe],
    parent: str | None,
    display: ProgressDisplay,
) -> tuple[list[Cell], dict[str, str]]:
    """Measure the baselines and run the cells; the former as cells, and why those that failed did, by name."""
    if not missing and not plain:
        return [], {}
    section = recipe.study
    assert section is not None
    with ray_session(recipe.cluster, dashboard=True):
        require_dashboard("raydiv study")
        measured = [_baseline(name, own, display) for name, own in plain.items()]
        if not missing:
            return measured, {}
        prepare_all(distinct_preparations([plan.recipe for plan in missing]), display)
        room, part = concurrent_runs(recipe.cluster, section.max_concurrent)
        family = RunGroup(directory.cells, part, forwarded_environment(recipe), parent)
        jobs = [_job(plan, directory, family) for plan in missing]
        return measured, _run_all(jobs, room, section.keep_models, display)


def _baseline(name: str, recipe: Recipe, display: ProgressDisplay) -> Cell:
    """A model that is measured and not trained."""
    metrics = evaluate_baseline(recipe, display)
    return Cell(name, NO_DATA, BASE, 0, metrics, metrics, recipe.model.id)


def _run_all(jobs: Sequence[CellJob], room: int, keep_models: bool, display: ProgressDisplay) -> dict[str, str]:
    failures: dict[str, str] = {}
    over: list[str] = []
    with display.phase("cells") as update:
        update(0, len(jobs))

        def ended(job: CellJob, error: str | None) -> None:
            over.append(job.name)
            if error is not None:
                failures[job.name] = error
                display.print(f"cell {job.name} failed: {error} ({job.log})")
            elif not keep_models:
                run = RunDirectory(job.run)
                shutil.rmtree(run.model, ignore_errors=True)
                run.remove_checkpoints()
            update(len(over), len(jobs), job.name)

        run_jobs(jobs, room, ended, display.print)
    return failures


def _job(plan: PlannedCell, directory: StudyDirectory, family: RunGroup) -> CellJob:
    """A cell as a job."""
    run = directory.run(plan)
    tags = {"raydiv.model": plan.model, "raydiv.data": plan.data, "raydiv.loss": plan.loss}
    path = directory.cells / f"{plan.name}.yaml"
    save_recipe(family.member_recipe(plan.recipe, plan.name, tags), path)
    log = directory.cells / f"{plan.name}.log"
    return CellJob(plan.name, path, run.path, log, frozenset(plan.recipe.cluster.env))


def _conclude(
    directory: StudyDirectory, cells: Sequence[Cell], failures: Mapping[str, str], mlflow: Mapping[str, str | None]
) -> StudyResult:
    """Write tables, report and study.json. Raises RuntimeError where there is nothing to compare."""
    if not cells:
        first = next(iter(failures.items()))
        raise RuntimeError(f"every cell failed, the first ({first[0]}) with: {first[1]}")
    named = {cell.model for cell in cells if cell.is_base}
    whole = [*(base for base in baseline_cells(trained_cells(cells)) if base.model not in named), *cells]
    tables, claims = tables_of(whole), claim_tests(whole)
    found = StudyResult(directory, whole, tables, claims, failures, mlflow)
    write_tables(directory.tables, [*tables, claim_table(claims)])
    directory.write(found.as_json())
    own = trained_cells(whole)
    axes = {"Models": "model", "Data": "data", "Losses": "loss", "Seeds": "seed"}
    facts = {label: ", ".join(dict.fromkeys(str(getattr(cell, axis)) for cell in own)) for label, axis in axes.items()}
    notes = [f"the cell {name} failed and is left out: {error}" for name, error in failures.items()]
    write_study_report(
        directory.report,
        directory.pictures,
        {
            "name": directory.path.name,
            "facts": facts,
            "cells": whole,
            "tables": tables,
            "claims": claims,
            "notes": notes,
        },
    )
    return found
