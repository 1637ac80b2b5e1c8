"""report.html of a sweep, its table for a terminal, and what must be read beside both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from raydiv.experiments.sweep.figures import sweep_pictures
from raydiv.experiments.sweep.report_record import (
    STATUSES,
    Aim,
    Record,
    Trial,
    aims,
    constraints,
    finished,
    in_order,
    measures,
    parameters,
    written,
)
from raydiv.runs.metric_registry import METRICS
from raydiv.runs.report.drawing import Picture, write_pictures
from raydiv.runs.report.html import render

SELECTION = (
    "the best of {count} trials was chosen by these very figures, which flatters them (selection bias): read the best trial's "
    "numbers on prompts that were not used for the choice"
)


def write_sweep_report(path: Path, folder: Path, record: Record) -> None:
    """Leave a PNG of each picture in ``folder``, and the page, which holds them all, at ``path``."""
    drawn = sweep_pictures(record)
    write_pictures(folder, [picture for several in drawn.values() for picture in several])
    path.write_text(sweep_page(record, drawn))


def sweep_page(record: Record, drawn: Mapping[str, Sequence[Picture]]) -> str:
    """The whole page with these pictures, by section."""
    best = [trial for trial in in_order(record) if trial["number"] in record["best"]]
    several = len(aims(record)) > 1
    header, rows = sweep_table(record)
    more = [(_whole(trial["seconds"]), _whole(trial["steps"]), _place(trial)) for trial in in_order(record)]
    return render(
        "experiments/sweep/page.html",
        title=record["name"],
        facts=_facts(record),
        goal=record["goal"],
        headings=_values_and_measures(record),
        front=[(trial["number"], *_figures(record, trial)) for trial in best] if several else [],
        best=_best_trial(record, best[0]) if best and not several else {},
        finished=finished(record),
        sweep_notes=sweep_notes(record),
        pictures=drawn,
        trial_headings=[*header[1:], "seconds", "steps", "run"],
        trials=[(*row, *cells) for row, cells in zip(rows, more, strict=True)],
        errors=[(trial["number"], trial["error"]) for trial in in_order(record) if trial["error"]],
        space=yaml.safe_dump(record["space"], sort_keys=False, default_flow_style=None, allow_unicode=True),
        recipe=record["recipe"],
        versions=list(record["versions"].items()),
    )


def _facts(record: Record) -> dict[str, str]:
    facts = {
        "Search": record["search"],
        "Scheduler": record["scheduler"],
        "Finished": f"{len(finished(record))} of {len(record['trials'])} trials",
        "Minutes": f"{record['seconds'] / 60:.1f}",
        "MLflow run": record["mlflow"]["run_id"] if record["mlflow"] else None,
    }
    return {name: fact for name, fact in facts.items() if fact}


def _best_trial(record: Record, trial: Trial) -> dict[str, list[tuple[str, str]]]:
    """Tables of the best trial: its values, its objectives and constraints, and the other metrics of a run's table."""
    asked = measures(record)
    known = [
        Aim(metric, True)
        for metric, spec in METRICS.items()
        if spec.in_run_table and metric not in {aim.metric for aim in asked}
    ]
    values = [(key, written(trial["values"][key])) for key in record["space"] if key in trial["values"]]
    reached = [(_heading(record, aim), aim.words(aim.value(trial))) for aim in asked]
    beside = [(aim.label, aim.words(aim.value(trial))) for aim in known if trial["metrics"].get(aim.metric) is not None]
    return {f"Best: trial {trial['number']}": values, "It reached": reached, "It also measured": beside}


def _whole(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:.0f}"


def _place(trial: Trial) -> str:
    return trial["run"] if trial["kept"] else f"{trial['run']}, not kept"


def sweep_table(record: Record) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows: the finished trials, best first, those beyond a bound after them, then what was stopped or failed."""
    rows = [(str(trial["number"]), _status(record, trial), *_figures(record, trial)) for trial in in_order(record)]
    return ["#", "status", *_values_and_measures(record)], rows


def _status(record: Record, trial: Trial) -> str:
    if trial["status"] != "finished":
        return str(trial["status"])
    return "best" if trial["number"] in record["best"] else "finished" if trial["feasible"] else "infeasible"


def _values_and_measures(record: Record) -> list[str]:
    return [*(one.name for one in parameters(record)), *(_heading(record, aim) for aim in measures(record))]


def _figures(record: Record, trial: Trial) -> tuple[str, ...]:
    """Cells under these headings; a dash where a parameter does not apply, or nothing was measured."""
    values = [written(trial["values"][key]) if key in trial["values"] else "-" for key in record["space"]]
    return *values, *(aim.words(aim.value(trial)) for aim in measures(record))


def _heading(record: Record, aim: Aim) -> str:
    """A metric with the bounds that it has."""
    return " ".join([aim.label, *(rule.bound_words for rule in constraints(record) if rule.metric == aim.metric)])


def sweep_notes(record: Record) -> list[str]:
    """How the trials ended, and what their figures do not say."""
    done, total = finished(record), len(record["trials"])
    words = [f"finished: {len(done)} of {total} trials", *_unfinished(record), *_failures(record)]
    if done and not any(trial["feasible"] for trial in done):
        rules = " and ".join(f"{rule.label} {rule.bound_words}" for rule in constraints(record))
        words.append(f"none of the finished trials satisfies the constraints: {rules}")
    if record["best"] and len(done) > 1:
        words.append(SELECTION.format(count=len(done)))
    return words


def _unfinished(record: Record) -> list[str]:
    by = f" by {record['scheduler']}" if record["scheduler"] else ""
    ways = {"stopped": f"stopped early{by}", "running": "still running", "waiting": "not begun"}
    counts = {status: sum(trial["status"] == status for trial in record["trials"]) for status in STATUSES}
    return [f"{way}: {counts[status]}" for status, way in ways.items() if counts[status]]


def _failures(record: Record) -> list[str]:
    """One line for each error, by its own first line."""
    numbers: dict[str, list[str]] = {}
    for trial in record["trials"]:
        if trial["status"] == "failed":
            error = (trial["error"] or "no error was noted").strip().partition("\n")[0]
            numbers.setdefault(error, []).append(str(trial["number"]))
    return [f"failed: {len(found)} (trial {', '.join(found)}): {error}" for error, found in numbers.items()]
