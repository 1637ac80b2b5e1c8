"""``raydiv separation`` and ``raydiv evaluate``: measurements of any models, without training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from raydiv.cli.options import add_section_options, section_of
from raydiv.cli.output import add_command, add_reports, print_report, print_table
from raydiv.config.evaluate import EvaluateConfig
from raydiv.config.recipe import SeparationConfig
from raydiv.utils.errors import UserError


def add_evaluation_commands(commands: Any) -> None:
    separation = add_command(
        commands, "separation", _separation, "how far apart a model's hidden states of safe and harmful prompts lie"
    )
    _add_models(separation, prompts="bundled:anchors")
    add_section_options(separation, SeparationConfig)
    separation.add_argument(
        "--embeddings", type=Path, metavar="FOLDER", help="write the hidden states here, as Parquet"
    )
    separation.add_argument("--different-models", action="store_true", help="allow models of different hidden sizes")
    add_reports(separation)

    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "attack success, over-refusal, safety by category, coherence and drift of a model's answers",
    )
    _add_models(evaluate, prompts="bundled:heldout")
    evaluate.add_argument(
        "--reference", metavar="MODEL", help="the model that scores the answers (default: the first MODEL, or its base)"
    )
    add_section_options(evaluate, EvaluateConfig, attacks="NAME[=VALUE]")
    evaluate.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="answers that --pairwise-judge compares with, in AlpacaEval's format (default: those of the first MODEL)",
    )
    evaluate.add_argument("--output", type=Path, metavar="FOLDER", help="write the rates and a verdict per prompt here")
    add_reports(evaluate, shows_text=True)


def _add_models(command: argparse.ArgumentParser, prompts: str) -> None:
    command.add_argument(
        "models", nargs="+", metavar="MODEL", help="a run, a model directory, a hub id or bundled:NAME"
    )
    source = "a file, hf://org/name, bundled:NAME, or a section as '{path: ..., columns: {...}}'; may be repeated"
    command.add_argument(
        "--prompts",
        action="append",
        default=[],
        metavar="SOURCE",
        help=f"prompts with their labels: {source} (default: {prompts})",
    )
    for label in ("harmful", "harmless"):
        command.add_argument(
            f"--{label}", action="append", default=[], metavar="SOURCE", help=f"{label} prompts without labels"
        )
    command.add_argument(
        "--template", metavar="TEMPLATE", help="a chat template (Jinja text or file) instead of the tokenizer's"
    )
    command.add_argument(
        "--precision", choices=["fp32", "bf16"], help="precision of the models (default: that of a run, else fp32)"
    )
    command.add_argument("--use-gpu", action="store_true", help="load the models on GPUs")


def _shared_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of both commands' functions."""
    from raydiv.config.cluster import ClusterConfig

    names = ("models", "prompts", "harmful", "harmless", "template", "precision")
    return {name: getattr(options, name) for name in names} | {"cluster": ClusterConfig(use_gpu=options.use_gpu)}


def _separation(options: argparse.Namespace) -> int:
    from raydiv.commands.separation import separation

    reports = separation(
        **_shared_arguments(options),
        config=section_of(SeparationConfig, options, **_layers(options)),
        embeddings=options.embeddings,
        different_models=options.different_models,
    )

    def show() -> None:
        for report in reports:
            print(f"{report.model}, {report.count} prompts of {report.prompts}")
            header, rows = report.layer_table()
            if rows:
                print_table(header, rows)
            print_table(*report.table())
            for note in report.notes():
                print(note)

    print_report(options, {"models": [report.as_json() for report in reports]}, show)
    return 0


def _layers(options: argparse.Namespace) -> dict[str, list[int]]:
    text = getattr(options, "layers", "all")
    if text == "all":
        return {}
    try:
        return {"layers": [int(word) for word in text.split(",")]}
    except ValueError:
        raise UserError(f"--layers: must be all, or numbers such as 0,8,-1; found {text}") from None


def _evaluate(options: argparse.Namespace) -> int:
    from raydiv.commands.evaluate import evaluate

    config = section_of(EvaluateConfig, options, attacks=[_attack(text) for text in getattr(options, "attacks", [])])
    if options.show_text and not options.output:
        raise UserError("--show-text: needs --output FOLDER, where the answers are written")
    if options.baseline and not config.pairwise_judge:
        raise UserError("--baseline: does not apply without --pairwise-judge")
    if config.pairwise_judge and not options.baseline and len(options.models) < 2:
        raise UserError("--pairwise-judge: name two models, or a --baseline")
    reports = evaluate(
        **_shared_arguments(options), reference=options.reference, baseline=options.baseline, config=config
    )
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        for number, report in enumerate(reports):
            report.write(options.output, f"model-{number}", options.show_text)

    def show() -> None:
        from raydiv.runs.metric_registry import spec_of

        cells = [report.cells() for report in reports]
        names = dict.fromkeys(name for row in cells for name in row)
        print_table(
            ["", *options.models], [(spec_of(name).row_label, *(row.get(name, "-") for row in cells)) for name in names]
        )
        for judge in reports[0].judges:
            print(judge.errors)
        for report in reports:
            for note in report.notes:
                print(f"{report.model}: {note}")

    print_report(options, {"models": [report.as_json() for report in reports]}, show)
    return 0


def _attack(text: str) -> Any:
    """``NAME[=VALUE]`` as a recipe writes the attack; VALUE may be a mapping: ``{depth: [1, 5], texts: FILE}``."""
    kind, equals, value = text.partition("=")
    if value.startswith("{"):
        from raydiv.config.bounded_yaml import parse_yaml

        try:
            return {kind: parse_yaml(value)}
        except ValueError as error:
            raise UserError(f"--attack: {kind}: {error}") from None
    return {kind: {"steps": value} if kind == "gcg" else value} if equals else kind
