"""The table of a study's regressions of attack success on separation."""

from __future__ import annotations

from collections.abc import Sequence

from raydiv.experiments.study.regression import ClaimTest, scale_of
from raydiv.experiments.study.table_io import Table, TableCell, TableRow

COUNT = "{:.0f}"

LEGEND = (
    "slope: change of attack success (1 is 100%) when the measure grows by a factor of e (root: per standard deviation "
    "between the classes), with an intercept for each model and data; p: losses exchanged within each model and data; "
    "p losses: exchanged in all of them at once; r: partial correlation; R2: of predictions for each loss from all "
    "others, below 0 where the mean of the others predicts better; low and high: 95% intervals (r and R2: bootstrap "
    "over losses, too narrow where these are few); r least and greatest: without each loss and each data set in turn"
)


def claim_table(claims: Sequence[ClaimTest]) -> Table:
    """A row for each test: slope, correlation, their intervals, and the correlation without a loss or broken models."""
    estimates = ("cells", "slope", "slope low", "slope high", "p", "p losses", "R2", "R2 low", "R2 high")
    correlations = ("r", "r low", "r high", "r least", "r greatest", "unbroken r", "unbroken cells")
    header = ("attack success", "on", *estimates, *correlations)
    rows = tuple(
        TableRow((claim.asr.label, f"{scale_of(claim.separation).name} of {claim.separation.label}"), _figures(claim))
        for claim in claims
    )
    return Table("Attack success and separation", header, rows, (LEGEND, *_notes(claims)) if rows else ())


def _notes(claims: Sequence[ClaimTest]) -> list[str]:
    """Each distinct note once, after the names of its tests unless all tests have it."""
    tests: dict[str, list[str]] = {}
    for claim in claims:
        for note in claim.notes:
            tests.setdefault(note, []).append(f"{claim.asr.label} on {claim.separation.label}")
    return [note if len(names) == len(claims) else f"{', '.join(names)}: {note}" for note, names in tests.items()]


def _figures(claim: ClaimTest) -> tuple[TableCell, ...]:
    """The figures of a row of ``claim_table``."""
    nothing = (None, None)
    slope = (None,) * 3 if claim.slope is None else (claim.slope.value, *(claim.slope.interval or nothing))
    r2 = (None,) * 3 if claim.prediction is None else (claim.prediction.r2, *(claim.prediction.interval or nothing))
    p = nothing if claim.slope is None else (claim.slope.p, claim.slope.p_losses)
    r = (
        (None,) * 3
        if claim.correlation is None
        else (claim.correlation.value, *(claim.correlation.interval or nothing))
    )
    unbroken = nothing if claim.whole is None else (claim.whole.value, claim.whole.cells)
    return (
        TableCell(len(claim.points), COUNT),
        *(TableCell(value, "{:.3f}") for value in slope),
        *(TableCell(value, "{:.2g}") for value in p),
        *(TableCell(value) for value in (*r2, *r, *(claim.without_one or nothing), unbroken[0])),
        TableCell(unbroken[1], COUNT),
    )
