"""report.html of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.runs.directory import RunDirectory
from raydiv.runs.measurements import readable_prompt
from raydiv.runs.report.drawing import Picture, write_pictures
from raydiv.runs.report.figures import pictures
from raydiv.runs.report.html import render
from raydiv.runs.report.table import WHEN, measured_rows, notes
from raydiv.utils.jsonl import read_records
from raydiv.utils.storage import atomic, intact, read_json

GROUPS = {
    "separation": "Separation of harmful and harmless prompts",
    "evaluate": "Answers to the evaluation prompts",
    "eval": "Held-out examples",
}
"""Headings of the table, by the first word of a metric's name."""

SETS = ("train", "eval")


@dataclass(frozen=True, slots=True)
class AnswersRow:
    """A prompt, its kind and attack, and the answers to it before and after training; empty where there is none."""

    prompt: str
    origin: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @classmethod
    def of(cls, before: Mapping[str, Any], after: Mapping[str, Any]) -> AnswersRow:
        answer = after or before
        return cls(
            readable_prompt(answer["prompt"]),
            ", ".join(filter(None, (answer["kind"], answer.get("attack")))),
            before,
            after,
        )


def write_report(run: RunDirectory) -> None:
    """Write report.html, which contains every picture, and a PNG of each picture."""
    by_section = pictures(run)
    write_pictures(run.pictures, [picture for section in by_section.values() for picture in section])
    run.report.write_text(page(run, by_section))


def page(run: RunDirectory, by_section: Mapping[str, Sequence[Picture]]) -> str:
    """The content of report.html with these pictures."""
    result, recipe = read_json(run.result), run.read_recipe()
    with intact(run.result):
        of_result, run_notes = _of_result(result, recipe), notes(run)
    return render(
        "runs/report/templates/run.html",
        **of_result,
        **_measured(run),
        run_notes=run_notes,
        pictures=by_section,
        recipe=recipe,
        recipe_text=run.recipe.read_text(),
        answers=_answers_rows(run),
    )


def write_live_report(run: RunDirectory, renewal_seconds: int | None) -> None:
    """Write report.html of a run that is not finished; with ``renewal_seconds`` a browser loads it again after them."""
    recipe, steps = run.read_recipe(), run.stage.read()
    content = render(
        "runs/report/templates/live.html",
        title=recipe.name,
        facts=_facts(recipe, run.metrics.trained_values(), run.metrics.steps_taken(), steps.planned_steps),
        **_measured(run),
        pictures=pictures(run),
        renewal_seconds=renewal_seconds,
    )
    with atomic(run.report) as temporary:
        temporary.write_text(content)


def _measured(run: RunDirectory) -> dict[str, Any]:
    """The template's variables of the table of measurements."""
    rows = measured_rows(run)
    return {
        "groups": {GROUPS.get(name, name): list(group) for name, group in groupby(rows, attrgetter("group"))},
        "intervals": any(end and end.interval for row in rows for end in row.ends),
    }


def _of_result(result: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The template's variables that come from result.json."""
    data = result["data"]
    sets = {name: data[name] for name in SETS if data[name]}
    return {
        "title": result["name"],
        "facts": _facts(recipe, result["metrics"], result["steps"]["taken"], result["steps"]["planned"]),
        "versions": list(result["versions"].items()),
        "layout": _pairs(result["layout"]),
        "chat": list(data.get("chat", {}).items()),
        "sets": list(sets),
        "counts": [(_words(key), *(counts[key] for counts in sets.values())) for key in data["train"]],
        "data": _pairs(
            {name: fact for name, fact in data.items() if name not in SETS and not isinstance(fact, Mapping)}
            | {f"reference log-probs, {name}": count for name, count in data["reference"].items()}
        ),
    }


def _facts(recipe: Recipe, metrics: Mapping[str, Any], taken: int, planned: int | None) -> dict[str, str]:
    mixed = [f"{term.weight:g} {term.name}" for term in recipe.loss.terms[1:]]
    position = recipe.loss.position
    weights = f", positions {position.kind}" if position.rule else ""
    return {
        "Model": recipe.model.id
        + (f", LoRA r {recipe.model.lora.r}" if recipe.model.lora else "")
        + (f", from {recipe.model.adapter}" if recipe.model.adapter else ""),
        "Objective": " + ".join([recipe.loss.type, *mixed]) + weights,
        "Estimates": metrics.get("divergence/name", "no divergence"),
        "Updates": f"{taken} of {planned}" if planned else str(taken),
        "Workers": str(recipe.cluster.num_workers),
    }


def _answers_rows(run: RunDirectory) -> list[AnswersRow]:
    """Rows of prompts and answers; none unless the run kept the texts (--show-text)."""
    before, after = (_answers(run.evaluation / f"{when}.answers.jsonl") for when in WHEN)
    if not any("prompt" in answer for answer in after):
        return []
    no_answer: dict[str, Any] = {}
    return [AnswersRow.of(*ends) for ends in zip_longest(before, after, fillvalue=no_answer)]


def _answers(path: Path) -> list[dict[str, Any]]:
    return read_records(path) if path.exists() else []


def _pairs(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(_words(name), str(fact)) for name, fact in facts.items() if fact is not None]


def _words(key: str) -> str:
    return key.replace("_", " ")
