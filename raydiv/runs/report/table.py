"""The before | after table of a run, and the notes that belong beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydiv.runs.directory import RunDirectory
from raydiv.runs.measurements import AnswersFile, MeasuredValue, SeparationFile
from raydiv.runs.metric_registry import METRICS, MetricSpec, specs_of
from raydiv.runs.metrics_log import Metrics, last_values
from raydiv.utils.storage import read_json

WHEN = ("before", "after")


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A metric before and after training; None where it was not measured."""

    spec: MetricSpec
    before: MeasuredValue | None
    after: MeasuredValue | None

    @property
    def group(self) -> str:
        """The first word of the metric's name: which part of raydiv measured it."""
        return self.spec.name.partition("/")[0]

    @property
    def ends(self) -> tuple[MeasuredValue | None, MeasuredValue | None]:
        return self.before, self.after

    @property
    def totals(self) -> list[int]:
        """The number of prompts behind a rate; two numbers where before and after differ."""
        return list(dict.fromkeys(end.of for end in self.ends if end and end.of))

    def text(self, end: MeasuredValue | None) -> str:
        return "-" if end is None else self.spec.text(end.value)


SHOWN_FAMILIES = {
    "evaluate/asr/{attack}",
    "evaluate/asr_calibrated/{attack}",
    "evaluate/asr_set/{set}",
    "evaluate/over_refusal/{attack}",
    "evaluate/over_refusal_set/{set}",
}
"""Families whose members have a row in the table of the terminal; the report has every metric."""


def before_after(run: RunDirectory) -> list[tuple[str, str, str]]:
    """(label, before, after) of the measured metrics that have an entry of their own in the registry, and of attacks
    and prompt sets.
    """
    return [
        (row.spec.row_label, row.text(row.before), row.text(row.after))
        for row in measured_rows(run)
        if row.spec.name in METRICS or row.spec.family in SHOWN_FAMILIES
    ]


def measured_rows(run: RunDirectory) -> list[ReportRow]:
    """A row for each metric of the run's tables that was measured, and for every value of its answers."""
    records = run.metrics.read()
    before, after = _values(run, "before", last_values(reversed(records))), _values(run, "after", last_values(records))
    return [ReportRow(spec, before.get(spec.name), after.get(spec.name)) for spec in specs_of(before | after)]


def _values(run: RunDirectory, when: str, metrics: Metrics) -> dict[str, MeasuredValue]:
    """Values of metrics.jsonl and of the files of separation and answers, which have intervals.

    The values of answers come from their own file alone: it says whether a value was measured before or after training.
    """
    values = {
        name: MeasuredValue(metrics[name])
        for name, spec in METRICS.items()
        if spec.in_run_table and not name.startswith("evaluate/") and name in metrics
    }
    separation = SeparationFile.load(run.separation / f"{when}.json")
    answers = AnswersFile.load(run.evaluation / f"{when}.json")
    return values | ({"separation/d_b": separation.d_b} if separation else {}) | dict(answers.values if answers else {})


def notes(run: RunDirectory) -> list[str]:
    """Notes on the data (rows left out or cut), an early stop, the judge's errors and the controls of separation."""
    result = read_json(run.result)
    lines, steps = _data_notes(result["data"]), result["steps"]
    if steps["taken"] < steps["planned"]:
        lines.append(f"stopped after {steps['taken']} of {steps['planned']} updates: {steps['ended']}")
    answers = AnswersFile.load(run.evaluation / "after.json")
    lines += answers.notes if answers else []
    for when in WHEN:
        separation = SeparationFile.load(run.separation / f"{when}.json")
        lines += [f"{when}: {note}" for note in separation.notes] if separation else []
    return lines


def _data_notes(data: Mapping[str, Any]) -> list[str]:
    """Rows of the data that were left out, trained on although held out, or cut."""
    lines = []
    if data["bad_rows"]:
        lines.append(f"invalid rows left out: {data['bad_rows']}; rows.jsonl has the file, line and reason of each")
    if data["prompts_in_train_and_eval"]:
        lines.append(f"held-out prompts that are also in the training data: {data['prompts_in_train_and_eval']}")
    for name, count in data.get("evaluation_prompts_trained_on", {}).items():
        if count:
            lines.append(f"prompts of {name} that are also in the training data: {count}")
    for name in ("train", "eval"):
        cuts = [
            f"{data[name][f'{side}_cut']} {side}"
            for side in ("prompts", "responses")
            if data[name] and data[name][f"{side}_cut"]
        ]
        if cuts:
            lines.append(f"{name}: {' and '.join(cuts)} were cut to the recipe's lengths; rows.jsonl has each")
    return lines
