"""``raydiv data check`` and ``raydiv data build``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from raydiv.cli.output import add_command, add_reports, print_report, print_table


def add_data_commands(commands: Any) -> None:
    about = "check data sets, and build them"
    data = commands.add_parser("data", help=about, description=about).add_subparsers(required=True, metavar="COMMAND")
    check = add_command(
        data, "check", _check, "content and errors of a data set, and its overlap with evaluation prompts"
    )
    check.add_argument(
        "source", metavar="FILE", help="a source: file, folder, pattern, s3://, gs://, hf://org/name or bundled:NAME"
    )
    check.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides of the recipe, such as data.columns.prompt=question",
    )
    check.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="recipe with the tokenizer, template, lengths and evaluation prompts (default: the quickstart's)",
    )
    check.add_argument(
        "--rows",
        type=int,
        default=20,
        metavar="N",
        help="maximum number of bad rows to print (default: 20; --json prints all)",
    )
    add_reports(check, shows_text=True)
    check.add_argument("--html", type=Path, metavar="PAGE", help="write a page with examples and their tokens")

    build = add_command(
        data, "build", _build, "build a compliance-refusal or preference set from harmful and harmless prompts"
    )
    for side in ("harmful", "harmless"):
        build.add_argument(
            f"--{side}",
            required=True,
            metavar="SOURCE",
            help=f"source of {side} prompts, or a section such as '{{path: ..., columns: {{...}}}}'",
        )
    build.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    build.add_argument(
        "--kind", required=True, choices=["compliance-refusal", "preference"], help="kind of the unaligned responses"
    )
    build.add_argument(
        "--refusals",
        default="bank",
        metavar="ANSWERS",
        help="source of refusals: bank, constant, own, model:ID, or a source with a column refusal (default: bank)",
    )
    build.add_argument(
        "--worse", metavar="ANSWERS", help="source of preference data's worse answers: own (default) or model:ID"
    )
    build.add_argument("--prompts", type=int, metavar="N", help="number of prompts of each class (default: all)")
    build.add_argument(
        "--recovery",
        type=int,
        metavar="WORDS",
        help="add a row for each prompt whose answer has begun wrongly, by at most so many words, and goes on rightly",
    )
    build.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random choices (default: 0)")
    build.add_argument("--template", help="chat template (Jinja text or file) of the models that answer")
    build.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="maximum tokens of a model's answer (default: 256)"
    )
    build.add_argument("--use-gpu", action="store_true", help="run the models on GPUs")
    add_reports(build)


def _check(options: argparse.Namespace) -> int:
    from raydiv.commands.data_check import check_data, write_page
    from raydiv.config import load_recipe, parse_source
    from raydiv.data.bundled import QUICKSTART

    overrides = options.overrides
    if options.recipe is None and any(override.startswith("model.id=") for override in overrides):
        overrides = ["data.template=null", *overrides]  # the quickstart's template belongs to its own model
    recipe, source = load_recipe(options.recipe or QUICKSTART, overrides), parse_source(options.source)
    (report,) = check_data(recipe, [source], show_text=options.show_text or options.html is not None)
    if options.html is not None:
        write_page(options.html, report.facts)
    if not options.show_text:
        report.facts.pop("shown", None)
    print_report(options, report.facts, lambda: _show_data(report.facts, options.rows))
    return 0 if report.valid else 2


def _build(options: argparse.Namespace) -> int:
    from raydiv.commands.data_build import build_data
    from raydiv.commands.data_build.card import COUNT_LABELS
    from raydiv.config import parse_source
    from raydiv.config.cluster import ClusterConfig

    report = build_data(
        parse_source(options.harmful),
        parse_source(options.harmless),
        options.output,
        kind=options.kind,
        refusals=options.refusals,
        worse=options.worse,
        prompts=options.prompts,
        recovery=options.recovery,
        seed=options.seed,
        cluster=ClusterConfig(use_gpu=options.use_gpu),
        template=options.template,
        max_new_tokens=options.max_new_tokens,
    )

    def show() -> None:
        classes = report.as_json()["classes"]
        rows = [(label, *(str(counts[key]) for counts in classes.values())) for key, label in COUNT_LABELS.items()]
        print_table(["", *classes], rows)
        print(f"data     {report.data}\ncard     {report.card}")

    print_report(options, report.as_json(), show)
    return 0


def _show_data(facts: dict[str, Any], max_rows: int) -> None:
    _show_columns(facts)
    labels = ["harmful", "harmless", "unlabelled"]
    classes = [(name, *(str(counts[label]) for label in labels)) for name, counts in facts["classes"].items()]
    print_table(["examples", *labels], classes)
    pairs, prompts, duplicates = facts["pairs"], facts["prompts"], facts["duplicates"]
    counts = [
        ("distinct prompts", prompts["different"]),
        ("prompts labelled both harmful and harmless", prompts["with_both_labels"]),
        ("complete pairs", pairs["complete"]),
        ("examples without a partner", pairs["without_partner"]),
        ("invalid pairs", len(pairs["broken"])),
        ("duplicate examples", duplicates["examples"]),
        ("responses both aligned and unaligned", duplicates["aligned_and_unaligned"]),
        ("bad rows", facts["bad_rows"]["count"]),
    ]
    print_table(["", "count"], [(name, str(count)) for name, count in counts])
    _show_lengths(facts["tokens"])
    for name, overlap in facts["overlap"].items():
        print(f"overlap with {name}: {overlap['same']} of {overlap['prompts']} prompts, {overlap['near']} more nearly")
    for note in facts["notes"].values():
        places = [f"{row['file']}:{row['line']}" for row in note["rows"]]
        print(f"note: {note['meaning']}: {_first_of(places, max_rows)}")
    if facts["rendered"]:
        print(facts["rendered"])
    for message in pairs["broken"][:max_rows]:
        print(message)
    for row in facts["bad_rows"]["rows"][:max_rows]:
        print(f"{row['file']}:{row['line']}: {row['reason']}")
    bad = facts["bad_rows"]["count"]
    if bad > max_rows:
        print(f"and {bad - max_rows} more bad rows (print them with --rows {bad} or --json)")
    if "shown" in facts:
        _show_examples(facts)


def _show_examples(facts: dict[str, Any]) -> None:
    """Examples with their tokens, a line for each part, with a dot between tokens."""
    from rich.console import Console

    styles = {"template": "dim", "text": "none", "trained": "bold", "end of turn": "bold reverse"}
    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    for example in facts["shown"]:
        lengths = {part: sum(len(run["tokens"]) for run in example["parts"] if run["part"] == part) for part in styles}
        trained = lengths["trained"] + lengths["end of turn"]
        console.print(f"\n{example['class']}, {example['place']}: {sum(lengths.values())} tokens, {trained} trained")
        for run in example["parts"]:
            tokens = "\N{MIDDLE DOT}".join(
                token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}") for token in run["tokens"]
            )
            console.print(f"  {run['part']:<11} {tokens}", style=styles[run["part"]])
        for side in ("prompt", "response"):
            if example[f"{side}_cut"]:
                console.print(f"  the {side} is cut by {example[f'{side}_cut']} tokens")


def _show_columns(facts: dict[str, Any]) -> None:
    """The chat template, and how the columns of a source were read."""
    from raydiv.model.chat import chat_table

    for name, fact in chat_table(facts["chat"]).items():
        print(f"{name}: {fact}")
    for name, places in facts["formats"].items():
        print(f"format: {name}" + (f" in {_first_of(places, 5)}" if len(facts["formats"]) > 1 else ""))
    for column, spelling in facts["labels"].items():
        print(f"label: {column} is {spelling}")
    if facts["ignored"]:
        print(f"ignored: {', '.join(facts['ignored'])}")


def _first_of(places: list[str], count: int) -> str:
    others = len(places) - count
    return ", ".join(places[:count]) + (f" and {others} more" if others > 0 else "")


def _show_lengths(tokens: dict[str, Any]) -> None:
    lengths = {name: spread for name, spread in tokens.items() if "histogram" in spread}
    quantiles = ["min", "p50", "p90", "p99", "max"]
    rows = [(name, *(str(spread[key]) for key in quantiles)) for name, spread in lengths.items()]
    print_table(["tokens", *quantiles], rows)
    for name, spread in lengths.items():
        print(name)
        largest = max(interval["examples"] for interval in spread["histogram"])
        for interval in spread["histogram"]:
            bar = "#" * round(40 * interval["examples"] / largest)
            print(f"  {interval['from']:>6}-{interval['to']:<6} {bar:<40} {interval['examples']}")
    truncated = tokens["truncated"]
    print(
        f"truncated: {truncated['prompts']} prompts at {truncated['max_prompt_length']} tokens, "
        f"{truncated['responses']} responses at {truncated['max_length']} tokens, prompt included"
    )
