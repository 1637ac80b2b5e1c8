"""The report of a study: whether separation predicts safety over its models, data and losses, and every table of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TypedDict

from raydiv.experiments.study.cells import Cell, trained_cells
from raydiv.experiments.study.figures import cell_pictures, claim_pictures
from raydiv.experiments.study.regression import ClaimTest, claim_table
from raydiv.experiments.study.table_io import Table, TableCell, TableRow
from raydiv.runs.report.drawing import write_pictures
from raydiv.runs.report.html import document, figures, note_list, paragraph, scroll, section
from raydiv.runs.report.html import table as plain_table

CLAIM = """The papers' claim is that a loss which estimates the divergence better drives safe and harmful prompts further apart,
and that this predicts resistance to attack: attack success should fall as the logarithm of D_B grows, within each model.
Read it only beside degenerate answers (a broken model separates, and is not safe) and beside the length-matched D_B (prompts
of different lengths are apart whatever their harm)."""

RANKS = (
    """Of the losses on one model and data the best by a measure has rank 1; ranks are averaged over models and data."""
)

BEST = """Bold: the best of the losses on one model and data, broken models apart. KL and perplexity say how far a model
has drifted; neither end of them is good by itself."""

NOTHING = "There are no cells to test it on."


class StudyRecord(TypedDict):
    """What a study's report is made of; ``cells`` may hold base cells, ``tables`` and ``claims`` are made of the same."""

    name: str
    facts: Mapping[str, str]
    cells: Sequence[Cell]
    tables: Sequence[Table]
    claims: Sequence[ClaimTest]
    notes: Sequence[str]


def write_study_report(path: Path, pictures: Path, record: StudyRecord) -> None:
    """Leave the page at ``path``, and a PNG of each of its pictures in the folder ``pictures``."""
    on_claims, of_cells = claim_pictures(record["claims"]), cell_pictures(record["cells"])
    write_pictures(pictures, [*on_claims, *of_cells])
    tested = claim_table(record["claims"])
    sections = [
        section(
            "Attack success and separation", paragraph(CLAIM), figures(on_claims), _shown(tested) or paragraph(NOTHING)
        ),
        section("Loss by loss", figures(of_cells)) if of_cells else "",
        *(section(escape(table.title), _words(table), _shown(table)) for table in record["tables"]),
        section("Notes", note_list(record["notes"])) if record["notes"] else "",
        section("Runs", _runs(trained_cells(record["cells"]))),
    ]
    path.write_text(document(record["name"], record["facts"], sections))


def _words(table: Table) -> str:
    """What must be known to read a table."""
    known = {"Cells": BEST, "Average rank": RANKS}
    return paragraph(known[table.title]) if table.title in known else ""


def _shown(table: Table) -> str:
    """A table and its notes; nothing without rows."""
    if not table.rows:
        return ""
    heads = [", ".join(table.header[: table.keys]), *table.header[table.keys :]]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "\n".join(map(_row, table.rows))
    whole = f'<table class="wide">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
    return f"{scroll(whole, escape(table.title))}\n{note_list(table.notes)}"


def _row(row: TableRow) -> str:
    return f'<tr><th scope="row">{escape(", ".join(row.words))}</th>{"".join(map(_figure, row.figures))}</tr>'


def _figure(figure: TableCell) -> str:
    if figure.value is None:
        return "<td>&ndash;</td>"
    words = str(figure).replace("-", "&minus;")
    return f"<td><strong>{words}</strong></td>" if figure.best else f"<td>{words}</td>"


def _runs(cells: Sequence[Cell]) -> str:
    rows = [(", ".join(cell.key), str(cell.seed), cell.where) for cell in cells]
    return plain_table("Where each cell's run is", ["seed", "run"], rows) if rows else paragraph("There are none.")
