"""What a run measured before and after training, in words and numbers, and what must be read beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

from raydiv.runs.directory import Metrics, RunDirectory

KNOWN: dict[str, tuple[str, str]] = {
    "separation/d_b": ("separation D_B (paper protocol)", "{:.2f}"),
    "separation/d_b_length_matched": ("  same, token lengths matched", "{:.2f}"),
    "separation/d_b_shuffled": ("  same, labels shuffled", "{:.2f}"),
    "separation/d_b_full": ("separation D_B (all dimensions, less chance)", "{:.2f}"),
    "separation/probe_auc": ("AUC of a linear probe, held out", "{:.2f}"),
    "separation/probe_auc_length_matched": ("  same, token lengths matched", "{:.2f}"),
    "separation/length_auc": ("AUC of token length alone", "{:.2f}"),
    "evaluate/asr": ("attack success (ASR)", "{:.0%}"),
    "evaluate/asr_any": ("attack success, any of several attempts", "{:.0%}"),
    "evaluate/asr_set": ("attack success (ASR) by set", "{:.0%}"),
    "evaluate/refused/harmful": ("refused: harmful", "{:.0%}"),
    "evaluate/over_refusal": ("refused: all harmless", "{:.0%}"),
    "evaluate/over_refusal_set": ("refused: all harmless by set", "{:.0%}"),
    "evaluate/refused/ordinary": ("refused: ordinary harmless", "{:.0%}"),
    "evaluate/refused/alarming": ("refused: alarming harmless", "{:.0%}"),
    "evaluate/safety": ("safe answers to harmful prompts", "{:.0%}"),
    "evaluate/toxicity": ("toxicity, mean", "{:.1%}"),
    "evaluate/unparsable": ("verdicts that could not be read", "{:.0%}"),
    "evaluate/degenerate": ("degenerate answers", "{:.0%}"),
    "evaluate/logp_per_token": ("answers' log-prob per token under the base", "{:.2f}"),
    "evaluate/win_rate": ("win rate against the base", "{:.0%}"),
    "evaluate/perplexity": ("perplexity on held-out helpful answers", "{:.2f}"),
    "evaluate/kl": ("KL to the base, nats an answer", "{:.2f}"),
    "capability": ("capability", "{:.3f}"),
    "eval/divergence": ("divergence estimate, held-out examples", "{:.3f}"),
    "eval/reward/margin": ("reward margin, held-out examples", "{:.2f}"),
    "eval/reward/aligned": ("  reward of aligned ones", "{:.2f}"),
    "eval/reward/unaligned": ("  reward of unaligned ones", "{:.2f}"),
}
"""Label and format of a metric, or of what several are parts of, in the order of tables."""

SAME = "  same, "
"""Begins the label of a metric that is the one above, measured in another way."""


@dataclass(frozen=True, slots=True)
class MeasuredValue:
    """A value, of a rate also its 95% interval and out of how many; ``form`` is its format."""

    value: float
    form: str
    interval: tuple[float, float] | None = None
    of: int | None = None

    def __str__(self) -> str:
        # rounded first, so that a rounding error below zero is not shown as -0.000
        return self.form.format(round(self.value, 6) + 0.0)

    @property
    def range(self) -> str:
        """The interval in words; empty without one."""
        return " to ".join(self.form.format(end) for end in self.interval) if self.interval else ""


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A metric before and after training; None where it was not measured."""

    metric: str
    before: MeasuredValue | None
    after: MeasuredValue | None

    @property
    def label(self) -> str:
        return label_of(self.metric)

    @property
    def group(self) -> str:
        """The first word of the metric: who measured it."""
        return self.metric.partition("/")[0]


def label_of(metric: str) -> str:
    """A metric's label; of one without an entry in KNOWN its own words, after the label of the one that it is a part of."""
    if metric in KNOWN:
        return KNOWN[metric][0]
    head, _, rest = metric.rpartition("/")
    words = rest.replace("_", " ")
    return words if "/" not in head else f"{label_of(head)}: {words}"


def label_alone(metric: str) -> str:
    """A metric's label where it does not stand below the one whose label it goes on from."""
    label = label_of(metric)
    if not label.startswith(SAME):
        return label.strip()
    above = [known for known, _ in list(KNOWN.values())[: _place(metric)] if not known.startswith(" ")]
    return f"{above[-1]}, {label.removeprefix(SAME)}"


def in_percent(metric: str) -> bool:
    return _form(metric, "").endswith("%}")


def before_after(run: RunDirectory) -> list[tuple[str, str, str]]:
    """(label, before, after) of the known metrics that the run measured."""
    return [(row.label, str(row.before or "-"), str(row.after or "-")) for row in measured(run) if row.metric in KNOWN]


def measured(run: RunDirectory) -> list[ReportRow]:
    """Every metric of KNOWN that the run measured, and every one of its answers: first and last value."""
    first: Metrics = {}
    last: Metrics = {}
    for record in run.read_metrics():
        last |= record
        first = record | first
    before = _plain(first) | _apart(run.separation / "before.json") | _answers(run.evaluation / "before.json")
    after = _plain(last) | _apart(run.separation / "after.json") | _answers(run.evaluation / "after.json")
    metrics = sorted(before | after, key=lambda metric: (_place(metric), metric not in KNOWN))
    return [ReportRow(metric, before.get(metric), after.get(metric)) for metric in metrics]


def _place(metric: str) -> int:
    """Where KNOWN has a metric; of another, where it has the last of those that begin with the most of its words."""
    shared = [sum(takewhile(bool, map(eq, metric.split("/"), other.split("/")))) for other in KNOWN]
    return max(range(len(shared)), key=lambda number: (shared[number], number))


def _plain(metrics: Metrics) -> dict[str, MeasuredValue]:
    """What metrics.jsonl alone has; answers have files of their own, which say at which end each figure was measured."""
    known = {name: form for name, (_, form) in KNOWN.items() if not name.startswith("evaluate/")}
    return {name: MeasuredValue(metrics[name], form) for name, form in known.items() if name in metrics}


def _apart(path: Path) -> dict[str, MeasuredValue]:
    """D_B with its interval, where the separation file has one."""
    found = read_json(path)
    if not found.get("d_b_interval"):
        return {}
    low, high = found["d_b_interval"]
    return {"separation/d_b": MeasuredValue(found["figures"]["d_b"], KNOWN["separation/d_b"][1], (low, high))}


def _answers(path: Path) -> dict[str, MeasuredValue]:
    """All rates of an evaluation file and its other figures, with their intervals where they have any."""
    found = read_json(path)
    measured = {
        name: MeasuredValue(rate["share"], _form(name, "{:.0%}"), _ends(rate), rate["of"])
        for name, rate in found.get("rates", {}).items()
    }
    for name, figure in found.get("capability", {}).items():
        measured[name] = MeasuredValue(figure["value"], _form("capability", ""), _ends(figure), figure["documents"])
    for key, figure in found.items():
        name, form = f"evaluate/{key}", _form(f"evaluate/{key}", "{:.2f}")
        if type(figure) in (int, float):
            measured[name] = MeasuredValue(figure, form)
        elif isinstance(figure, dict) and figure.get("value") is not None:
            measured[name] = MeasuredValue(figure["value"], form, _ends(figure), figure.get("of"))
    return measured


def _ends(figure: Mapping[str, Any]) -> tuple[float, float] | None:
    interval = figure.get("interval")
    return (interval[0], interval[1]) if interval else None


def _form(metric: str, otherwise: str) -> str:
    """The format of a metric, or of what it is a part of."""
    return next((KNOWN[name][1] for name in (metric, metric.rpartition("/")[0]) if name in KNOWN), otherwise)


def read_json(path: Path) -> dict[str, Any]:
    """A file of the run; empty where that was not asked for."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def notes(run: RunDirectory) -> list[str]:
    """What must be read beside the table: the judge's errors, and what the controls of separation say."""
    result = json.loads(run.result.read_text())
    words, steps = _of_the_data(result["data"]), result["steps"]
    if steps["taken"] < steps["planned"]:
        words.append(f"stopped after {steps['taken']} of {steps['planned']} updates: {steps['ended']}")
    answers = read_json(run.evaluation / "after.json")
    if answers:
        words += [answers["judge"]["errors"], *answers.get("notes", [])]
    for name in ("before", "after"):
        words += [f"{name}: {note}" for note in read_json(run.separation / f"{name}.json").get("notes", [])]
    return words


def _of_the_data(data: dict[str, Any]) -> list[str]:
    """What was left out of the data, and what was cut."""
    words = []
    if data["bad_rows"]:
        words.append(f"bad rows left out: {data['bad_rows']}; rows.jsonl has file, line and reason of each")
    if data["prompts_in_train_and_eval"]:
        words.append(f"held-out prompts that were trained on: {data['prompts_in_train_and_eval']}")
    for name, count in data.get("evaluation_prompts_trained_on", {}).items():
        if count:
            words.append(f"prompts of {name} that were trained on: {count}")
    for name in ("train", "eval"):
        cuts = [
            f"{data[name][f'{side}_cut']} {side}"
            for side in ("prompts", "responses")
            if data[name] and data[name][f"{side}_cut"]
        ]
        if cuts:
            words.append(f"{name}: {' and '.join(cuts)} were cut to the recipe's lengths; rows.jsonl has each")
    return words
