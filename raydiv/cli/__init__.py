"""The command line: arguments in, one function of the package, a table or one JSON object out."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydiv.cli.data import add_data_commands
from raydiv.cli.evaluation import add_measuring_commands
from raydiv.cli.experiments import add_comparing_commands
from raydiv.cli.output import Handler, add_command, add_recipe, add_reports, print_report, print_table, results_alone
from raydiv.cli.submit import add_submitting_command
from raydiv.utils.errors import UserError
from raydiv.utils.signals import STATUS, Terminated, at_sigterm

if TYPE_CHECKING:
    from raydiv.commands.train import Result


PLAIN_PARTS = {"start": {"repeats"}, "trials": {"repeats", "steps"}, "scale": {"repeats"}}
"""Parts of ``bench`` with a table each, and the options that mean something there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 2 the user must change something, 1 the run failed,
    143 stopped by SIGTERM, after a checkpoint where one was training.
    """
    options = _parse(arguments)
    handler: Handler = options.handler
    try:
        with results_alone(), at_sigterm():
            return handler(options)
    except UserError as error:
        print(f"raydiv: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RuntimeError, FloatingPointError, OSError) as error:
        print(f"raydiv: the run failed: {error}", file=sys.stderr)
        return 1
    except Terminated as stopped:
        print(f"raydiv: {stopped}", file=sys.stderr)
        return STATUS
    except KeyboardInterrupt:
        print("raydiv: interrupted", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of a command; ``key=value`` may stand anywhere among them, which argparse alone does not allow.

    ``submit`` has those of the command that it sends in ``sent``, and its words in ``words``.
    """
    own = list(sys.argv[1:] if arguments is None else arguments)
    words: list[str] = []
    if own[:1] == ["submit"] and "--" in own:
        own, words = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = _parser()
    options, rest = parser.parse_known_args(own)
    strays = [word for word in rest if not hasattr(options, "overrides") or word.startswith("-") or "=" not in word]
    if strays:
        parser.error(f"unrecognized arguments: {' '.join(strays)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    if own[:1] == ["submit"]:
        options.words, options.sent = words, _parse(words) if words else None
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raydiv", description="Aligns language models for safety on Ray, and shows whether it worked."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quickstart = add_command(commands, "quickstart", _quickstart, "the whole experiment on this machine in minutes")
    quickstart.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the quickstart's recipe")
    add_reports(quickstart, shows_text=True)

    for name, handler, about in (
        ("prepare", _prepare, "data -> tokens -> reference log-probs, cached; safe to repeat"),
        ("train", _train, "one run; prepares first if needed"),
    ):
        command = add_command(commands, name, handler, about)
        add_recipe(command)
        if name == "train":
            command.add_argument(
                "--resume", action="store_true", help="go on with the run if it is there, from its newest checkpoint"
            )
        add_reports(command, shows_text=name == "train")

    status = add_command(commands, "status", _status, "where a run stands, read from its directory")
    status.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    add_reports(status)

    add_submitting_command(commands)
    add_comparing_commands(commands)
    add_measuring_commands(commands)

    export = add_command(commands, "export", _export, "the trained model as a plain Hugging Face directory")
    export.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    export.add_argument("destination", metavar="DEST", type=Path)
    export.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, not merged")
    add_reports(export)

    data = commands.add_parser(
        "data", help="check data sets, and build them", description="check data sets, and build them"
    )
    add_data_commands(data.add_subparsers(required=True, metavar="COMMAND"))

    plan = add_command(commands, "plan", _plan, "checks everything and predicts memory, steps and time; starts nothing")
    add_recipe(plan)
    plan.add_argument(
        "--tokens-per-second", type=float, metavar="X", help="of all workers (default: as measured before)"
    )
    add_reports(plan)

    bench = add_command(commands, "bench", _bench, "how fast this machine is with a recipe, beside the plain way")
    add_recipe(bench)
    bench.add_argument(
        "--part",
        choices=["train", "data", "embed", *PLAIN_PARTS],
        default="train",
        help="what is timed (default: train)",
    )
    bench.add_argument(
        "--against",
        action="append",
        choices=["loop", "trl"],
        help="train: beside plain PyTorch, which shows what the hardware allows, or TRL; may be repeated (default: loop)",
    )
    bench.add_argument(
        "--steps",
        type=int,
        help="train, data: updates that are timed; trials: of each (default: train 6, data 20, trials 4)",
    )
    bench.add_argument("--warmup", type=int, help="train: updates before those (default: 2)")
    bench.add_argument("--repeats", type=int, help="how often each is timed, in turn (default: 3)")
    bench.add_argument(
        "--rows",
        type=int,
        action="append",
        metavar="N",
        help="data: examples, may be repeated (default: 200000); embed: prompts (default: 800)",
    )
    add_reports(bench)

    losses = add_command(commands, "losses", _losses, "the objectives: divergence, ceiling, data needed, options")
    losses.add_argument("names", nargs="*", metavar="NAME", help="these alone, described in full")
    add_reports(losses)
    add_command(commands, "schema", _schema, "the recipe's JSON Schema, for editors")
    return parser


def _quickstart(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe
    from raydiv.data.bundled import QUICKSTART
    from raydiv.runs.directory import RunDirectory

    recipe = load_recipe(QUICKSTART, options.overrides)
    if not any(override.startswith("name=") for override in options.overrides):
        first, number = recipe.name, 1
        while RunDirectory.of(recipe).path.exists():
            number += 1
            recipe = recipe.model_copy(update={"name": f"{first}-{number}"})
    return _run(recipe, options)


def _train(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe

    return _run(load_recipe(options.recipe, options.overrides), options, options.resume)


def _run(recipe: Any, options: argparse.Namespace, resume: bool = False) -> int:
    from raydiv.commands.train import train

    result = train(recipe, show_text=options.show_text, resume=resume)
    print_report(options, result.report, lambda: _show_run(result))
    return 0


def _show_run(result: Result) -> None:
    from raydiv.runs.report.table import before_after, notes

    rows = before_after(result.run)
    if rows:
        print_table(["", "before", "after"], rows)
    for note in notes(result.run):
        print(note)
    print(f"\nmodel    {result.report['paths']['model']}")
    print(f"report   {result.report['paths']['report']}")
    print(f"pictures {result.report['paths']['pictures']}")
    uri = result.report["mlflow"]["uri"]
    print(
        f"mlflow   {uri}\n         open it: mlflow ui --backend-store-uri {uri}" if "://" in uri else f"mlflow   {uri}"
    )
    if not result.report["mlflow"]["sent"]:
        print("         it was away: part of this run could not be sent; metrics.jsonl has all of it")


def _status(options: argparse.Namespace) -> int:
    from raydiv.commands.status import status, status_lines

    found = status(options.run)

    def show() -> None:
        for name, text in status_lines(found):
            print(f"{name:<18} {text}")

    print_report(options, found, show)
    return 0


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

    directory = export(options.run, options.destination, options.adapter)
    print_report(options, {"model": str(directory)}, lambda: print(directory))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from raydiv.commands.plan.forecast import plan
    from raydiv.config import load_recipe

    found = plan(load_recipe(options.recipe, options.overrides), tokens_per_second=options.tokens_per_second)

    def show() -> None:
        print_table(*found.table())
        for note in found.notes():
            print(note)

    print_report(options, found.facts, show)
    return 0 if found.fits else 2


def _bench(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    apply = {
        "train": {"repeats", "steps", "against", "warmup"},
        "data": {"repeats", "steps", "rows"},
        "embed": {"repeats", "rows"},
        **PLAIN_PARTS,
    }
    names = ("repeats", "steps", "against", "warmup", "rows")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    for name in given:
        if name not in apply[options.part]:
            raise UserError(f"--{name}: means nothing with --part {options.part}")
    if options.part == "data":
        return _bench_data(recipe, given, options)
    if options.part == "embed":
        return _bench_embed(recipe, given, options)
    if options.part in PLAIN_PARTS:
        return _bench_plain(recipe, given, options)
    from raydiv.commands.bench.training import bench_training, training_notes, training_table

    found = bench_training(recipe, **given)

    def show() -> None:
        print_table(*training_table(found))
        for note in training_notes(found):
            print(note)

    print_report(options, found, show)
    return 0


def _bench_data(recipe: Any, given: dict[str, Any], options: argparse.Namespace) -> int:
    from raydiv.commands.bench.data import bench_data, data_table

    found = bench_data(recipe, **given)

    def show() -> None:
        print_table(*data_table(found))
        for name in ("stream", "train"):
            print_table([name, ""], [(key, f"{value:,.4g}") for key, value in found[name].items()])

    print_report(options, found, show)
    return 0


def _bench_embed(recipe: Any, given: dict[str, Any], options: argparse.Namespace) -> int:
    from raydiv.commands.bench.embed import bench_embed, embed_table

    if len(given.get("rows", [1])) > 1:
        raise UserError("--rows: means one number with --part embed")
    found = bench_embed(recipe, **given | ({"rows": given["rows"][0]} if "rows" in given else {}))
    print_report(options, found, lambda: print_table(*embed_table(found)))
    return 0


def _bench_plain(recipe: Any, given: dict[str, Any], options: argparse.Namespace) -> int:
    """A part whose room of ``raydiv.commands.bench`` has ``bench_PART`` and ``PART_table``, and nothing else to say."""
    room = importlib.import_module(f"raydiv.commands.bench.{options.part}")
    found = getattr(room, f"bench_{options.part}")(recipe, **given)
    print_report(options, found, lambda: print_table(*getattr(room, f"{options.part}_table")(found)))
    return 0


def _losses(options: argparse.Namespace) -> int:
    from raydiv.commands.losses import PASSES, describe

    described = describe(options.names)

    def show() -> None:
        for name, facts in described.items():
            print(f"{name}: {facts['description' if options.names else 'summary']}")
            print(f"  data        {facts['data']}{'' if facts['reference'] else ', no reference'}")
            for number, estimate in enumerate(facts["estimates"]):
                ceiling = "none" if estimate["ceiling"] is None else f"{estimate['ceiling']:.4g}"
                chosen = ", ".join(f"{key}: {value}" for key, value in estimate["options"].items())
                print(
                    f"  {'' if number else 'estimates':<11} {estimate['divergence']}; ceiling {ceiling}; "
                    f"{PASSES[estimate['scope']]}{f' ({chosen})' if chosen else ''}"
                )
            print(f"  options     {', '.join(f'{key}: {text}' for key, text in facts['options'].items()) or 'none'}")
            print(f"  paper       {facts['paper']}\n")

    print_report(options, described, show)
    return 0


def _schema(options: argparse.Namespace) -> int:
    from raydiv.config import Recipe

    schema = Recipe.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "another recipe that this one changes"}
    print_report(argparse.Namespace(json=True), schema, lambda: None)
    return 0
