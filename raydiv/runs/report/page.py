"""report.html of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby, zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.runs.directory import RunDirectory
from raydiv.runs.report.drawing import Picture, write_pictures
from raydiv.runs.report.figures import pictures
from raydiv.runs.report.html import document, figures, note_list, paragraph, scroll, section, table
from raydiv.runs.report.table import MeasuredValue, ReportRow, measured, notes

GROUPS = {
    "separation": "Separation of harmful and harmless prompts",
    "evaluate": "Answers to the evaluation prompts",
    "eval": "Held-out examples",
}
"""Headings in the table, by the first word of its metrics."""

TOGETHER = """Read separation and refusals only beside over-refusal, degenerate answers and
the answers' log-prob under the base model: a broken model separates well and refuses much."""

FALLING = """<strong>Why both rewards may fall while their margin grows.</strong> A response's reward is beta times its
log-ratio: how much likelier it has become than it was under the reference. The probabilities of all texts that could follow
a prompt add up to one, and the data name a few of them. An objective that contrasts the classes asks for their difference
alone, and the easiest way to it is to lower the unaligned responses. The aligned ones share words and weights with them and
often sink too, only less; what both lose goes to texts of neither class, about which the data say nothing. A growing margin
under falling rewards therefore shows that the model tells the classes apart, not that it has come to say what is wanted.
The log-ratio's root mean square says how far it has moved; degenerate answers, and the answers' log-prob under the base
model, say whether what it writes is still coherent. If the aligned reward keeps falling, mix likelihood in
(<code>loss.mix.sft</code>), bound or penalise the objective (<code>skew</code>, <code>log-ratio-l2</code>), or stop earlier
(<code>optim.target_margin</code>)."""

NOT_MEASURED = """Nothing was measured: the recipe names no <code>separation.prompts</code>, no
<code>evaluate.prompts</code> and no <code>data.eval</code>."""
NO_ANSWER: dict[str, Any] = {}
NO_PLANE = "There is none: the recipe names no <code>separation.prompts</code>."
NO_HELD_OUT = "There are no held-out examples to show rewards of: the recipe has no <code>data.eval</code>."
NO_REFERENCE = "There are none: the objective has no reference to count rewards from."


def write_report(run: RunDirectory) -> None:
    """Leave a PNG of each picture in the run, and report.html, which holds them all."""
    drawn = pictures(run)
    write_pictures(run.pictures, [picture for several in drawn.values() for picture in several])
    run.report.write_text(page(run, drawn))


def page(run: RunDirectory, drawn: Mapping[str, Sequence[Picture]]) -> str:
    """The whole of report.html with these pictures, by section."""
    result, recipe = json.loads(run.result.read_text()), run.read_recipe()
    sections = [
        section("Before and after", _measured(measured(run)), note_list(notes(run))),
        section("Training", figures(drawn["training"]), paragraph(FALLING)),
        section("Separation", figures(drawn["separation"]) or paragraph(NO_PLANE)),
        section("Rewards of held-out examples", figures(drawn["rewards"]) or paragraph(_no_rewards(recipe))),
        _texts(run),
        section("Recipe", f"<pre>{escape(run.recipe.read_text())}</pre>"),
        section("Environment and data", _environment(result)),
    ]
    return document(result["name"], _facts(result, recipe), sections)


def _facts(result: Mapping[str, Any], recipe: Recipe) -> dict[str, str]:
    """What the run was."""
    mixed = [f"{term.weight:g} {term.name}" for term in recipe.loss.terms[1:]]
    return {
        "Model": recipe.model.id + (f", LoRA r {recipe.model.lora.r}" if recipe.model.lora else ""),
        "Objective": " + ".join([recipe.loss.type, *mixed]),
        "Estimates": result["metrics"].get("divergence/name", "no divergence"),
        "Updates": f"{result['steps']['taken']} of {result['steps']['planned']}",
        "Workers": str(recipe.cluster.num_workers),
    }


def _measured(rows: Sequence[ReportRow]) -> str:
    """The before | after table, in groups of metrics."""
    if not rows:
        return paragraph(NOT_MEASURED)
    intervals = any(found and found.interval for row in rows for found in (row.before, row.after))
    beside = " <small>95% interval</small>" if intervals else ""
    ends = "".join(f'<th scope="col">{when}{beside}</th>' for when in ("before", "after"))
    head = f'<thead><tr><th scope="col">measure</th>{ends}</tr></thead>'
    groups = "\n".join(_group(name, list(own)) for name, own in groupby(rows, key=attrgetter("group")))
    whole = f'<table class="measured">\n<caption>{TOGETHER}</caption>\n{head}\n{groups}\n</table>'
    return scroll(whole, "Before and after")


def _group(name: str, rows: Sequence[ReportRow]) -> str:
    heading = f'<tr><th scope="rowgroup" colspan="3">{escape(GROUPS.get(name, name))}</th></tr>'
    return "\n".join(["<tbody>", heading, *map(_row, rows), "</tbody>"])


def _row(row: ReportRow) -> str:
    """A rate's label says of how many."""
    totals = dict.fromkeys(str(found.of) for found in (row.before, row.after) if found and found.of)
    count = f" <small>of {' and '.join(totals)}</small>" if totals else ""
    part = ' class="part"' if row.label.startswith(" ") else ""
    label = f'<th scope="row"{part}>{escape(row.label.strip())}{count}</th>'
    return f"<tr>{label}{_cell(row.before)}{_cell(row.after)}</tr>"


def _cell(found: MeasuredValue | None) -> str:
    value, interval = (str(found), found.range) if found else ("&ndash;", "")
    return f"<td>{value} <small>{interval}</small></td>".replace("-", "&minus;")


def _no_rewards(recipe: Recipe) -> str:
    return NO_HELD_OUT if recipe.data.eval is None else NO_REFERENCE


def _texts(run: RunDirectory) -> str:
    """Prompts and answers, if the run was asked to keep them (--show-text)."""
    before, after = (_answers(run.evaluation / f"{when}.answers.jsonl") for when in ("before", "after"))
    if not any("prompt" in answer for answer in after):
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{_prompt(new or old)}</th>{_answer(old)}{_answer(new)}</tr>'
        for old, new in zip_longest(before, after, fillvalue=NO_ANSWER)
    )
    head = '<tr><th scope="col">prompt</th><th scope="col">before</th><th scope="col">after</th></tr>'
    table = f'<table class="texts">\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody></table>'
    opening = f"<summary>{len(after)} prompts, written out because of --show-text</summary>"
    return section("Answers", f"<details>\n{opening}\n{scroll(table, 'Answers')}\n</details>")


def _answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _prompt(answer: Mapping[str, Any]) -> str:
    """A prompt's text, or the turns of a conversation, its kind and how it was asked."""
    prompt = answer["prompt"]
    text = prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    asked = ", ".join(filter(None, (answer["kind"], answer.get("attack"))))
    return f"{escape(text)}<small>{escape(asked)}</small>"


def _answer(answer: Mapping[str, Any]) -> str:
    return f"<td>{escape(answer['answer'])}<small>{escape(answer['verdict'])}</small></td>" if answer else "<td></td>"


def _environment(result: Mapping[str, Any]) -> str:
    """Versions, how the workers laid examples out, and the data: counts of each set, and what the whole is known by."""
    data = result["data"]
    sets = {name: counts for name, counts in data.items() if name in ("train", "eval") and counts}
    others = {
        name: fact for name, fact in data.items() if name not in ("train", "eval") and not isinstance(fact, Mapping)
    }
    reference = {f"reference log-probs, {name}": count for name, count in data["reference"].items()}
    counts = [(_words(key), *(str(found[key]) for found in sets.values())) for key in data["train"]]
    tables = [
        table("Versions", [], list(result["versions"].items())),
        table("Layout", [], _pairs(result["layout"])),
        table("Examples", list(sets), counts),
        table("Data", [], _pairs(others | reference)),
    ]
    return '<div class="tables">\n' + "\n".join(tables) + "\n</div>"


def _pairs(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(_words(name), str(fact)) for name, fact in facts.items() if fact is not None]


def _words(key: str) -> str:
    return key.replace("_", " ")
