"""The report of a study: its regression of attack success on separation, its pictures and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from raydiv.experiments.study.cells import Cell, trained_cells
from raydiv.experiments.study.figures import cell_pictures, claim_pictures
from raydiv.experiments.study.regression import ClaimTest
from raydiv.experiments.study.regression_table import claim_table
from raydiv.experiments.study.table_io import Table
from raydiv.runs.report.drawing import write_pictures
from raydiv.runs.report.html import render


class StudyRecord(TypedDict):
    """The content of a study's report. ``tables`` and ``claims`` are those of ``cells``, which may hold base cells."""

    name: str
    facts: Mapping[str, str]
    cells: Sequence[Cell]
    tables: Sequence[Table]
    claims: Sequence[ClaimTest]
    notes: Sequence[str]


def write_study_report(path: Path, pictures: Path, record: StudyRecord) -> None:
    """Write the page to ``path``, and a PNG of each of its pictures to the folder ``pictures``."""
    scatter_plots, dot_plots = claim_pictures(record["claims"]), cell_pictures(record["cells"])
    write_pictures(pictures, [*scatter_plots, *dot_plots])
    claims = claim_table(record["claims"])
    page = render(
        "experiments/study/page.html",
        title=record["name"],
        facts=record["facts"],
        claim_pictures=scatter_plots,
        claims=_context(claims) if claims.rows else None,
        cell_pictures=dot_plots,
        tables=[_context(table) for table in record["tables"]],
        study_notes=record["notes"],
        runs=[(", ".join(cell.key), cell.seed, cell.where) for cell in trained_cells(record["cells"])],
    )
    path.write_text(page)


def _context(table: Table) -> dict[str, Any]:
    """A table for the template; the columns that identify a row become one."""
    return {
        "title": table.title,
        "headings": [", ".join(table.header[: table.keys]), *table.header[table.keys :]],
        "rows": [
            (", ".join(row.words), [(None if cell.value is None else str(cell), cell.best) for cell in row.figures])
            for row in table.rows
        ],
        "notes": table.notes,
    }
