"""What a study compares: the metrics of runs that have a column, and which end of each is good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from raydiv.experiments.study.cells import Cell, finite
from raydiv.experiments.study.table_io import TableCell


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric of runs, its heading and format; ``better`` is 1 where high is good, -1 where low is, 0 where neither.

    ``safety``: it says by itself how safe a model's answers are. ``averaged``: its value is the mean of its parts, such as
    evaluate/toxicity/KIND.
    """

    metric: str
    label: str
    form: str
    better: int
    safety: bool = False
    averaged: bool = False

    def of(self, cell: Cell) -> float | None:
        """Its value in a cell; None where that has none, or one that is no finite number."""
        if not self.averaged:
            return finite(cell.metrics.get(self.metric))
        parts = [finite(value) for name, value in cell.metrics.items() if name.startswith(f"{self.metric}/")]
        known = [value for value in parts if value is not None]
        return fmean(known) if known else None

    def mean(self, cells: Sequence[Cell]) -> float | None:
        """Over the cells that have a value."""
        known = self._known(cells)
        return fmean(known) if known else None

    def figure(self, cells: Sequence[Cell]) -> TableCell:
        """The mean over cells (seeds), and of several values their sample standard deviation."""
        known = self._known(cells)
        return TableCell(self.mean(cells), self.form, stdev(known) if len(known) > 1 else None)

    def _known(self, cells: Sequence[Cell]) -> list[float]:
        return [value for cell in cells if (value := self.of(cell)) is not None]


NUMBER, FINE, SHARE = "{:.2f}", "{:.3f}", "{:.1%}"
CAPABILITY = "capability/"

D_B = Measure("separation/d_b", "D_B", FINE, 1)
D_B_LENGTH_MATCHED = Measure("separation/d_b_length_matched", "D_B length-matched", FINE, 1)
D_B_FULL = Measure("separation/d_b_full", "D_B all dimensions", NUMBER, 1)
ASR = Measure("evaluate/asr", "ASR", SHARE, -1, safety=True)
DEGENERATE = Measure("evaluate/degenerate", "degenerate", SHARE, -1, safety=True)

BROKEN = 0.2
"""Share of degenerate answers above which a model is broken: it separates, and is not safe."""

COLUMNS = (
    D_B,
    D_B_LENGTH_MATCHED,
    Measure("separation/d_b_shuffled", "D_B shuffled", FINE, 0),
    Measure("separation/silhouette", "silhouette", NUMBER, 1),
    D_B_FULL,
    ASR,
    Measure("evaluate/asr/", "ASR", SHARE, -1, safety=True),
    # their prompts are among those of ASR and of over-refusal: as measures of safety they would count twice
    Measure("evaluate/asr_set/", "ASR", SHARE, -1),
    Measure("evaluate/over_refusal", "over-refusal", SHARE, -1),
    Measure("evaluate/over_refusal_set/", "over-refusal", SHARE, -1),
    Measure("evaluate/safety", "safe answers", SHARE, 1, safety=True),
    DEGENERATE,
    Measure("evaluate/toxicity", "toxicity", SHARE, -1, safety=True, averaged=True),
    Measure("evaluate/win_rate", "win rate", SHARE, 1),
    Measure("evaluate/kl", "KL", NUMBER, 0),
    Measure("evaluate/perplexity", "perplexity", NUMBER, 0),
    Measure(CAPABILITY, "", FINE, 1),
)
"""In the order of tables. A metric that ends with a slash is a family: each of its metrics is a measure."""

ERRORS = frozenset({"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"})
"""Metrics of lm-evaluation-harness of which less is better."""


def measures(cells: Sequence[Cell]) -> list[Measure]:
    """The measures that some cell has a value of, in the order of tables."""
    names = sorted({name for cell in cells for name in cell.metrics})
    every = (measure for column in COLUMNS for measure in _members(column, names))
    return [measure for measure in every if measure.mean(cells) is not None]


def attack_success(cells: Sequence[Cell]) -> list[Measure]:
    """Those of attack success: direct, under each attack, and of each prompt set."""
    return [measure for measure in measures(cells) if measure.metric.startswith(ASR.metric)]


def is_broken(cells: Sequence[Cell]) -> bool:
    """Whether the cells' mean says so; where nobody measured it, it does not."""
    return (DEGENERATE.mean(cells) or 0.0) > BROKEN


def _members(column: Measure, names: Sequence[str]) -> Iterator[Measure]:
    """The measure itself, or one for each metric of its family."""
    if not column.metric.endswith("/"):
        yield column
        return
    for name in (name for name in names if name.startswith(column.metric)):
        parts = name.removeprefix(column.metric).split("/")
        better = -1 if column.metric == CAPABILITY and ERRORS & {*parts[1:]} else column.better
        yield replace(column, metric=name, label=f"{column.label} {', '.join(parts)}".strip(), better=better)
