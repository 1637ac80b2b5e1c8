"""The tables of a study: its cells, the average rank of each loss, and each two kinds of data against each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from math import nan, sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t, wilcoxon

from raydiv.experiments.study.cells import Cell, Key, finite, grouped_cells, trained_cells
from raydiv.experiments.study.comparisons import Comparison, comparison_table, comparisons_of, holds
from raydiv.experiments.study.measures import BROKEN, Measure, is_broken, measures
from raydiv.experiments.study.table_io import Table, TableCell, TableRow

AXES = ["model", "data", "loss"]

FEWEST_DIFFERENCES = 6
"""Differences that Wilcoxon's test needs: of five of one sign even the smallest two-sided p is 2 / 2^5 = 0.06."""


def tables_of(cells: Sequence[Cell]) -> list[Table]:
    """All tables that have rows; base cells are rows of the first."""
    data = dict.fromkeys(cell.data for cell in trained_cells(cells))
    of_data = [
        table
        for first, second in combinations(data, 2)
        for table in (against(cells, first, second), paired(cells, first, second))
    ]
    losses = comparisons_of(cells)
    first_tables = (cell_table(cells, losses), comparison_table(losses), rank_table(cells))
    return [table for table in (*first_tables, *of_data) if table.rows]


@dataclass(frozen=True, slots=True)
class SeedStatistics:
    """The mean and the sample standard deviation of each measure over the cells that differ only in their seed.

    Both frames have a row for each (model, data, loss) and a column for each measure's metric. They hold NaN where no
    cell has a value, or only one for a standard deviation.
    """

    measures: list[Measure]
    mean: pd.DataFrame
    deviation: pd.DataFrame

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> SeedStatistics:
        known, ordered = measures(cells), list(chain(*grouped_cells(cells).values()))
        index = pd.MultiIndex.from_tuples([cell.key for cell in ordered], names=AXES)
        values = {measure.metric: [measure.value_in(cell) for cell in ordered] for measure in known}
        seeds = pd.DataFrame(values, index, dtype=float).groupby(level=AXES, sort=False)
        return cls(known, seeds.mean(), seeds.std())

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(measure.label for measure in self.measures)

    def figures(self, key: Key) -> tuple[TableCell, ...]:
        """The figures of a row, a cell for each measure."""
        return tuple(
            TableCell(finite(mean), measure.form, finite(deviation))
            for measure, mean, deviation in zip(
                self.measures, _row(self.mean, key), _row(self.deviation, key), strict=True
            )
        )


def cell_table(cells: Sequence[Cell], comparisons: Sequence[Comparison] = ()) -> Table:
    """A row for each model, data and loss: means over seeds, and their sample standard deviations.

    The best loss of each model and data is marked for each measure that has a good end, unless all of them are equal.
    By a rate that ``comparisons`` compare it is marked only where it differs from every other loss. Broken models are
    never marked.
    """
    header = ("model", "data", "loss")
    if not cells:
        return Table("Cells", header, ())
    groups, statistics = grouped_cells(cells), SeedStatistics.of(cells)
    broken = [key for key, group in groups.items() if is_broken(group)]
    scores = statistics.mean.drop(broken) * [measure.better for measure in statistics.measures]
    blocks = scores.groupby(level=AXES[:2])
    highest, lowest = blocks.transform("max"), blocks.transform("min")
    best = (scores.eq(highest) & highest.ne(lowest)).reindex(statistics.mean.index, fill_value=False)
    compared = [metric for metric in best.columns if any(one.metric == metric for one in comparisons)]
    for metric in compared:
        best[metric] &= np.array([holds(comparisons, key, metric, _others(key, groups, broken)) for key in groups])
    rows = tuple(TableRow(key, _marked(statistics.figures(key), _row(best, key))) for key in groups)
    notes = []
    seeds = sorted({len(group) for group in groups.values() if not group[0].is_base})
    if seeds and seeds[-1] > 1:
        count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        notes.append(f"mean ± sample standard deviation over seeds ({count} for each loss)")
    if compared:
        notes.append(
            "the best ASR and over-refusal are marked where they differ from those of every other model that is not "
            "broken, over the same prompts"
        )
    if broken:
        notes.append(f"broken models (more than {BROKEN:.0%} degenerate answers), never marked as best: {len(broken)}")
    return Table("Cells", (*header, *statistics.labels), rows, tuple(notes))


def _others(key: Key, groups: Iterable[Key], broken: Sequence[Key]) -> list[str]:
    """The other losses on the same model and data, without broken ones."""
    return [other[2] for other in groups if other[:2] == key[:2] and other != key and other not in broken]


def _row(frame: pd.DataFrame, key: Key | str) -> list[Any]:
    """The values of a row in the order of the columns."""
    row: list[Any] = frame.xs(key).to_numpy().tolist()
    return row


def _marked(figures: Sequence[TableCell], best: Sequence[bool]) -> tuple[TableCell, ...]:
    return tuple(replace(figure, best=mark) for figure, mark in zip(figures, best, strict=True))


def rank_table(cells: Sequence[Cell]) -> Table:
    """The average rank of each loss by each measure that has a good end, and by all measures of safety.

    The losses on one model and data are ranked by their means over seeds: 1 is the best, and ties share their average
    rank. A loss's rank is averaged over models and data. A model and data that lack a loss are left out: they would
    favour the ranks of the others. Without a second loss the table has no rows.
    """
    trained = trained_cells(cells)
    losses = list(dict.fromkeys(cell.loss for cell in trained))
    if len(losses) < 2:
        return Table("Average rank", ("loss",), ())
    statistics = SeedStatistics.of(trained)
    ranked = [measure for measure in statistics.measures if measure.better]
    labels = {measure.metric: measure.label for measure in ranked}
    ranks = pd.DataFrame({m.metric: _average_ranks(statistics.mean[m.metric] * m.better) for m in ranked}, losses)
    notes = _incomplete_blocks(statistics.mean, losses, labels)
    safety = [measure.metric for measure in ranked if measure.safety and ranks[measure.metric].notna().any()]
    if safety:
        ranks.insert(0, "safety", ranks[safety].mean(axis=1))
        notes.insert(0, f"safety: the mean of the ranks by {', '.join(labels[metric] for metric in safety)}")
    best = ranks.eq(ranks.min()) & ranks.min().ne(ranks.max())
    rows = tuple(
        TableRow((loss,), _marked([TableCell(finite(rank)) for rank in _row(ranks, loss)], _row(best, loss)))
        for loss in losses
    )
    return Table("Average rank", ("loss", *(["safety"] if safety else []), *labels.values()), rows, tuple(notes))


def _average_ranks(scores: pd.Series[float]) -> pd.Series[float]:
    """The rank of each loss, averaged over the models and data that have a score of every loss; NaN without any."""
    return scores.round(12).unstack("loss").dropna().rank(axis=1, ascending=False).mean()


def _incomplete_blocks(means: pd.DataFrame, losses: list[str], labels: dict[str, str]) -> list[str]:
    """A note for each model and data that lack a loss, by all measures or by some."""
    notes = []
    for (model, data), block in means[list(labels)].groupby(level=AXES[:2], sort=False):
        missing = block.droplevel(["model", "data"]).reindex(losses).isna()
        by_losses: dict[tuple[str, ...], list[str]] = {}
        for metric, label in labels.items():
            by_losses.setdefault(tuple(missing.index[missing[metric]]), []).append(label)
        for absent, lacking in by_losses.items():
            where = "" if len(lacking) == len(labels) else f" by {', '.join(lacking)}"
            if absent:
                notes.append(f"left out: {model} on {data}{where}, which lacks {', '.join(absent)}")
    return notes


def against(cells: Sequence[Cell], first: str, second: str) -> Table:
    """Both kinds of data and their difference by each measure, for each model and loss that was trained on both."""
    statistics, rows = SeedStatistics.of(trained_cells(cells)), []
    means = statistics.mean
    for model, loss in dict.fromkeys((model, loss) for model, _, loss in means.index):
        keys = (model, first, loss), (model, second, loss)
        if all(key in means.index for key in keys):
            means_of_both = (_row(means, key) for key in keys)
            figures = (
                TableCell(finite(mean - other), _signed(measure.form))
                for measure, mean, other in zip(statistics.measures, *means_of_both, strict=True)
            )
            rows += [TableRow((model, loss, key[1]), statistics.figures(key)) for key in keys]
            rows.append(TableRow((model, loss, "difference"), tuple(figures)))
    return Table(f"{first} against {second}", ("model", "loss", "data", *statistics.labels), tuple(rows))


def paired(cells: Sequence[Cell], first: str, second: str) -> Table:
    """The mean difference of the two kinds of data by each measure, over the n pairs of model and loss with both.

    The 95% interval of the mean d is d +- t(0.975; n - 1) s / sqrt(n), where s is the sample standard deviation of the
    differences. p is that of Wilcoxon's signed-rank test, given FEWEST_DIFFERENCES or more that are not all 0.
    """
    statistics, rows = SeedStatistics.of(trained_cells(cells)), []
    for measure in statistics.measures:
        pairs = statistics.mean[measure.metric].unstack("data").reindex(columns=[first, second]).dropna()
        if not pairs.empty:
            values = list(zip(pairs[first], pairs[second], strict=True))
            rows.append(TableRow((measure.label,), _paired_figures(values, measure.form)))
    header = ("measure", "pairs", first, second, "difference", "95% low", "95% high", "Wilcoxon p")
    note = "intervals are too narrow and p is too small: pairs of one model, or of one loss, count as independent"
    return Table(f"{first} against {second}: paired differences", header, tuple(rows), (note,))


def _paired_figures(pairs: Sequence[tuple[float, float]], form: str) -> tuple[TableCell, ...]:
    """Number of pairs, both means, mean difference, the ends of its interval, and p."""
    differences = [first - second for first, second in pairs]
    n, mean = len(pairs), fmean(differences)
    half = float(t.ppf(0.975, n - 1)) * stdev(differences) / sqrt(n) if n > 1 else nan
    p = float(wilcoxon(differences).pvalue) if n >= FEWEST_DIFFERENCES and any(differences) else None
    return (
        TableCell(n, "{:.0f}"),
        *(TableCell(fmean(values), form) for values in zip(*pairs, strict=True)),
        *(TableCell(finite(value), _signed(form)) for value in (mean, mean - half, mean + half)),
        TableCell(p, "{:.2g}"),
    )


def _signed(form: str) -> str:
    return form.replace("{:", "{:+")
