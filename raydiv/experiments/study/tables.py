"""The tables of a study: its cells, the average rank of each loss, and one kind of data against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import sqrt
from statistics import fmean, stdev

import numpy as np
from scipy.stats import rankdata, t, wilcoxon

from raydiv.experiments.study.cells import Cell, Key, in_order, trained_cells
from raydiv.experiments.study.measures import BROKEN, Measure, is_broken, measures
from raydiv.experiments.study.table_io import Table, TableCell, TableRow

RANK = "{:.2f}"

FEWEST_RANKED = 6
"""Differences that Wilcoxon's test needs: of five alike even the smallest two-sided p is 2 / 2^5 = 0.06."""


def tables_of(cells: Sequence[Cell]) -> list[Table]:
    """All of them, without those that the cells have nothing for; base cells are rows of the first."""
    kinds = dict.fromkeys(cell.data for cell in trained_cells(cells))
    compared = [
        table
        for first, second in combinations(kinds, 2)
        for table in (against(cells, first, second), paired(cells, first, second))
    ]
    every = [cell_table(cells), rank_table(cells), *compared]
    return [table for table in every if table.rows]


def cell_table(cells: Sequence[Cell]) -> Table:
    """A row for each model, data and loss: means over seeds, and their sample standard deviation.

    The best of the losses on one model and data are marked, where they differ and a measure has a good end; no broken model is.
    """
    known, groups = measures(cells), in_order(cells)
    rows = {key: [measure.figure(own) for measure in known] for key, own in groups.items()}
    whole = [key for key, own in groups.items() if not is_broken(own)]
    marked = [TableRow(key, tuple(row)) for key, row in _best_of_blocks(rows, whole, known).items()]
    broken = f"never marked as best: broken models (more than {BROKEN:.0%} degenerate answers), of which there are"
    notes = [*_of_seeds(groups), *([f"{broken} {len(rows) - len(whole)}"] if len(whole) < len(rows) else [])]
    return Table("Cells", ("model", "data", "loss", *_labels(known)), tuple(marked), tuple(notes))


def _best_of_blocks(
    rows: Mapping[Key, list[TableCell]], rivals: Sequence[Key], known: Sequence[Measure]
) -> dict[Key, list[TableCell]]:
    """The rows with the best figure of the rivals of each (model, data) marked."""
    found = {key: list(row) for key, row in rows.items()}
    for block in dict.fromkeys(key[:2] for key in rows):
        own = [found[key] for key in rivals if key[:2] == block]
        for column, measure in enumerate(known):
            for row, figure in zip(own, _best([row[column] for row in own], measure.better), strict=True):
                row[column] = figure
    return found


def _best(figures: Sequence[TableCell], better: int) -> list[TableCell]:
    """The figures, those at the good end marked; none where all are alike."""
    values = [figure.value * better for figure in figures if figure.value is not None]
    if not values or min(values) == max(values):
        return list(figures)
    return [
        replace(figure, best=figure.value is not None and figure.value * better == max(values)) for figure in figures
    ]


def _of_seeds(groups: Mapping[Key, Sequence[Cell]]) -> tuple[str, ...]:
    """That there are several seeds, and how many."""
    counts = sorted({len(own) for own in groups.values() if not own[0].is_base})
    if not counts or counts[-1] < 2:
        return ()
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (f"mean ± sample standard deviation over seeds, of which there are {seeds}",)


def rank_table(cells: Sequence[Cell]) -> Table:
    """The average rank of each loss, by each measure that has a good end and by all measures of safety; no rows of one loss.

    In each (model, data) block losses are ranked by their means over seeds, the best first and ties at their average rank; a
    loss's rank is averaged over the blocks. A block in which a loss is missing would favour the others' ranks, and is left out.
    """
    own = trained_cells(cells)
    losses = tuple(dict.fromkeys(cell.loss for cell in own))
    known = [measure for measure in measures(own) if measure.better]
    if len(losses) < 2:
        return Table("Average rank", ("loss",), ())
    ranks = {measure: _average_ranks(own, losses, measure) for measure in known}
    safety = [measure for measure in known if measure.safety and ranks[measure]]
    columns = [ranks[measure] for measure in known]
    if safety:
        columns.insert(0, {loss: fmean(ranks[measure][loss] for measure in safety) for loss in losses})
    marked = [_best([TableCell(column.get(loss), RANK) for loss in losses], -1) for column in columns]
    rows = tuple(TableRow((loss,), figures) for loss, figures in zip(losses, zip(*marked, strict=True), strict=True))
    by_safety = [f"safety: the mean of the ranks by {', '.join(_labels(safety))}"] if safety else []
    header = ("loss", *(["safety"] if safety else []), *_labels(known))
    return Table("Average rank", header, rows, (*by_safety, *_left_out(own, losses, known)))


def _blocks(cells: Sequence[Cell]) -> dict[tuple[str, str], dict[str, list[Cell]]]:
    """The cells of each model and data, by loss."""
    found: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for (model, data, loss), own in in_order(cells).items():
        found.setdefault((model, data), {})[loss] = own
    return found


def _average_ranks(cells: Sequence[Cell], losses: Sequence[str], measure: Measure) -> dict[str, float]:
    """By loss, over the blocks that have every loss; empty where none has."""
    ranked = []
    for block in _blocks(cells).values():
        values = [measure.mean(block.get(loss, [])) for loss in losses]
        if None not in values:
            ranked.append(rankdata(-measure.better * np.round(np.array(values, dtype=np.float64), 12)))
    return dict(zip(losses, np.mean(ranked, axis=0).tolist(), strict=True)) if ranked else {}


def _left_out(cells: Sequence[Cell], losses: Sequence[str], known: Sequence[Measure]) -> list[str]:
    """The blocks in which a loss is missing, for all measures or for some."""
    notes = []
    for (model, data), block in _blocks(cells).items():
        by_missing: dict[tuple[str, ...], list[Measure]] = {}
        for measure in known:
            missing = tuple(loss for loss in losses if measure.mean(block.get(loss, [])) is None)
            by_missing.setdefault(missing, []).append(measure)
        for missing, lacking in by_missing.items():
            where = "" if len(lacking) == len(known) else f" by {', '.join(_labels(lacking))}"
            if missing:
                notes.append(f"left out: {model} on {data}{where}, which lacks {', '.join(missing)}")
    return notes


def against(cells: Sequence[Cell], first: str, second: str) -> Table:
    """For each model and loss that was trained on both kinds of data: each measure by both, and the difference."""
    known = measures(trained_cells(cells))
    rows = []
    for (model, loss), (one, other) in _pairs(cells, first, second).items():
        rows += [
            TableRow((model, loss, first), tuple(measure.figure(one) for measure in known)),
            TableRow((model, loss, second), tuple(measure.figure(other) for measure in known)),
            TableRow((model, loss, "difference"), tuple(_difference(measure, one, other) for measure in known)),
        ]
    return Table(f"{first} against {second}", ("model", "loss", "data", *_labels(known)), tuple(rows))


def paired(cells: Sequence[Cell], first: str, second: str) -> Table:
    """For each measure the mean difference d of the first kind of data less the second, over the n (model, loss) with both.

    Its 95% interval is d +- t(0.975; n - 1) s / sqrt(n), with s the differences' sample standard deviation; p is Wilcoxon's
    signed-rank test's, of FEWEST_RANKED differences or more, that are not all nought.
    """
    rows = []
    pairs = _pairs(cells, first, second).values()
    for measure in measures(trained_cells(cells)):
        both = [(measure.mean(one), measure.mean(other)) for one, other in pairs]
        known = [(one, other) for one, other in both if one is not None and other is not None]
        if known:
            rows.append(TableRow((measure.label,), _of_differences(known, measure.form)))
    header = ("measure", "pairs", first, second, "difference", "95% low", "95% high", "Wilcoxon p")
    note = "pairs of one model, or of one loss, are alike: intervals and p take them as independent"
    return Table(f"{first} against {second}: paired differences", header, tuple(rows), (note,))


def _pairs(
    cells: Sequence[Cell], first: str, second: str
) -> dict[tuple[str, str], tuple[Sequence[Cell], Sequence[Cell]]]:
    """The cells of both kinds of data, by model and loss."""
    groups = in_order(trained_cells(cells))
    names = dict.fromkeys((model, loss) for model, _, loss in groups)
    both = {name: tuple(groups.get((name[0], data, name[1]), []) for data in (first, second)) for name in names}
    return {name: (one, other) for name, (one, other) in both.items() if one and other}


def _difference(measure: Measure, one: Sequence[Cell], other: Sequence[Cell]) -> TableCell:
    ends = measure.mean(one), measure.mean(other)
    return TableCell(None if ends[0] is None or ends[1] is None else ends[0] - ends[1], _signed(measure.form))


def _of_differences(pairs: Sequence[tuple[float, float]], form: str) -> tuple[TableCell, ...]:
    """Count, both means, mean difference, its interval's ends and p."""
    differences = [one - other for one, other in pairs]
    n, mean = len(differences), fmean(differences)
    half = float(t.ppf(0.975, n - 1)) * stdev(differences) / sqrt(n) if n > 1 else None
    p = float(wilcoxon(differences).pvalue) if n >= FEWEST_RANKED and any(differences) else None
    ends = (None, None) if half is None else (mean - half, mean + half)
    means = [fmean(values) for values in zip(*pairs, strict=True)]
    return (
        TableCell(n, "{:.0f}"),
        *(TableCell(value, form) for value in means),
        *(TableCell(value, _signed(form)) for value in (mean, *ends)),
        TableCell(p, "{:.2g}"),
    )


def _signed(form: str) -> str:
    return form.replace("{:", "{:+")


def _labels(known: Sequence[Measure]) -> tuple[str, ...]:
    return tuple(measure.label for measure in known)
