"""``raydiv quickstart``, ``plan``, ``prepare``, ``train``, ``status`` and ``export``: one run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydiv.cli.output import (
    add_command,
    add_recipe,
    add_reports,
    print_report,
    print_table,
    results_stream,
    write_result,
)

if TYPE_CHECKING:
    from raydiv.commands.train import Result


def add_run_commands(commands: Any) -> None:
    quickstart = add_command(commands, "quickstart", _quickstart, "the whole experiment on this machine in minutes")
    quickstart.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the quickstart's recipe")
    _add_open(quickstart)
    add_reports(quickstart, shows_text=True)

    plan = add_command(
        commands, "plan", _plan, "check the recipe and predict memory, steps and time, without starting anything"
    )
    add_recipe(plan)
    plan.add_argument(
        "--tokens-per-second",
        type=float,
        metavar="X",
        help="speed of all workers together (default: the last measured speed)",
    )
    plan.add_argument(
        "--detect",
        type=float,
        metavar="SHARE",
        help="say how many prompts and labels show such a difference in attack success, such as 0.05",
    )
    add_reports(plan)

    prepare = add_command(
        commands, "prepare", _prepare, "data -> tokens -> reference log-probs, all cached; safe to repeat"
    )
    add_recipe(prepare)
    add_reports(prepare)

    train = add_command(commands, "train", _train, "one run: prepare if needed, train, evaluate, report")
    add_recipe(train)
    train.add_argument("--resume", action="store_true", help="continue an existing run from its newest checkpoint")
    _add_open(train)
    add_reports(train, shows_text=True)

    status = add_command(commands, "status", _status, "the state of a run, read from its directory")
    status.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    status.add_argument(
        "--follow", action="store_true", help="show it until the run ends or stops; with --json a line for each step"
    )
    add_reports(status)

    export = add_command(commands, "export", _export, "the trained model as a plain Hugging Face directory")
    export.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    export.add_argument("destination", metavar="DEST", type=Path, help="a new or empty folder")
    export.add_argument("--adapter", action="store_true", help="export the LoRA adapter alone, not merged")
    export.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="dtype of the weights (default: the base's)")
    export.add_argument(
        "--push-to", metavar="ORG/NAME", help="upload it to this repository of the hub, a private one if it is new"
    )
    add_reports(export)


def _add_open(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--open", action="store_true", help="open report.html in a browser; it renews itself while the run goes on"
    )


def _quickstart(options: argparse.Namespace) -> int:
    from raydiv.commands.quickstart import quickstart

    return _print_run(quickstart(options.overrides, show_text=options.show_text, open_report=options.open), options)


def _train(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)  # an invalid recipe is refused before torch is imported
    from raydiv.commands.train import train

    result = train(recipe, show_text=options.show_text, resume=options.resume, open_report=options.open)
    return _print_run(result, options)


def _print_run(result: Result, options: argparse.Namespace) -> int:
    print_report(options, result.report, lambda: _show_run(result))
    return 0


def _show_run(result: Result) -> None:
    from raydiv.runs.report.table import before_after, notes

    rows = before_after(result.run)
    if rows:
        print_table(["", "before", "after"], rows)
    for note in notes(result.run):
        print(note)
    paths, mlflow = result.report["paths"], result.report["mlflow"]
    print()
    for name in ("model", "report", "pictures"):
        print(f"{name:<8} {paths[name]}")
    print(f"mlflow   {mlflow['uri']}")
    if "://" in mlflow["uri"]:
        print(f"         open it: mlflow ui --backend-store-uri {mlflow['uri']}")
    if not mlflow["sent"]:
        print("         MLflow did not answer: part of this run was not sent to it; metrics.jsonl is complete")


def _status(options: argparse.Namespace) -> int:
    from raydiv.commands.status import follow_status, status

    if not options.follow:
        report = status(options.run)
        print_report(options, report, lambda: print(_status_text(report)))
        return 0
    reports = follow_status(options.run)
    if options.json:
        for report in _when_changed(reports):
            write_result(json.dumps(report) + "\n")
    else:
        _show_while_running(reports)
    return 0


def _status_text(report: dict[str, Any]) -> str:
    from raydiv.commands.status import status_lines

    return "\n".join(f"{name:<18} {text}" for name, text in status_lines(report))


def _when_changed(reports: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The first report, those of another state or step than the one before, and the last."""
    before: dict[str, Any] = {}
    for report in reports:
        if any(report[key] != before.get(key) for key in ("state", "step", "running")):
            yield report
        before = report


def _show_while_running(reports: Iterable[dict[str, Any]]) -> None:
    """On a terminal the status, renewed in place; elsewhere a line for each state and step, then the status."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=results_stream())
    last: dict[str, Any] = {}
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for report in reports:
                live.update(Text(_status_text(report)), refresh=True)
        return
    for last in _when_changed(reports):
        planned = f" of {last['planned']}" if last["planned"] else ""
        write_result(f"{last['state']}, step {last['step']}{planned}\n")
    write_result(_status_text(last) + "\n")


def _prepare(options: argparse.Namespace) -> int:
    from raydiv.commands.prepare import prepare
    from raydiv.config import load_recipe

    summary = prepare(load_recipe(options.recipe, options.overrides)).summary()

    def show() -> None:
        sets = {name: counts for name, counts in summary.items() if name in ("train", "eval") and counts}
        print_table(["", *sets], [(key, *(str(counts[key]) for counts in sets.values())) for key in summary["train"]])
        reference = summary["reference"]
        print(f"reference log-probs: {reference['hits']} from the store, {reference['misses']} computed")

    print_report(options, summary, show)
    return 0


def _export(options: argparse.Namespace) -> int:
    from raydiv.commands.export import export

    directory = export(options.run, options.destination, options.adapter, options.dtype)
    written = {"model": str(directory)}
    if options.push_to:
        from raydiv.model.export import push

        written["hub"] = push(directory, options.push_to)
    print_report(options, written, lambda: print("\n".join(written.values())))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from raydiv.commands.plan.forecast import plan
    from raydiv.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    forecast = plan(recipe, tokens_per_second=options.tokens_per_second, detect=options.detect)

    def show() -> None:
        print_table(*forecast.table())
        for note in forecast.notes():
            print(note)

    print_report(options, forecast.facts, show)
    return 0 if forecast.fits else 2
