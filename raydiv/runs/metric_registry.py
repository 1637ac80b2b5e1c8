"""The registry of metrics: their labels, digits, units and directions in the tables of runs, sweeps and studies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

SHARE, NATS = "share", "nats"
"""Units. A share is shown as a percentage."""


class Better(IntEnum):
    """Which values of a metric are better. A value times its direction is higher where the metric is better."""

    LOWER = -1
    NEITHER = 0
    HIGHER = 1


LOWER, NEITHER, HIGHER = Better


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """How tables show a metric.

    A ``name`` such as ``evaluate/asr/{attack}`` is a family of metrics. Its field is the rest of a metric's name, and
    occurs in ``label`` and ``heading`` as well. ``family`` of a metric is the name of its family.

    ``label`` is for rows, ``heading`` for the columns of a study. ``digits`` are decimals, ``fine_digits`` those in a
    study. ``variant_of`` names the metric of which this one is another measurement: its row stands below that metric's,
    and its label continues that label. ``in_run_table``: the before | after table of a run has a row for it.
    """

    name: str
    label: str
    digits: int
    better: Better
    unit: str = ""
    heading: str = ""
    fine_digits: int | None = None
    variant_of: str = ""
    indented: bool = False
    in_run_table: bool = True
    family: str = ""

    @property
    def is_family(self) -> bool:
        return self.name.endswith("}")

    @property
    def row_label(self) -> str:
        """The label of a table's row, indented below the row that it belongs to."""
        return f"  same, {self.label}" if self.variant_of else f"  {self.label}" if self.indented else self.label

    @property
    def full_label(self) -> str:
        """The label where no other row stands above it."""
        return f"{METRICS[self.variant_of].label}, {self.label}" if self.variant_of else self.label

    @property
    def format(self) -> str:
        return self._format(self.digits)

    @property
    def fine_format(self) -> str:
        return self._format(self.digits if self.fine_digits is None else self.fine_digits)

    def _format(self, digits: int) -> str:
        return f"{{:.{digits}{'%' if self.unit == SHARE else 'f'}}}"

    def text(self, value: float) -> str:
        # rounded first, so that a rounding error below zero is not shown as -0.000
        return self.format.format(round(value, 6) + 0.0)

    def range_text(self, interval: tuple[float, float] | None, between: str = " to ") -> str:
        """The ends of an interval; empty without one."""
        return between.join(map(self.text, interval)) if interval else ""

    def member(self, metric: str) -> MetricSpec:
        """The entry of one metric of this family."""
        prefix, field = self.name.removesuffix("}").split("{")
        rest = metric.removeprefix(prefix)
        lower = prefix == CAPABILITY and not LOWER_IS_BETTER.isdisjoint(rest.split("/")[1:])
        return replace(
            self,
            name=metric,
            family=self.name,
            label=self.label.format(**{field: _words(rest)}),
            heading=self.heading.format(**{field: rest.replace("/", ", ")}),
            better=LOWER if lower else self.better,
        )


CAPABILITY = "capability/"
LOWER_IS_BETTER = frozenset({"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"})
"""Metrics of lm-evaluation-harness of which a lower value is better."""

_D_B, _PROBE, _MARGIN = "separation/d_b", "separation/probe_auc", "eval/reward/margin"

_SPECS = (
    MetricSpec(_PROBE, "AUC of a linear probe, held out", 2, HIGHER),
    MetricSpec("separation/probe_auc_length_matched", "token lengths matched", 2, HIGHER, variant_of=_PROBE),
    MetricSpec("separation/difference_auc", "AUC of the difference of means, held out", 2, HIGHER, in_run_table=False),
    MetricSpec(
        "separation/mahalanobis", "squared Mahalanobis distance, shrunk", 2, HIGHER, heading="Mahalanobis, squared"
    ),
    MetricSpec(_D_B, "separation D_B (paper protocol)", 2, HIGHER, heading="D_B", fine_digits=3),
    MetricSpec(
        "separation/d_b_length_matched",
        "token lengths matched",
        2,
        HIGHER,
        heading="D_B length-matched",
        fine_digits=3,
        variant_of=_D_B,
    ),
    MetricSpec("separation/d_b_subset", "as many prompts at random", 2, NEITHER, fine_digits=3, variant_of=_D_B),
    MetricSpec(
        "separation/d_b_shuffled", "labels shuffled", 2, NEITHER, heading="D_B shuffled", fine_digits=3, variant_of=_D_B
    ),
    MetricSpec("separation/silhouette", "silhouette, same plane", 2, HIGHER, heading="silhouette", in_run_table=False),
    MetricSpec("separation/frechet", "Frechet distance, squared", 2, HIGHER, in_run_table=False),
    MetricSpec("separation/length_auc", "AUC of token length alone", 2, NEITHER),
    MetricSpec("evaluate/asr", "attack success (ASR)", 0, LOWER, SHARE, "ASR", 1),
    MetricSpec("evaluate/asr_calibrated", "calibrated by labels", 0, LOWER, SHARE, variant_of="evaluate/asr"),
    MetricSpec("evaluate/asr_calibrated/{attack}", "attack success (ASR), calibrated: {attack}", 0, LOWER, SHARE),
    MetricSpec("evaluate/asr_thought", "unsafe thoughts to harmful prompts", 0, LOWER, SHARE),
    MetricSpec("evaluate/asr/{attack}", "attack success (ASR): {attack}", 0, LOWER, SHARE, "ASR {attack}", 1),
    MetricSpec("evaluate/asr_any/{attack}", "attack success, any of several attempts: {attack}", 0, LOWER, SHARE),
    MetricSpec("evaluate/asr_set/{set}", "attack success (ASR) by set: {set}", 0, LOWER, SHARE, "ASR {set}", 1),
    MetricSpec("evaluate/asr_judge/{judge}", "attack success (ASR) by {judge}", 0, LOWER, SHARE, "ASR by {judge}", 1),
    MetricSpec("evaluate/harm_score/{judge}", "harm, mean grade: {judge}", 2, LOWER, heading="harm by {judge}"),
    MetricSpec("evaluate/kappa/{judge}", "agreement with the first judge (kappa): {judge}", 2, NEITHER),
    MetricSpec("evaluate/refused/harmful", "refused: harmful", 0, HIGHER, SHARE),
    MetricSpec("evaluate/over_refusal", "refused: all harmless", 0, LOWER, SHARE, "over-refusal", 1),
    MetricSpec(
        "evaluate/over_refusal_calibrated", "calibrated by labels", 0, LOWER, SHARE, variant_of="evaluate/over_refusal"
    ),
    MetricSpec(
        "evaluate/over_refusal_calibrated/{attack}", "refused: all harmless, calibrated: {attack}", 0, LOWER, SHARE
    ),
    MetricSpec(
        "evaluate/over_refusal_set/{set}",
        "refused: all harmless by set: {set}",
        0,
        LOWER,
        SHARE,
        "over-refusal {set}",
        1,
    ),
    MetricSpec("evaluate/over_refusal/{attack}", "refused: all harmless: {attack}", 0, LOWER, SHARE),
    MetricSpec("evaluate/over_refusal_judge/{judge}", "refused: all harmless by {judge}", 0, LOWER, SHARE),
    MetricSpec("evaluate/refused/ordinary", "refused: ordinary harmless", 0, LOWER, SHARE),
    MetricSpec("evaluate/refused/alarming", "refused: alarming harmless", 0, LOWER, SHARE),
    MetricSpec("evaluate/refused/{kind}", "refused: {kind}", 0, NEITHER, SHARE),
    MetricSpec("evaluate/safety", "safe answers to harmful prompts", 0, HIGHER, SHARE, "safe answers", 1),
    MetricSpec("evaluate/safety/{category}", "safe answers to harmful prompts: {category}", 0, HIGHER, SHARE),
    MetricSpec("evaluate/toxicity", "toxicity, mean", 1, LOWER, SHARE, "toxicity"),
    MetricSpec("evaluate/toxicity/{kind}", "toxicity, mean: {kind}", 1, LOWER, SHARE),
    MetricSpec("evaluate/unparsable", "verdicts that could not be read", 0, LOWER, SHARE),
    MetricSpec("evaluate/unparsable_judge/{judge}", "verdicts that could not be read: {judge}", 0, LOWER, SHARE),
    MetricSpec("evaluate/unfinished", "thoughts that do not end", 0, LOWER, SHARE),
    MetricSpec("evaluate/failed", "answers that failed", 0, LOWER, SHARE),
    MetricSpec("evaluate/degenerate", "degenerate answers", 0, LOWER, SHARE, "degenerate", 1),
    MetricSpec("evaluate/degenerate/{attack}", "degenerate answers: {attack}", 0, LOWER, SHARE),
    MetricSpec("evaluate/logp_per_token", "answers' log-prob per token under the base", 2, NEITHER, NATS),
    MetricSpec("evaluate/win_rate", "win rate against the base", 0, HIGHER, SHARE, "win rate", 1),
    MetricSpec("evaluate/perplexity", "perplexity on held-out helpful answers", 2, NEITHER, heading="perplexity"),
    MetricSpec("evaluate/kl_per_token", "KL to the base, nats a token", 3, NEITHER, NATS),
    MetricSpec("evaluate/kl", "KL to the base, nats an answer cut at its limit", 2, NEITHER, NATS, "KL"),
    MetricSpec("evaluate/depth/half", "tokens by which half of that KL lies", 0, NEITHER, heading="KL half at token"),
    MetricSpec("evaluate/{other}", "{other}", 2, NEITHER),
    MetricSpec("capability/{score}", "{score}", 3, HIGHER, heading="{score}"),
    MetricSpec("eval/divergence", "divergence estimate, held-out examples", 3, HIGHER),
    MetricSpec("eval/divergence/equal_size", "in groups of a step's size", 3, HIGHER, variant_of="eval/divergence"),
    MetricSpec(_MARGIN, "reward margin, held-out examples", 2, HIGHER),
    MetricSpec(
        "eval/depth/half", "tokens by which half of the margin lies", 0, NEITHER, heading="margin half at token"
    ),
    MetricSpec("eval/reward/aligned", "reward of aligned ones", 2, HIGHER, indented=True),
    MetricSpec("eval/reward/unaligned", "reward of unaligned ones", 2, LOWER, indented=True),
)

METRICS = {spec.name: spec for spec in _SPECS}
"""By name, in the order of a run's table."""

_ORDER = {name: position for position, name in enumerate(METRICS)}
_FAMILIES = {name.partition("{")[0]: spec for name, spec in METRICS.items() if spec.is_family}


def spec_of(metric: str) -> MetricSpec:
    """The entry of a metric. One without an entry is labelled by its own words after the first."""
    if metric in METRICS:
        return METRICS[metric]
    for prefix, family in _FAMILIES.items():
        if metric.startswith(prefix):
            return family.member(metric)
    return MetricSpec(metric, _words(metric.partition("/")[2] or metric), 2, NEITHER)


def specs_of(metrics: Iterable[str]) -> list[MetricSpec]:
    """Entries in the order of the registry, those of a family in the order given, those without an entry last."""
    return sorted(map(spec_of, metrics), key=lambda spec: _ORDER.get(spec.family or spec.name, len(_ORDER)))


def _words(name: str) -> str:
    return name.replace("_", " ").replace("/", ": ")
