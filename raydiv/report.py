"""Reading a run directory back for people: the before | after table, the pictures, and report.html."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import Any

from raydiv.run import Metrics, RunDirectory

ROWS: list[tuple[str, str, str]] = [
    ("separation/d_b", "separation D_B (paper protocol)", "{:.2f}"),
    ("separation/d_b_length_matched", "  same, token lengths matched", "{:.2f}"),
    ("separation/d_b_shuffled", "  same, labels shuffled", "{:.2f}"),
    ("separation/d_b_full", "separation D_B (all dimensions, less chance)", "{:.2f}"),
    ("separation/probe_auc", "AUC of a linear probe, held out", "{:.2f}"),
    ("separation/probe_auc_length_matched", "  same, token lengths matched", "{:.2f}"),
    ("separation/length_auc", "AUC of token length alone", "{:.2f}"),
    ("evaluate/asr", "attack success (ASR)", "{:.0%}"),
    ("evaluate/refused/harmful", "refused: harmful", "{:.0%}"),
    ("evaluate/refused/ordinary", "refused: ordinary harmless", "{:.0%}"),
    ("evaluate/refused/alarming", "refused: alarming harmless", "{:.0%}"),
    ("evaluate/degenerate", "degenerate answers", "{:.0%}"),
    ("evaluate/logp_per_token", "answers' log-prob per token under the base", "{:.2f}"),
    ("eval/divergence", "divergence estimate, held-out examples", "{:.3f}"),
    ("eval/reward/margin", "reward margin, held-out examples", "{:.2f}"),
]
"""Metric, its label in tables, and its format."""

CURVES = ("loss", "divergence", "reward/aligned", "reward/unaligned", "reward/margin", "grad_norm")
COLOURS = {"harmful": "#c0392b", "ordinary": "#2471a3", "alarming": "#d68910"}


def before_after(run: RunDirectory) -> list[tuple[str, str, str]]:
    """(label, before, after) of every row that the run measured: a metric's first and last value."""
    first: Metrics = {}
    last: Metrics = {}
    for record in run.metrics():
        last |= record
        first = record | first
    return [
        # rounded first, so that a rounding error below zero is not shown as -0.000
        (label, form.format(round(first[key], 6) + 0.0), form.format(round(last[key], 6) + 0.0))
        for key, label, form in ROWS
        if key in last
    ]


def notes(run: RunDirectory) -> list[str]:
    """What must be read beside the table: the judge's errors, and what the controls of separation say."""
    result = json.loads(run.result.read_text())
    words, steps = _of_the_data(result["data"]), result["steps"]
    if steps["taken"] < steps["planned"]:
        words.append(
            f"stopped after {steps['taken']} of {steps['planned']} updates: the margin is at optim.target_margin"
        )
    for name in ("before", "after"):
        apart, answers = run.separation / f"{name}.json", run.evaluation / f"{name}.json"
        if answers.exists() and name == "after":
            words.append(json.loads(answers.read_text())["judge"]["errors"])
        if apart.exists():
            words += [f"{name}: {note}" for note in json.loads(apart.read_text())["notes"]]
    return words


def _of_the_data(data: dict[str, Any]) -> list[str]:
    """What was left out of the data, and what was cut."""
    words = []
    if data["bad_rows"]:
        words.append(f"bad rows left out: {data['bad_rows']}; rows.jsonl has file, line and reason of each")
    if data["prompts_in_train_and_eval"]:
        words.append(f"held-out prompts that were trained on: {data['prompts_in_train_and_eval']}")
    for name in ("train", "eval"):
        cuts = [
            f"{data[name][f'{side}_cut']} {side}"
            for side in ("prompts", "responses")
            if data[name] and data[name][f"{side}_cut"]
        ]
        if cuts:
            words.append(f"{name}: {' and '.join(cuts)} were cut to the recipe's lengths; rows.jsonl has each")
    return words


def write_report(run: RunDirectory) -> None:
    """Draw the pictures and write the self-contained report.html of a run directory."""
    pictures = {"curves": _curves(run)}
    if (run.separation / "after.json").exists():
        pictures["separation"] = _planes(run)
        run.picture.write_bytes(pictures["separation"])
    result = json.loads(run.result.read_text())
    rows = "".join(
        f"<tr><td>{html.escape(label).replace('  ', '&emsp;')}</td><td>{before}</td><td>{after}</td></tr>"
        for label, before, after in before_after(run)
    )
    page = _PAGE.format(
        name=html.escape(result["name"]),
        rows=rows,
        notes="".join(f"<li>{html.escape(note)}</li>" for note in notes(run)),
        pictures="".join(
            f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
            for name, png in pictures.items()
        ),
        recipe=html.escape(run.recipe.read_text()),
        environment=html.escape(json.dumps({"versions": result["versions"], "data": result["data"]}, indent=2)),
    )
    run.report.write_text(page)


def _curves(run: RunDirectory) -> bytes:
    """Step metrics over the run; held-out values as dots."""
    records = run.metrics()
    figure, axes = _figure(2, 3, (11, 5.5))
    for axis, key in zip(axes.flat, CURVES, strict=True):
        for name, style in ((key, "-"), (f"{key}/ema", "-"), (f"eval/{key}", "o--")):
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1.2, label=name)
        axis.set_title(key, fontsize=9)
        if key == "divergence":
            _name_estimate(axis, records)
        if axis.has_data():
            axis.legend(fontsize=7, frameon=False)
        else:
            axis.set_axis_off()
    figure.supxlabel("optimizer update", fontsize=9)
    return _png(figure)


def _name_estimate(axis: Any, records: list[Metrics]) -> None:
    """Say which divergence is estimated, and draw its ceiling."""
    facts = next((record for record in records if "divergence/name" in record), {})
    if facts:
        axis.set_title(f"divergence: {facts['divergence/name']}", fontsize=8)
    if "divergence/ceiling" in facts:
        ceiling = facts["divergence/ceiling"]
        axis.axhline(ceiling, linestyle=":", color="grey", linewidth=1.2, label=f"ceiling {ceiling:.3g}")


def _planes(run: RunDirectory) -> bytes:
    """Prompts in the plane of their first two principal components, before and after."""
    figure, axes = _figure(1, 2, (11, 4.6))
    for axis, name in zip(axes.flat, ("before", "after"), strict=True):
        report: dict[str, Any] = json.loads((run.separation / f"{name}.json").read_text())
        for kind in dict.fromkeys(report["kinds"]):
            points = [xy for xy, mine in zip(report["plane"], report["kinds"], strict=True) if mine == kind]
            axis.scatter(*zip(*points, strict=True), s=14, alpha=0.7, label=kind, color=COLOURS.get(kind))
        matched = f"{report['matched']['d_b']:.2f}" if report["matched"] else "not measured"
        axis.set_title(f"{name}: D_B {report['figures']['d_b']:.2f}, length-matched {matched}", fontsize=10)
        axis.legend(fontsize=8, frameon=False)
    figure.supxlabel(
        "hidden states of anchor prompts: last layer, last token, first two principal components", fontsize=9
    )
    return _png(figure)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>raydiv: {name}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #8884; text-align: left; }}
td + td, th + th {{ text-align: right; font-variant-numeric: tabular-nums; }}
figure {{ margin: 1.5rem 0; }} img {{ max-width: 100%; background: white; border-radius: 4px; }}
pre {{ overflow-x: auto; font-size: .8rem; padding: .75rem; background: #8881; border-radius: 4px; }}
</style></head><body>
<h1>{name}</h1>
<table><tr><th></th><th>before</th><th>after</th></tr>{rows}</table>
<ul>{notes}</ul>
<p>Both rewards may fall while their margin grows: the objective rewards the difference of the classes, and a response can
lose probability to texts that are in neither class. Read separation and refusals only beside over-refusal, degenerate
answers and the answers' log-prob under the base model: a broken model separates well and refuses much.</p>
{pictures}
<h2>Recipe</h2><pre>{recipe}</pre>
<h2>Environment and data</h2><pre>{environment}</pre>
</body></html>
"""
