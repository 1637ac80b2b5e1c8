"""The command line: arguments in, one function of the package, a table or one JSON object out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydiv.errors import UserError

if TYPE_CHECKING:
    from raydiv.launch import Result

Handler = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 2 the user must change something, 1 the run failed."""
    options = _parse(arguments)
    handler: Handler = options.handler
    try:
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
    except KeyboardInterrupt:
        print("raydiv: interrupted", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of a command; ``key=value`` may stand anywhere among them, which argparse alone does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    strays = [word for word in rest if not hasattr(options, "overrides") or word.startswith("-") or "=" not in word]
    if strays:
        parser.error(f"unrecognized arguments: {' '.join(strays)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raydiv", description="Aligns language models for safety on Ray, and shows whether it worked."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quickstart = _command(commands, "quickstart", _quickstart, "the whole experiment on this machine in minutes")
    quickstart.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the quickstart's recipe")
    _reports(quickstart, shows_text=True)

    for name, handler, about in (
        ("prepare", _prepare, "data -> tokens -> reference log-probs, cached; safe to repeat"),
        ("train", _train, "one run; prepares first if needed"),
    ):
        command = _command(commands, name, handler, about)
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="changes to the recipe, as section.key=value"
        )
        _reports(command, shows_text=name == "train")

    separation = _command(commands, "separation", _separation, "separation of safe and harmful prompts, for any models")
    _models(separation, prompts="bundled:anchors")
    _reports(separation)

    evaluate = _command(commands, "evaluate", _evaluate, "attack success, over-refusal and degenerate answers")
    _models(evaluate, prompts="bundled:heldout")
    evaluate.add_argument("--reference", help="the model that scores the answers (default: the first MODEL)")
    evaluate.add_argument("--max-new-tokens", type=int, default=48)
    evaluate.add_argument("--output", type=Path, help="a folder for the rates and a verdict per prompt")
    _reports(evaluate, shows_text=True)

    export = _command(commands, "export", _export, "the trained model as a plain Hugging Face directory")
    export.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    export.add_argument("destination", metavar="DEST", type=Path)
    export.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, not merged")
    _reports(export)

    data = commands.add_parser(
        "data", help="check data sets, and build them", description="check data sets, and build them"
    )
    _data_commands(data.add_subparsers(required=True, metavar="COMMAND"))

    plan = _command(commands, "plan", _plan, "checks everything and predicts memory, steps and time; starts nothing")
    plan.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    plan.add_argument(
        "--tokens-per-second", type=float, metavar="X", help="of all workers (default: as measured before)"
    )
    _reports(plan)

    bench = _command(commands, "bench", _bench, "how fast this machine is with a recipe, beside the plain way")
    bench.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    bench.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    bench.add_argument(
        "--part", choices=["train", "data", "start"], default="train", help="what is timed (default: train)"
    )
    bench.add_argument(
        "--against",
        action="append",
        choices=["loop", "trl"],
        help="train: beside plain PyTorch, which shows what the hardware allows, or TRL; may be repeated (default: loop)",
    )
    bench.add_argument("--steps", type=int, help="train, data: updates that are timed (default: train 6, data 20)")
    bench.add_argument("--warmup", type=int, help="train: updates before those (default: 2)")
    bench.add_argument("--repeats", type=int, help="how often each is timed, in turn (default: 3)")
    bench.add_argument(
        "--rows", type=int, action="append", metavar="N", help="data: examples; may be repeated (default: 200000)"
    )
    _reports(bench)

    losses = _command(commands, "losses", _losses, "the objectives: divergence, ceiling, data needed, options")
    losses.add_argument("names", nargs="*", metavar="NAME", help="these alone, described in full")
    _reports(losses)
    _command(commands, "schema", _schema, "the recipe's JSON Schema, for editors")
    return parser


def _data_commands(commands: Any) -> None:
    check = _command(commands, "check", _data_check, "what is in a data set, and what is wrong with it")
    check.add_argument(
        "source", metavar="FILE", help="a source: a file, folder, s3://, hf://org/name, bundled:NAME ..."
    )
    check.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as data.columns.prompt=question"
    )
    check.add_argument(
        "--recipe", help="whose tokenizer, template, lengths and evaluation prompts count (default: the quickstart's)"
    )
    check.add_argument(
        "--rows", type=int, default=20, metavar="N", help="bad rows to print (default: 20; --json has all)"
    )
    _reports(check)

    build = _command(
        commands, "build", _data_build, "a compliance-refusal or preference set from harmful and harmless prompts"
    )
    for side in ("harmful", "harmless"):
        build.add_argument(
            f"--{side}",
            required=True,
            metavar="SOURCE",
            help=f"{side} prompts: a place, or a section as '{{path: ..., columns: {{...}}}}'",
        )
    build.add_argument("--output", type=Path, required=True, help="a new or empty folder")
    build.add_argument("--kind", required=True, choices=["compliance-refusal", "preference"])
    build.add_argument(
        "--refusals",
        default="bank",
        help="bank, constant, own, model:ID, or a source with a column refusal (default: bank)",
    )
    build.add_argument("--worse", help="worse answers of preference data: own (the default) or model:ID")
    build.add_argument("--prompts", type=int, help="how many of each class (default: all)")
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--template", help="a chat template (Jinja text or file) for the models asked")
    build.add_argument("--max-new-tokens", type=int, help="of a model's answer (default: 256)")
    build.add_argument("--use-gpu", action="store_true")
    _reports(build)


def _command(commands: Any, name: str, handler: Handler, about: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    command.set_defaults(handler=handler)
    return command


def _reports(command: argparse.ArgumentParser, shows_text: bool = False) -> None:
    command.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output and nothing else there"
    )
    if shows_text:
        command.add_argument(
            "--show-text", action="store_true", help="write prompts and answers out, not their ids alone"
        )


def _models(command: argparse.ArgumentParser, prompts: str) -> None:
    command.add_argument(
        "models", nargs="+", metavar="MODEL", help="a run, a model directory, a hub id or bundled:NAME"
    )
    command.add_argument("--prompts", default=prompts, metavar="FILE", help=f"prompts and labels (default: {prompts})")
    command.add_argument("--template", help="a chat template (Jinja text or file), in place of the tokenizer's")
    command.add_argument("--use-gpu", action="store_true")


def _quickstart(options: argparse.Namespace) -> int:
    from raydiv.bundled import QUICKSTART
    from raydiv.config import load_recipe
    from raydiv.run import RunDirectory

    recipe = load_recipe(QUICKSTART, options.overrides)
    if not any(override.startswith("name=") for override in options.overrides):
        first, number = recipe.name, 1
        while RunDirectory.of(recipe).path.exists():
            number += 1
            recipe = recipe.model_copy(update={"name": f"{first}-{number}"})
    return _run(recipe, options)


def _train(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe

    return _run(load_recipe(options.recipe, options.overrides), options)


def _run(recipe: Any, options: argparse.Namespace) -> int:
    from raydiv.launch import train

    result = train(recipe, show_text=options.show_text)
    _print(options, result.report, lambda: _show_run(result))
    return 0


def _show_run(result: Result) -> None:
    from raydiv.report.table import before_after, notes

    rows = before_after(result.run)
    if rows:
        _table(["", "before", "after"], rows)
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


def _prepare(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe
    from raydiv.preparation import prepare

    summary = prepare(load_recipe(options.recipe, options.overrides)).summary()

    def show() -> None:
        sets = {name: counts for name, counts in summary.items() if name in ("train", "eval") and counts}
        _table(["", *sets], [(key, *(str(counts[key]) for counts in sets.values())) for key in summary["train"]])
        reference = summary["reference"]
        print(f"reference log-probs: {reference['hits']} from the store, {reference['misses']} computed")

    _print(options, summary, show)
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from raydiv.bundled import QUICKSTART
    from raydiv.config import load_recipe, source_of
    from raydiv.inspection import check_data

    (report,) = check_data(load_recipe(options.recipe or QUICKSTART, options.overrides), [source_of(options.source)])
    _print(options, report.facts, lambda: _show_data(report.facts, options.rows))
    return 0 if report.sound else 2


def _data_build(options: argparse.Namespace) -> int:
    from raydiv.config import source_of
    from raydiv.config.recipe import Cluster
    from raydiv.construction import build_data

    report = build_data(
        source_of(options.harmful),
        source_of(options.harmless),
        options.output,
        kind=options.kind,
        refusals=options.refusals,
        worse=options.worse,
        prompts=options.prompts,
        seed=options.seed,
        cluster=Cluster(use_gpu=options.use_gpu),
        template=options.template,
        max_new_tokens=options.max_new_tokens,
    )

    def show() -> None:
        counts = report.as_json()["classes"]
        _table(["", *counts], [(key, *(str(one[key]) for one in counts.values())) for key in counts["harmful"]])
        print(f"data     {report.data}\ncard     {report.card}")

    _print(options, report.as_json(), show)
    return 0


def _show_data(facts: dict[str, Any], rows: int) -> None:
    labels = ["harmful", "harmless", "unlabelled"]
    _table(
        ["examples", *labels], [(name, *(str(by[label]) for label in labels)) for name, by in facts["classes"].items()]
    )
    pairs, prompts, duplicates = facts["pairs"], facts["prompts"], facts["duplicates"]
    found = [
        ("different prompts", prompts["different"]),
        ("prompts labelled both harmful and harmless", prompts["with_both_labels"]),
        ("complete pairs", pairs["complete"]),
        ("examples without a partner", pairs["without_partner"]),
        ("pairs that are none", len(pairs["broken"])),
        ("examples that were there before", duplicates["examples"]),
        ("answers both aligned and unaligned", duplicates["aligned_and_unaligned"]),
        ("bad rows", facts["bad_rows"]["count"]),
    ]
    _table(["", "count"], [(name, str(count)) for name, count in found])
    lengths = {name: spread for name, spread in facts["tokens"].items() if "histogram" in spread}
    quantiles = ["min", "p50", "p90", "p99", "max"]
    _table(
        ["tokens", *quantiles], [(name, *(str(spread[key]) for key in quantiles)) for name, spread in lengths.items()]
    )
    for name, spread in lengths.items():
        print(name)
        most = max(one["examples"] for one in spread["histogram"])
        for one in spread["histogram"]:
            print(f"  {one['from']:>6}-{one['to']:<6} {'#' * round(40 * one['examples'] / most):<40} {one['examples']}")
    cut = facts["tokens"]["truncated"]
    print(
        f"truncated: {cut['prompts']} prompts at {cut['max_prompt_length']} tokens, {cut['responses']} responses at "
        f"{cut['max_length']} with their prompt"
    )
    for name, overlap in facts["overlap"].items():
        print(
            f"{name}: {overlap['same']} of its {overlap['prompts']} prompts are in here, and {overlap['near']} more nearly"
        )
    for place in pairs["broken"][:rows]:
        print(place)
    for row in facts["bad_rows"]["rows"][:rows]:
        print(f"{row['file']}:{row['line']}: {row['reason']}")
    left = facts["bad_rows"]["count"] - rows
    if left > 0:
        print(f"and {left} more bad rows (--rows {facts['bad_rows']['count']}, or --json)")


def _separation(options: argparse.Namespace) -> int:
    from raydiv.config.recipe import Cluster
    from raydiv.measure import separation

    cluster = Cluster(use_gpu=options.use_gpu)
    reports = separation(options.models, options.prompts, template=options.template, cluster=cluster)

    def show() -> None:
        for report in reports:
            _table([report.model, "all prompts", "lengths matched", "labels shuffled"], report.table())
        for report in reports:
            for note in report.as_json()["notes"]:
                print(f"{report.model}: {note}")

    _print(options, {"models": [report.as_json() for report in reports]}, show)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from raydiv.config.recipe import Cluster
    from raydiv.evaluation.judges import JUDGES
    from raydiv.measure import evaluate

    if options.show_text and not options.output:
        raise UserError("--show-text: say where to write the answers, with --output FOLDER")
    reports = evaluate(
        options.models,
        options.prompts,
        reference=options.reference,
        max_new_tokens=options.max_new_tokens,
        template=options.template,
        cluster=Cluster(use_gpu=options.use_gpu),
    )
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        for number, report in enumerate(reports):
            report.write(options.output, f"model-{number}", options.show_text)

    def show() -> None:
        names = list(reports[0].rates)
        rows = [(name, *(str(report.rates[name]) for report in reports)) for name in names]
        rows.append(("log-prob per token under the reference", *(f"{report.logp_per_token:.2f}" for report in reports)))
        _table(["", *options.models], rows)
        print(JUDGES[reports[0].judge].errors)

    _print(options, {"models": [report.as_json() for report in reports]}, show)
    return 0


def _export(options: argparse.Namespace) -> int:
    from raydiv.model.export import export

    directory = export(options.run, options.destination, options.adapter)
    _print(options, {"model": str(directory)}, lambda: print(directory))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe
    from raydiv.planning.forecast import plan

    found = plan(load_recipe(options.recipe, options.overrides), tokens_per_second=options.tokens_per_second)

    def show() -> None:
        _table(*found.table())
        for note in found.notes():
            print(note)

    _print(options, found.facts, show)
    return 0 if found.fits else 2


def _bench(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    apply = {
        "train": {"repeats", "steps", "against", "warmup"},
        "data": {"repeats", "steps", "rows"},
        "start": {"repeats"},
    }
    names = ("repeats", "steps", "against", "warmup", "rows")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    for name in given:
        if name not in apply[options.part]:
            raise UserError(f"--{name}: means nothing with --part {options.part}")
    if options.part == "data":
        return _bench_data(recipe, given, options)
    if options.part == "start":
        return _bench_start(recipe, given, options)
    from raydiv.benchmarks.training import bench_training, training_notes, training_table

    found = bench_training(recipe, **given)

    def show() -> None:
        _table(*training_table(found))
        for note in training_notes(found):
            print(note)

    _print(options, found, show)
    return 0


def _bench_data(recipe: Any, given: dict[str, Any], options: argparse.Namespace) -> int:
    from raydiv.benchmarks.data import bench_data, data_table

    found = bench_data(recipe, **given)

    def show() -> None:
        _table(*data_table(found))
        for name in ("stream", "train"):
            _table([name, ""], [(key, f"{value:,.4g}") for key, value in found[name].items()])

    _print(options, found, show)
    return 0


def _bench_start(recipe: Any, given: dict[str, Any], options: argparse.Namespace) -> int:
    from raydiv.benchmarks.start import bench_start, start_table

    found = bench_start(recipe, **given)
    _print(options, found, lambda: _table(*start_table(found)))
    return 0


def _losses(options: argparse.Namespace) -> int:
    from raydiv.losses.catalogue import PASSES, describe

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

    _print(options, described, show)
    return 0


def _schema(options: argparse.Namespace) -> int:
    from raydiv.config import Recipe

    schema = Recipe.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "another recipe that this one changes"}
    print(json.dumps(schema, indent=2))
    return 0


def _print(options: argparse.Namespace, content: Any, show: Callable[[], None]) -> None:
    if options.json:
        print(json.dumps(content, indent=2))
    else:
        show()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console().print(table)
