"""``raydiv separation`` and ``raydiv evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raydiv.cli.output import add_command, add_reports, print_report, print_table
from raydiv.utils.errors import UserError

if TYPE_CHECKING:
    from raydiv.config.section import Section

S = TypeVar("S", bound="Section")
"""A section of the recipe."""


def add_measuring_commands(commands: Any) -> None:
    separation = add_command(
        commands, "separation", _separation, "separation of safe and harmful prompts, for any models"
    )
    _add_models(separation, prompts="bundled:anchors")
    separation.add_argument("--layers", default="-1", help="all, or numbers such as 0,8,-1 (default: -1, the last)")
    separation.add_argument("--pooling", choices=["last", "mean"], default="last", help="of a prompt's tokens")
    separation.add_argument(
        "--intervals", choices=["last", "all"], default="last", help="layers that get a 95%% interval"
    )
    separation.add_argument(
        "--sample", type=int, default=1000, help="most prompts for what needs all states at once (default: 1000)"
    )
    separation.add_argument("--embeddings", type=Path, metavar="FOLDER", help="keep the states here, as Parquet")
    separation.add_argument("--different-models", action="store_true", help="the models need not be of one hidden size")
    add_reports(separation)

    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "attack success, over-refusal, safety by category, coherence and drift of answers",
    )
    _add_models(evaluate, prompts="bundled:heldout")
    evaluate.add_argument("--reference", help="the model that scores the answers (default: the first MODEL)")
    evaluate.add_argument("--max-new-tokens", type=int, default=48)
    evaluate.add_argument(
        "--judge",
        default="string",
        help="string, harmbench, harmbench-mistral, llama-guard-3, or FORMAT:ID (default: string)",
    )
    evaluate.add_argument("--toxicity", metavar="ID", help="a text-classification model whose P(toxic) is averaged")
    evaluate.add_argument(
        "--attack",
        action="append",
        default=[],
        metavar="NAME",
        help="prefill[=OPENING], templates=FILE, suffixes=FILE or gcg[=STEPS], beside asking directly; may be repeated",
    )
    evaluate.add_argument(
        "--kl-prompts",
        type=int,
        default=50,
        metavar="N",
        help="prompts with a sampled answer, for the KL (default: 50)",
    )
    evaluate.add_argument(
        "--pairwise-judge", metavar="ID", help="a chat model that says whose answers to harmless prompts are better"
    )
    evaluate.add_argument(
        "--baseline", type=Path, metavar="FILE", help="whose, in AlpacaEval's format (default: the first MODEL's)"
    )
    evaluate.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME",
        help="of lm-evaluation-harness, or quick, general, math, papers",
    )
    evaluate.add_argument("--task-limit", type=int, metavar="N", help="documents of each task (default: all)")
    evaluate.add_argument("--task-folder", metavar="FOLDER", help="tasks of your own (YAML)")
    evaluate.add_argument("--output", type=Path, help="a folder for the rates and a verdict per prompt")
    add_reports(evaluate, shows_text=True)


def _add_models(command: argparse.ArgumentParser, prompts: str) -> None:
    command.add_argument(
        "models", nargs="+", metavar="MODEL", help="a run, a model directory, a hub id or bundled:NAME"
    )
    place = "a file, hf://org/name, bundled:NAME, or a section as '{path: ..., columns: {...}}'; may be repeated"
    command.add_argument(
        "--prompts",
        action="append",
        default=[],
        metavar="SOURCE",
        help=f"prompts and their labels, {place} (default: {prompts})",
    )
    for label in ("harmful", "harmless"):
        command.add_argument(
            f"--{label}", action="append", default=[], metavar="SOURCE", help=f"{label} prompts without labels"
        )
    command.add_argument("--template", help="a chat template (Jinja text or file), in place of the tokenizer's")
    command.add_argument(
        "--precision", choices=["fp32", "bf16"], help="of the models (default: a run's own, else fp32)"
    )
    command.add_argument("--use-gpu", action="store_true")


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments that both commands' functions take."""
    from raydiv.config.cluster import Cluster

    same = ("models", "prompts", "harmful", "harmless", "template", "precision")
    return {name: getattr(options, name) for name in same} | {"cluster": Cluster(use_gpu=options.use_gpu)}


def _separation(options: argparse.Namespace) -> int:
    from raydiv.commands.separation import separation
    from raydiv.config.recipe import Separation

    how = _section(
        Separation,
        layers=_layers(options.layers),
        pooling=options.pooling,
        sample=options.sample,
        intervals=options.intervals,
    )
    reports = separation(
        **_measured(options), how=how, embeddings=options.embeddings, different_models=options.different_models
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


def _layers(words: str) -> list[int] | str:
    if words == "all":
        return words
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise UserError(f"--layers: must be all, or numbers such as 0,8,-1; found {words}") from None


def _section(section: type[S], **values: Any) -> S:
    """A section of the recipe from options of the same names. Raises UserError for the first that is wrong."""
    from pydantic import ValidationError

    try:
        return section.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        option = f"--{str(problem['loc'][0]).replace('_', '-')}: " if problem["loc"] else ""
        raise UserError(f"{option}{problem['msg'].removeprefix('Value error, ')}") from None


def _evaluate(options: argparse.Namespace) -> int:
    from raydiv.commands.evaluate import evaluate
    from raydiv.config.evaluate import Evaluate

    if options.show_text and not options.output:
        raise UserError("--show-text: say where to write the answers, with --output FOLDER")
    if options.baseline and not options.pairwise_judge:
        raise UserError("--baseline: means nothing without --pairwise-judge")
    if options.pairwise_judge and not options.baseline and len(options.models) < 2:
        raise UserError("--pairwise-judge: name two models, or a --baseline")
    same = ("max_new_tokens", "judge", "toxicity", "kl_prompts", "pairwise_judge", "task_limit", "task_folder")
    how = _section(
        Evaluate,
        attacks=[_attack(words) for words in options.attack],
        tasks=options.task,
        **{name: getattr(options, name) for name in same},
    )
    reports = evaluate(**_measured(options), reference=options.reference, baseline=options.baseline, how=how)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        for number, report in enumerate(reports):
            report.write(options.output, f"model-{number}", options.show_text)

    def show() -> None:
        from raydiv.runs.report.table import label_of

        cells = [report.cells() for report in reports]
        names = dict.fromkeys(name for own in cells for name in own)
        print_table(["", *options.models], [(label_of(name), *(own.get(name, "-") for own in cells)) for name in names])
        print(reports[0].judge.errors)
        for report in reports:
            for note in report.notes:
                print(f"{report.model}: {note}")

    print_report(options, {"models": [report.as_json() for report in reports]}, show)
    return 0


def _attack(words: str) -> Any:
    """An attack as a recipe has it."""
    kind, given, value = words.partition("=")
    return {kind: {"steps": value} if kind == "gcg" else value} if given else kind
