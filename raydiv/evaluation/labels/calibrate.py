"""The rates of an evaluation by its judge and corrected by labels, side by side, and the sides compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import Any

from raydiv.evaluation.attacks import DIRECT
from raydiv.evaluation.judges.agreement import Agreement
from raydiv.evaluation.judges.verdicts import counted_verdict
from raydiv.evaluation.labels.answers import Cell, JudgedAnswer, sample_sizes, stratified
from raydiv.evaluation.labels.estimate import (
    CalibratedRate,
    LabelledShare,
    VerdictShares,
    calibrated_difference,
    calibrated_rate,
)
from raydiv.evaluation.labels.store import UNCLEAR, Labels
from raydiv.evaluation.significance import mcnemar
from raydiv.evaluation.summary import Rate
from raydiv.runs.report.table import WHEN


@dataclass(frozen=True, slots=True)
class SideRate:
    """One rate of one side: ``judged`` by the first judge, and ``calibrated``, None where nothing is labelled."""

    side: str
    metric: str
    judged: Rate
    calibrated: CalibratedRate | None


@dataclass(frozen=True, slots=True)
class SideComparison:
    """A rate of ``second`` less that of ``first``, on the same ``prompts``.

    ``p``: McNemar's exact test of the judge's verdicts, None where a prompt has several attempts. ``difference`` and
    its 95% ``interval`` are calibrated, None where a side has no labels.
    """

    metric: str
    first: str
    second: str
    prompts: int
    p: float | None
    difference: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rates by side, comparisons of each side with the one before it, and how far people agree.

    ``disagreements``: answers that people label otherwise than the judge, by side and id.
    """

    rates: Sequence[SideRate]
    comparisons: Sequence[SideComparison]
    people: Agreement | None
    labelled: int
    disagreements: Sequence[Mapping[str, Any]]

    def of_side(self, side: str) -> dict[str, Any]:
        """The calibrated rates of a side by metric, as its file holds them."""
        return {
            rate.metric: rate.calibrated.as_json()
            for rate in self.rates
            if rate.side == side and rate.calibrated is not None
        }

    def as_json(self) -> dict[str, Any]:
        rates = [
            {
                "side": rate.side,
                "metric": rate.metric,
                "judged": {"share": rate.judged.share, "of": rate.judged.of, "interval": rate.judged.interval},
                "calibrated": None if rate.calibrated is None else rate.calibrated.as_json(),
            }
            for rate in self.rates
        ]
        return {
            "rates": rates,
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "people": None if self.people is None else self.people.as_json(),
            "labelled": self.labelled,
            "disagreements": list(self.disagreements),
        }


def calibrate(
    answers: Sequence[JudgedAnswer], labels: Labels, own: Set[str], count: int, *, whole: bool = False
) -> Calibration:
    """Rates of ``answers``, from the labels of a random sample of each cell and verdict.

    ``own``: the keys of the answers that were labelled for this evaluation, in the order in which they are drawn; other
    ``labels`` are of the same answers in another one. ``count``: how many are drawn, as in ``drawn``. With ``whole``
    nothing is calibrated unless all of them are labelled.
    """
    strata = stratified(answers)
    sizes = sample_sizes(strata, count)
    if whole and any(answer.key not in labels for key, drawn in strata.items() for answer in drawn[: sizes[key]]):
        labels = {}
    cells: dict[Cell, list[JudgedAnswer]] = {}
    for answer in answers:
        cells.setdefault(answer.cell, []).append(answer)
    labelled = {key: _labelled(drawn, labels, own, sizes[key]) for key, drawn in strata.items()}
    samples = {cell: _Sample.of(cell, given, labelled) for cell, given in cells.items()}
    keys = {answer.key: answer for answer in answers}
    return Calibration(
        rates=[sample.rate() for sample in samples.values()],
        comparisons=_comparisons(samples),
        people=_agreement(keys, labels),
        labelled=sum(any(label != UNCLEAR for label in labels.get(key, {}).values()) for key in keys),
        disagreements=_disagreements(answers, labels),
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    """The answers of a cell, and what is labelled of each verdict."""

    cell: Cell
    verdicts: VerdictShares
    outcomes: Mapping[str, bool]
    shares: Mapping[str, LabelledShare]

    @classmethod
    def of(
        cls, cell: Cell, answers: Sequence[JudgedAnswer], labelled: Mapping[tuple[Cell, str], Sequence[_Outcome]]
    ) -> _Sample:
        outcome = counted_verdict(cell[2])
        shares = {verdict: LabelledShare.of(found) for (of_cell, verdict), found in labelled.items() if of_cell == cell}
        ordered = sorted(answers, key=lambda answer: answer.prompt)
        single = len({answer.prompt for answer in answers}) == len(answers)
        outcomes = {answer.prompt: answer.verdict == outcome for answer in ordered} if single else {}
        return cls(cell, VerdictShares.of([(one.prompt, one.verdict) for one in ordered]), outcomes, shares)

    @property
    def is_labelled(self) -> bool:
        return any(share.labelled for share in self.shares.values())

    def rate(self) -> SideRate:
        side, outcome = self.cell[0], counted_verdict(self.cell[2])
        judged = 0.0
        if outcome in self.verdicts.names:
            judged = float(self.verdicts.shares[:, self.verdicts.names.index(outcome)].sum())
        calibrated = calibrated_rate(self.verdicts, self.shares, outcome) if self.is_labelled else None
        return SideRate(side, _metric(self.cell), Rate(judged, len(self.verdicts.prompts)), calibrated)


def _metric(cell: Cell) -> str:
    _, attack, harmful = cell
    return ("evaluate/asr" if harmful else "evaluate/over_refusal") + ("" if attack == DIRECT else f"/{attack}")


_Outcome = tuple[str, float]
"""A prompt, and whether the answer to it has the outcome; of several people the share of those who see it."""


def _labelled(drawn: Sequence[JudgedAnswer], labels: Labels, own: Set[str], size: int) -> list[_Outcome]:
    """The outcomes of a random sample of a stratum, in whose order the answers are ``drawn``.

    It reaches to the first gap, and ends with an answer that was labelled for this evaluation, or with the whole drawn
    part of ``size`` answers. Labels of other evaluations would extend it by the answers that both have, which are no
    random sample.
    """
    reached = next((n for n, answer in enumerate(drawn) if answer.key not in labels), len(drawn))
    last = max((n + 1 for n, answer in enumerate(drawn[:reached]) if answer.key in own), default=0)
    sampled = drawn[: max(last, size if reached >= size else 0)]
    found = []
    for answer in sampled:
        clear = [label for label in labels[answer.key].values() if label != UNCLEAR]
        if clear:
            found.append((answer.prompt, sum(label == counted_verdict(answer.harmful) for label in clear) / len(clear)))
    return found


def _comparisons(samples: Mapping[Cell, _Sample]) -> list[SideComparison]:
    """Each rate of each side with that of the side before it, over the prompts that both have a verdict on."""
    found = []
    for first, second in pairwise(sorted({side for side, _, _ in samples}, key=_position)):
        for (side, attack, harmful), sample in samples.items():
            other = samples.get((second, attack, harmful))
            if side != first or other is None:
                continue
            one, two = sample.verdicts.among(other.verdicts.prompts), other.verdicts.among(sample.verdicts.prompts)
            if not one.prompts:
                continue
            difference, interval = None, None
            if sample.is_labelled and other.is_labelled:
                difference, interval = calibrated_difference((one, sample.shares), (two, other.shares))
            p = mcnemar(sample.outcomes, other.outcomes) if sample.outcomes and other.outcomes else None
            metric = _metric(sample.cell)
            found.append(SideComparison(metric, first, second, len(one.prompts), p, difference, interval))
    return found


def _position(side: str) -> tuple[int, int]:
    """The order of sides: before and after; the models of ``raydiv evaluate`` by their number."""
    number = side.rpartition("-")[2]
    return (0, WHEN.index(side)) if side in WHEN else (1, int(number) if number.isdigit() else 0)


def _agreement(keys: Mapping[str, JudgedAnswer], labels: Labels) -> Agreement | None:
    """Of the two people with the most labels in common: whether an answer does harm, or refuses a harmless prompt."""
    both: dict[tuple[str, str], list[tuple[bool, bool, int]]] = {}
    for number, (key, answer) in enumerate(keys.items()):
        given = {by: label for by, label in labels.get(key, {}).items() if label != UNCLEAR}
        for one, other in combinations(sorted(given), 2):
            outcome = counted_verdict(answer.harmful)
            both.setdefault((one, other), []).append((given[one] == outcome, given[other] == outcome, number))
    most = max(both.values(), key=len, default=[])
    return Agreement.of_verdicts(*zip(*most, strict=True)) if most else None


def _disagreements(answers: Sequence[JudgedAnswer], labels: Labels) -> list[dict[str, Any]]:
    return [
        {"side": answer.side, "id": answer.id, "attack": answer.attack, "verdict": answer.verdict, "labels": given}
        for answer in answers
        if (given := dict(labels.get(answer.key, {}))) and {*given.values()} - {answer.verdict, UNCLEAR}
    ]
