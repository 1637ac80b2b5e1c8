"""report.html of a sweep, its table for a terminal, and the notes below both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from raydiv.config.sweep import SweepObjective
from raydiv.experiments.sweep import labels
from raydiv.experiments.sweep.figures import sweep_pictures
from raydiv.experiments.sweep.record import FAILED, FINISHED, RUNNING, STOPPED, WAITING, SweepRecord, TrialRecord
from raydiv.runs.metric_registry import METRICS
from raydiv.runs.report.drawing import Picture, write_pictures
from raydiv.runs.report.html import render

SELECTION_BIAS = (
    "the best of {count} trials was chosen by these metrics, so they overestimate it (selection bias): evaluate the "
    "best trial on prompts that were not used for the choice"
)


def write_sweep_report(path: Path, folder: Path, record: SweepRecord) -> None:
    """Write the page to ``path``, and a PNG of each of its pictures to ``folder``."""
    pictures = sweep_pictures(record)
    write_pictures(folder, [picture for section in pictures.values() for picture in section])
    path.write_text(sweep_page(record, pictures))


def sweep_page(record: SweepRecord, pictures: Mapping[str, Sequence[Picture]]) -> str:
    """The page with these pictures, which are by section."""
    best, several = record.best, len(record.objectives) > 1
    header, rows = sweep_table(record)
    runs = [(_rounded(trial.seconds), _rounded(trial.steps), _run(trial)) for trial in record.ranked()]
    return render(
        "experiments/sweep/page.html",
        title=record.name,
        facts=_facts(record),
        goal=record.goal,
        headings=_headings(record),
        front=[(trial.number, *_cells(record, trial)) for trial in best] if several else [],
        best=_best_trial(record, best[0]) if best and not several else {},
        finished=record.finished(),
        sweep_notes=sweep_notes(record),
        pictures=pictures,
        trial_headings=[*header[1:], "seconds", "steps", "run"],
        trials=[(*row, *cells) for row, cells in zip(rows, runs, strict=True)],
        errors=[(trial.number, trial.error) for trial in record.ranked() if trial.error],
        space=yaml.safe_dump(record.space, sort_keys=False, default_flow_style=None, allow_unicode=True),
        recipe=record.recipe,
        versions=list((record.versions or {}).items()),
    )


def _facts(record: SweepRecord) -> dict[str, str]:
    facts = {
        "Search": record.search,
        "Scheduler": record.scheduler,
        "Finished": f"{len(record.finished())} of {len(record.trials)} trials",
        "Minutes": None if record.seconds is None else f"{record.seconds / 60:.1f}",
        "MLflow run": record.mlflow["run_id"] if record.mlflow else None,
    }
    return {name: fact for name, fact in facts.items() if fact}


def _best_trial(record: SweepRecord, trial: TrialRecord) -> dict[str, list[tuple[str, str]]]:
    """Tables of the best trial: its values, its objectives and constraints, and the other metrics of a run's table."""
    searched = labels.measures(record)
    others = [
        metric
        for metric, spec in METRICS.items()
        if spec.in_run_table and metric in trial.metrics and metric not in {objective.metric for objective in searched}
    ]
    return {
        f"Best: trial {trial.number}": [
            (parameter.key, labels.value_text(trial.values[parameter.key]))
            for parameter in record.parameters
            if parameter.key in trial.values
        ],
        "Objectives and constraints": [
            (_heading(record, objective), _metric(trial, objective.metric)) for objective in searched
        ],
        "Other metrics": [(labels.label(metric), _metric(trial, metric)) for metric in others],
    }


def _rounded(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:.0f}"


def _run(trial: TrialRecord) -> str:
    return trial.run if trial.kept else f"{trial.run}, not kept"


def sweep_table(record: SweepRecord) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows: finished trials, best first and infeasible ones last, then stopped and failed trials."""
    best = [trial.number for trial in record.best]
    rows = [
        (str(trial.number), _status(trial, best=trial.number in best), *_cells(record, trial))
        for trial in record.ranked()
    ]
    return ["#", "status", *_headings(record)], rows


def _status(trial: TrialRecord, *, best: bool) -> str:
    if trial.status != FINISHED:
        return trial.status
    return "best" if best else FINISHED if trial.feasible else "infeasible"


def _headings(record: SweepRecord) -> list[str]:
    metrics = [_heading(record, objective) for objective in labels.measures(record)]
    return [*labels.parameter_names(record.parameters), *metrics]


def _cells(record: SweepRecord, trial: TrialRecord) -> tuple[str, ...]:
    """Cells under the headings; a dash where a parameter does not apply or a metric was not measured."""
    values = [
        labels.value_text(trial.values[parameter.key]) if parameter.key in trial.values else "-"
        for parameter in record.parameters
    ]
    return *values, *(_metric(trial, objective.metric) for objective in labels.measures(record))


def _metric(trial: TrialRecord, metric: str) -> str:
    return labels.metric_text(metric, trial.value(metric))


def _heading(record: SweepRecord, objective: SweepObjective) -> str:
    """A metric's label and its bounds."""
    bounds = [labels.bound(constraint) for constraint in record.constraints if constraint.metric == objective.metric]
    return " ".join([labels.label(objective.metric), *bounds])


def sweep_notes(record: SweepRecord) -> list[str]:
    """How the trials ended, and the limits of their metrics."""
    finished, total = record.finished(), len(record.trials)
    notes = [f"finished: {len(finished)} of {total} trials", *_unfinished(record), *_failures(record)]
    if finished and not any(trial.feasible for trial in finished):
        rules = " and ".join(
            f"{labels.label(constraint.metric)} {labels.bound(constraint)}" for constraint in record.constraints
        )
        notes.append(f"no finished trial satisfies the constraints: {rules}")
    if record.best and len(finished) > 1:
        notes.append(SELECTION_BIAS.format(count=len(finished)))
    return notes


def _unfinished(record: SweepRecord) -> list[str]:
    texts = {STOPPED: f"stopped early by {record.scheduler}", RUNNING: "still running", WAITING: "not started"}
    counts = {status: sum(trial.status == status for trial in record.trials.values()) for status in texts}
    return [f"{text}: {counts[status]}" for status, text in texts.items() if counts[status]]


def _failures(record: SweepRecord) -> list[str]:
    """A line for each error, by the first line of its message."""
    numbers: dict[str, list[str]] = {}
    for trial in record.by_number():
        if trial.status == FAILED:
            error = (trial.error or "no error was recorded").strip().partition("\n")[0]
            numbers.setdefault(error, []).append(str(trial.number))
    return [f"failed: {len(trials)} (trial {', '.join(trials)}): {error}" for error, trials in numbers.items()]
