"""Tables of figures, and how they are written: as CSV with all digits, and as Markdown for people."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TableCell:
    """A number of a table and its format; None where there is none. ``spread`` is its standard deviation over seeds."""

    value: float | None
    form: str = "{:.2f}"
    spread: float | None = None
    best: bool = False

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self._shown(self.spread)}"
        return "-" if self.value is None else self._shown(self.value) + spread

    def _shown(self, value: float) -> str:
        shown = self.form.format(value)
        return shown.removeprefix("-") if re.fullmatch(r"-0(\.0+)?%?", shown) else shown


@dataclass(frozen=True, slots=True)
class TableRow:
    """What a row is of, in words, and its figures."""

    words: tuple[str, ...]
    figures: tuple[TableCell, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A heading for each column of words and then of figures, and what must be read beside the rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """Its title as the name of a file."""
        return slug(self.title)

    @property
    def keys(self) -> int:
        """How many columns are of words."""
        return len(self.rows[0].words) if self.rows else 0


def slug(words: str) -> str:
    """Words as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def write_tables(folder: Path, tables: Sequence[Table]) -> None:
    """SLUG.csv and SLUG.md of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        with (folder / f"{table.slug}.csv").open("w", newline="") as content:
            csv.writer(content, lineterminator="\n").writerows(_in_full(table))
        (folder / f"{table.slug}.md").write_text(markdown(table))


def markdown(table: Table) -> str:
    """Title, table and notes; the best figures are bold."""
    rule = ["---"] * table.keys + ["---:"] * (len(table.header) - table.keys)
    rows = [[*map(_plain, row.words), *map(_marked, row.figures)] for row in table.rows]
    lines = ["| " + " | ".join(line) + " |" for line in [[*map(_plain, table.header)], rule, *rows]]
    notes = [f"- {_plain(note)}" for note in table.notes]
    return "\n".join([f"## {_plain(table.title)}", "", *lines, *([""] if notes else []), *notes, ""])


def _marked(figure: TableCell) -> str:
    return f"**{figure}**" if figure.best else str(figure)


def _plain(words: str) -> str:
    r"""In Markdown nothing of a name has a meaning: a|b is a\|b. An underscore between letters has none anyway."""
    return re.sub(r"([\\`*|<>\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(words.split()))


def _in_full(table: Table) -> list[list[str | float]]:
    """Header and rows; a figure that is none is empty, and a column with spreads is followed by one of them."""
    names = table.header[table.keys :]
    spread = [any(row.figures[n].spread is not None for row in table.rows) for n in range(len(names))]
    header: list[str | float] = [*table.header[: table.keys]]
    for name, has in zip(names, spread, strict=True):
        header += [name, f"{name} sd"] if has else [name]
    return [header, *([*row.words, *_digits(row.figures, spread)] for row in table.rows)]


def _digits(figures: Sequence[TableCell], spread: Sequence[bool]) -> list[str | float]:
    pairs = zip(figures, spread, strict=True)
    ends = [end for figure, has in pairs for end in ((figure.value, figure.spread) if has else (figure.value,))]
    return ["" if end is None else end for end in ends]
