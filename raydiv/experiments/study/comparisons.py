"""The trained models of a study compared on the same prompts, the false discoveries among all comparisons controlled.

A test over prompts says that two trained models differ. Whether two losses do is a question of seeds, which it averages
over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

from raydiv.evaluation.attacks import DIRECT
from raydiv.evaluation.judges.verdicts import RATED_VERDICTS, counted_verdict
from raydiv.evaluation.significance import sign_test
from raydiv.experiments.study.cells import Cell, Key, grouped_cells, trained_cells
from raydiv.experiments.study.table_io import Table, TableCell, TableRow
from raydiv.runs.metric_registry import METRICS
from raydiv.utils.jsonl import read_records

RATES = {"evaluate/asr": True, "evaluate/over_refusal": False}
"""By metric: whether its prompts are harmful."""

LEVEL = 0.05
"""Largest share of false discoveries among the differences that are called so."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rate of ``first`` less that of ``second``, losses on the same model and data, over the same ``prompts``.

    ``p`` is that of a sign test of the prompts (McNemar's exact test with one seed); ``q`` is p adjusted for all
    comparisons of the study (Benjamini and Hochberg 1995).
    """

    model: str
    data: str
    metric: str
    first: str
    second: str
    prompts: int
    difference: float
    p: float
    q: float = 1.0


def comparisons_of(cells: Sequence[Cell]) -> list[Comparison]:
    """Each two losses on each model and data by each rate; none where the verdicts of the answers are not at hand."""
    blocks: dict[tuple[str, str], dict[str, list[Cell]]] = defaultdict(dict)
    for (model, data, loss), group in grouped_cells(trained_cells(cells)).items():
        blocks[model, data][loss] = group
    found = []
    for (model, data), by_loss in blocks.items():
        for metric in RATES:
            rates = {loss: _by_prompt(group, metric) for loss, group in by_loss.items()}
            for first, second in combinations(rates, 2):
                differences = [
                    rates[first][prompt] - rates[second][prompt] for prompt in rates[first] if prompt in rates[second]
                ]
                if differences:
                    p = sign_test(differences)
                    found.append(
                        Comparison(model, data, metric, first, second, len(differences), fmean(differences), p)
                    )
    return _adjusted(found)


def _adjusted(found: Sequence[Comparison]) -> list[Comparison]:
    from scipy.stats import false_discovery_control

    if not found:
        return []
    adjusted = false_discovery_control([one.p for one in found])
    return [replace(one, q=float(q)) for one, q in zip(found, adjusted, strict=True)]


def _by_prompt(cells: Sequence[Cell], metric: str) -> dict[str, float]:
    """The share of seeds in which each prompt has the outcome, of prompts with a known verdict in all of them."""
    outcomes = [_outcomes(Path(cell.where), metric) for cell in cells]
    if not outcomes or any(one is None for one in outcomes):
        return {}
    known = [one for one in outcomes if one is not None]
    return {prompt: fmean(one[prompt] for one in known) for prompt in known[0] if all(prompt in one for one in known)}


def _outcomes(run: Path, metric: str) -> Mapping[str, bool] | None:
    """Whether each direct prompt of a run has the outcome after training; None where the run is not at hand."""
    path = run / "evaluation" / "after.answers.jsonl"
    if not path.is_file():
        return None
    harmful = RATES[metric]
    return {
        f"{record.get('set', '')} {record['id']}": record["verdict"] == counted_verdict(harmful)
        for record in read_records(path)
        if record["attack"] == DIRECT
        # earlier versions wrote the kind alone
        and record.get("harmful", record["kind"] == "harmful") == harmful
        and record["verdict"] in RATED_VERDICTS
    }


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """A row for each two losses, model, data and rate; differences that hold are marked."""
    rows = tuple(
        TableRow(
            (one.model, one.data, METRICS[one.metric].heading, f"{one.first} less {one.second}"),
            (
                TableCell(one.prompts, "{:.0f}"),
                TableCell(one.difference, "{:+.1%}", best=one.q <= LEVEL),
                TableCell(one.p, "{:.2g}"),
                TableCell(one.q, "{:.2g}"),
            ),
        )
        for one in comparisons
    )
    note = (
        f"p: sign test over the same prompts, of these trained models: other seeds are another matter; q: p adjusted "
        f"for all {len(rows)} comparisons (Benjamini and Hochberg); marked: q at most {LEVEL}. Verdicts are the judge's"
    )
    header = ("model", "data", "rate", "losses", "prompts", "difference", "p", "q")
    return Table("Losses compared on the same prompts", header, rows, (note,) if rows else ())


def holds(comparisons: Sequence[Comparison], key: Key, metric: str, others: Sequence[str]) -> bool:
    """Whether the loss of a cell differs by a rate from each of the ``others`` on its model and data."""
    model, data, loss = key
    different = {
        frozenset((one.first, one.second))
        for one in comparisons
        if (one.model, one.data, one.metric) == (model, data, metric) and one.q <= LEVEL
    }
    return all(frozenset((loss, other)) in different for other in others)
