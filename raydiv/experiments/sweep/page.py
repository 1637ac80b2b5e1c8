"""report.html of a sweep, its table for a terminal, and what must be read beside both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
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
from raydiv.runs.report.drawing import Picture, write_pictures
from raydiv.runs.report.html import document, figures, note_list, paragraph, section, table
from raydiv.runs.report.table import KNOWN

NONE_FINISHED = "No trial has finished."
NONE_ALLOWED = "No finished trial satisfies the constraints."
FEW_TO_DRAW = "There is nothing to draw: it takes two finished trials, and values that differ between them."
FRONT = "The Pareto front: no other trial is better than one of these in every objective"
ORDER = "Best first; the figures of a trial that did not finish are the last it measured."

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
    space = yaml.safe_dump(record["space"], sort_keys=False, default_flow_style=None, allow_unicode=True)
    sections = [
        section("Goal and answer", paragraph(escape(record["goal"])), _answer(record), note_list(sweep_notes(record))),
        section("Trade-off", figures(drawn["trade-off"])) if drawn["trade-off"] else "",
        section("Parameters", figures(drawn["parameters"]) or paragraph(FEW_TO_DRAW)),
        section("All trials", _all_trials(record)),
        section("Space", f"<pre>{escape(space)}</pre>"),
        section("Recipe", f"<pre>{escape(record['recipe'])}</pre>"),
        section("Environment", table("Versions", [], list(record["versions"].items()))),
    ]
    return document(record["name"], _facts(record), sections)


def _facts(record: Record) -> dict[str, str]:
    facts = {
        "Search": record["search"],
        "Scheduler": record["scheduler"],
        "Finished": f"{len(finished(record))} of {len(record['trials'])} trials",
        "Minutes": f"{record['seconds'] / 60:.1f}",
        "MLflow run": record["mlflow"]["run_id"] if record["mlflow"] else None,
    }
    return {name: fact for name, fact in facts.items() if fact}


def _answer(record: Record) -> str:
    """The best trial, or the Pareto front, or why there is neither."""
    best = [trial for trial in in_order(record) if trial["number"] in record["best"]]
    if not best:
        return paragraph(NONE_ALLOWED if finished(record) else NONE_FINISHED)
    if len(aims(record)) > 1:
        header, rows = _values_and_measures(record), [_figures(record, trial) for trial in best]
        numbers = [(str(trial["number"]), *cells) for trial, cells in zip(best, rows, strict=True)]
        return table(FRONT, header, numbers, "trials")
    return "\n".join(['<div class="tables">', *_one(record, best[0]), "</div>"])


def _one(record: Record, trial: Trial) -> list[str]:
    """What the trial was given, and all that it measured of what is known."""
    asked = measures(record)
    known = [Aim(metric, True) for metric in KNOWN if metric not in {aim.metric for aim in asked}]
    values = [(key, written(trial["values"][key])) for key in record["space"] if key in trial["values"]]
    reached = [(_heading(record, aim), aim.words(aim.value(trial))) for aim in asked]
    beside = [(aim.label, aim.words(aim.value(trial))) for aim in known if trial["metrics"].get(aim.metric) is not None]
    found = {f"Best: trial {trial['number']}": values, "It reached": reached, "It also measured": beside}
    return [table(caption, [], rows) for caption, rows in found.items() if rows]


def _all_trials(record: Record) -> str:
    """The table of the terminal, and what there is of each trial beside its figures."""
    header, rows = sweep_table(record)
    trials = in_order(record)
    more = [(_whole(trial["seconds"]), _whole(trial["steps"]), _place(trial)) for trial in trials]
    whole = [(*row, *beside) for row, beside in zip(rows, more, strict=True)]
    errors = [(str(trial["number"]), trial["error"]) for trial in trials if trial["error"]]
    return "\n".join(
        [
            table(ORDER, [*header[1:], "seconds", "steps", "run"], whole, "trials"),
            table("Errors, by trial", [], errors, "errors") if errors else "",
        ]
    )


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
