"""``raydiv data check`` and ``raydiv data build``: inspect data sets, and build them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from raydiv.cli.output import add_command, add_reports, print_report, print_table


def add_data_commands(commands: Any) -> None:
    about = "check data sets, and build them"
    data = commands.add_parser("data", help=about, description=about).add_subparsers(required=True, metavar="COMMAND")
    check = add_command(data, "check", _check, "contents of a data set, and its errors")
    check.add_argument(
        "source", metavar="FILE", help="a source: a file, folder, s3://, hf://org/name, bundled:NAME ..."
    )
    check.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as data.columns.prompt=question"
    )
    check.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="gives the tokenizer, template, lengths and evaluation prompts (default: the quickstart's)",
    )
    check.add_argument(
        "--rows", type=int, default=20, metavar="N", help="maximum bad rows to print (default: 20; --json has all)"
    )
    add_reports(check)

    build = add_command(
        data, "build", _build, "a compliance-refusal or preference set from harmful and harmless prompts"
    )
    for side in ("harmful", "harmless"):
        build.add_argument(
            f"--{side}",
            required=True,
            metavar="SOURCE",
            help=f"{side} prompts: a source, or a section as '{{path: ..., columns: {{...}}}}'",
        )
    build.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    build.add_argument(
        "--kind", required=True, choices=["compliance-refusal", "preference"], help="what the unaligned responses are"
    )
    build.add_argument(
        "--refusals",
        default="bank",
        metavar="ANSWERS",
        help="bank, constant, own, model:ID, or a source with a column refusal (default: bank)",
    )
    build.add_argument(
        "--worse", metavar="ANSWERS", help="worse answers of preference data: own (the default) or model:ID"
    )
    build.add_argument("--prompts", type=int, metavar="N", help="prompts of each class (default: all)")
    build.add_argument("--seed", type=int, default=0, metavar="N", help="of every random choice (default: 0)")
    build.add_argument("--template", help="a chat template (Jinja text or file) for the models that answer")
    build.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer of a model (default: 256)")
    build.add_argument("--use-gpu", action="store_true", help="load the models on GPUs")
    add_reports(build)


def _check(options: argparse.Namespace) -> int:
    from raydiv.commands.data_check import check_data
    from raydiv.config import load_recipe, source_of
    from raydiv.data.bundled import QUICKSTART

    (report,) = check_data(load_recipe(options.recipe or QUICKSTART, options.overrides), [source_of(options.source)])
    print_report(options, report.facts, lambda: _show_data(report.facts, options.rows))
    return 0 if report.sound else 2


def _build(options: argparse.Namespace) -> int:
    from raydiv.commands.data_build import build_data
    from raydiv.config import source_of
    from raydiv.config.cluster import ClusterConfig

    built = build_data(
        source_of(options.harmful),
        source_of(options.harmless),
        options.output,
        kind=options.kind,
        refusals=options.refusals,
        worse=options.worse,
        prompts=options.prompts,
        seed=options.seed,
        cluster=ClusterConfig(use_gpu=options.use_gpu),
        template=options.template,
        max_new_tokens=options.max_new_tokens,
    )

    def show() -> None:
        counts = built.as_json()["classes"]
        print_table(["", *counts], [(key, *(str(by[key]) for by in counts.values())) for key in counts["harmful"]])
        print(f"data     {built.data}\ncard     {built.card}")

    print_report(options, built.as_json(), show)
    return 0


def _show_data(facts: dict[str, Any], rows: int) -> None:
    labels = ["harmful", "harmless", "unlabelled"]
    print_table(
        ["examples", *labels], [(name, *(str(by[label]) for label in labels)) for name, by in facts["classes"].items()]
    )
    pairs, prompts, duplicates = facts["pairs"], facts["prompts"], facts["duplicates"]
    counts = [
        ("different prompts", prompts["different"]),
        ("prompts labelled both harmful and harmless", prompts["with_both_labels"]),
        ("complete pairs", pairs["complete"]),
        ("examples without a partner", pairs["without_partner"]),
        ("invalid pairs", len(pairs["broken"])),
        ("duplicate examples", duplicates["examples"]),
        ("answers both aligned and unaligned", duplicates["aligned_and_unaligned"]),
        ("bad rows", facts["bad_rows"]["count"]),
    ]
    print_table(["", "count"], [(name, str(count)) for name, count in counts])
    lengths = {name: spread for name, spread in facts["tokens"].items() if "histogram" in spread}
    quantiles = ["min", "p50", "p90", "p99", "max"]
    print_table(
        ["tokens", *quantiles], [(name, *(str(spread[key]) for key in quantiles)) for name, spread in lengths.items()]
    )
    for name, spread in lengths.items():
        print(name)
        most = max(interval["examples"] for interval in spread["histogram"])
        for interval in spread["histogram"]:
            bar = "#" * round(40 * interval["examples"] / most)
            print(f"  {interval['from']:>6}-{interval['to']:<6} {bar:<40} {interval['examples']}")
    cut = facts["tokens"]["truncated"]
    print(
        f"truncated: {cut['prompts']} prompts at {cut['max_prompt_length']} tokens, {cut['responses']} responses at "
        f"{cut['max_length']} with their prompt"
    )
    for name, overlap in facts["overlap"].items():
        print(
            f"{name}: of its {overlap['prompts']} prompts, {overlap['same']} are in this data set, {overlap['near']} nearly"
        )
    for place in pairs["broken"][:rows]:
        print(place)
    for row in facts["bad_rows"]["rows"][:rows]:
        print(f"{row['file']}:{row['line']}: {row['reason']}")
    left = facts["bad_rows"]["count"] - rows
    if left > 0:
        print(f"and {left} more bad rows (--rows {facts['bad_rows']['count']}, or --json)")
