"""The measures of a study: the metrics of its runs that are columns of its tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from raydiv.experiments.study.cells import Cell, finite
from raydiv.runs.metric_registry import Better, MetricSpec, spec_of


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric of runs as a column.

    ``safety``: the metric alone says how safe a model's answers are. ``averaged``: its value is the mean over the
    metrics whose names continue its own, such as evaluate/toxicity/KIND.
    """

    spec: MetricSpec
    safety: bool = False
    averaged: bool = False

    @classmethod
    def of_metric(cls, metric: str, *, safety: bool = False, averaged: bool = False) -> Measure:
        return cls(spec_of(metric), safety, averaged)

    @property
    def metric(self) -> str:
        return self.spec.name

    @property
    def label(self) -> str:
        return self.spec.heading

    @property
    def form(self) -> str:
        return self.spec.fine_format

    @property
    def better(self) -> Better:
        return self.spec.better

    def value_in(self, cell: Cell) -> float | None:
        """The value in a cell; None where it is missing or not finite."""
        if not self.averaged:
            return finite(cell.metrics.get(self.metric))
        values = [finite(value) for name, value in cell.metrics.items() if name.startswith(f"{self.metric}/")]
        finite_values = [value for value in values if value is not None]
        return fmean(finite_values) if finite_values else None

    def mean(self, cells: Sequence[Cell]) -> float | None:
        """The mean over the cells that have a value."""
        values = [value for cell in cells if (value := self.value_in(cell)) is not None]
        return fmean(values) if values else None


D_B = Measure.of_metric("separation/d_b")
D_B_LENGTH_MATCHED = Measure.of_metric("separation/d_b_length_matched")
MAHALANOBIS = Measure.of_metric("separation/mahalanobis")
ASR = Measure.of_metric("evaluate/asr", safety=True)
DEGENERATE = Measure.of_metric("evaluate/degenerate", safety=True)
DEPTH = (Measure.of_metric("evaluate/depth/half"), Measure.of_metric("eval/depth/half"))
"""The tokens by which half of a divergence lies, where there is one."""

BROKEN = 0.2
"""Share of degenerate answers above which a model is broken: it separates, and is not safe."""

COLUMNS = (
    D_B,
    D_B_LENGTH_MATCHED,
    Measure.of_metric("separation/d_b_shuffled"),
    Measure.of_metric("separation/silhouette"),
    MAHALANOBIS,
    ASR,
    Measure.of_metric("evaluate/asr/{attack}", safety=True),
    # a set's prompts are among those of ASR and of over-refusal: as measures of safety they would count twice
    Measure.of_metric("evaluate/asr_set/{set}"),
    # the same answers, by other judges
    Measure.of_metric("evaluate/asr_judge/{judge}"),
    Measure.of_metric("evaluate/over_refusal"),
    Measure.of_metric("evaluate/over_refusal_set/{set}"),
    # what is left of direct attack success: as a measure of safety it would count twice
    Measure.of_metric("evaluate/safety"),
    DEGENERATE,
    Measure.of_metric("evaluate/toxicity", safety=True, averaged=True),
    Measure.of_metric("evaluate/win_rate"),
    Measure.of_metric("evaluate/kl"),
    *DEPTH,
    Measure.of_metric("evaluate/perplexity"),
    Measure.of_metric("capability/{score}"),
)
"""In the order of tables. Each metric of a family is a measure."""


def measures(cells: Sequence[Cell]) -> list[Measure]:
    """The measures that at least one cell has a value of, in the order of tables."""
    specs = [spec_of(name) for name in sorted({name for cell in cells for name in cell.metrics}, key=_natural)]
    columns = [
        measure
        for column in COLUMNS
        for measure in (
            [replace(column, spec=spec) for spec in specs if spec.family == column.metric]
            if column.spec.is_family
            else [column]
        )
    ]
    return [measure for measure in columns if measure.mean(cells) is not None]


def _natural(name: str) -> list[str | int]:
    """A key that sorts the numbers in a name by their values."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def attack_success(cells: Sequence[Cell]) -> list[Measure]:
    """The measures of attack success: direct, under each attack, and of each prompt set."""
    return [measure for measure in measures(cells) if measure.metric.startswith(ASR.metric)]


def is_broken(cells: Sequence[Cell]) -> bool:
    """Whether the mean share of degenerate answers exceeds BROKEN; False where it was not measured."""
    return (DEGENERATE.mean(cells) or 0.0) > BROKEN
