"""Tables of figures, and their files: CSV with all digits, and Markdown for reading."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TableCell:
    """A number of a table and its format; None is a missing one. ``spread`` is its standard deviation over seeds."""

    value: float | None
    form: str = "{:.2f}"
    spread: float | None = None
    best: bool = False

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return " ± ".join(self._formatted(number) for number in (self.value, self.spread) if number is not None)

    def _formatted(self, number: float) -> str:
        text = self.form.format(number)
        return text.removeprefix("-") if re.fullmatch(r"-0(\.0+)?%?", text) else text


@dataclass(frozen=True, slots=True)
class TableRow:
    """The names that identify a row, and its figures."""

    words: tuple[str, ...]
    figures: tuple[TableCell, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a heading for each column, first those of words and then those of figures, and notes on them."""

    title: str
    header: tuple[str, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The title as a file name."""
        return slug(self.title)

    @property
    def keys(self) -> int:
        """The number of columns of words."""
        return len(self.rows[0].words) if self.rows else 0


def slug(title: str) -> str:
    """The title as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def write_tables(folder: Path, tables: Sequence[Table]) -> None:
    """Write SLUG.csv and SLUG.md of each table."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        with (folder / f"{table.slug}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            columns = _columns(table)
            writer.writerow(name for name, _ in columns)
            writer.writerows(zip(*(values for _, values in columns), strict=True))
        (folder / f"{table.slug}.md").write_text(markdown(table))


def markdown(table: Table) -> str:
    """Title, table and notes in Markdown; the best figures are bold."""
    rule = ["---"] * table.keys + ["---:"] * (len(table.header) - table.keys)
    rows = [
        [*map(_escaped, row.words), *(f"**{cell}**" if cell.best else str(cell) for cell in row.figures)]
        for row in table.rows
    ]
    lines = ["| " + " | ".join(line) + " |" for line in [[*map(_escaped, table.header)], rule, *rows]]
    notes = [f"- {_escaped(note)}" for note in table.notes]
    return "\n".join([f"## {_escaped(table.title)}", "", *lines, *([""] if notes else []), *notes, ""])


def _escaped(text: str) -> str:
    r"""The text without meaning in Markdown: a|b is a\|b. An underscore between letters needs no escape."""
    return re.sub(r"([\\`*|<>\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _columns(table: Table) -> list[tuple[str, list[str | float | None]]]:
    """The columns of a CSV file by name, figures with all digits. A column with spreads is followed by NAME sd."""
    columns: list[tuple[str, list[str | float | None]]] = []
    for n, name in enumerate(table.header):
        if n < table.keys:
            columns.append((name, [row.words[n] for row in table.rows]))
            continue
        figures = [row.figures[n - table.keys] for row in table.rows]
        columns.append((name, [figure.value for figure in figures]))
        if any(figure.spread is not None for figure in figures):
            columns.append((f"{name} sd", [figure.spread for figure in figures]))
    return columns
