"""``raydiv bench``: its parts, and the options that each of them takes."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from raydiv.cli.output import add_command, add_recipe, add_reports, print_report, print_table
from raydiv.utils.errors import UserError

PARTS = {
    "train": {"repeats", "steps", "against", "warmup"},
    "data": {"repeats", "steps", "rows"},
    "embed": {"repeats", "rows"},
    "start": {"repeats"},
    "trials": {"repeats", "steps"},
    "small": {"repeats", "rows"},
    "answers": {"repeats", "rows"},
    "gpu": {"repeats", "steps"},
    "scale": {"repeats"},
}
"""The options that apply to each part."""


def add_bench_command(commands: Any) -> None:
    bench = add_command(
        commands, "bench", _bench, "the speed of a recipe on this machine, beside plain PyTorch, TRL or plain Ray"
    )
    add_recipe(bench)
    bench.add_argument("--part", choices=[*PARTS], default="train", help="what is timed (default: train)")
    bench.add_argument(
        "--against",
        action="append",
        choices=["loop", "trl"],
        help="train: compare with a plain PyTorch loop, which shows the limit of the hardware, or with TRL; may be "
        "repeated (default: loop)",
    )
    bench.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="train, gpu, data: timed updates; trials: updates of each trial (default: 6, 6, 20, 4)",
    )
    bench.add_argument("--warmup", type=int, metavar="N", help="train: updates before the timed ones (default: 2)")
    bench.add_argument(
        "--repeats", type=int, metavar="N", help="timings of each candidate, in turn (default: 3, gpu 1)"
    )
    bench.add_argument(
        "--rows",
        type=int,
        action="append",
        metavar="N",
        help="data: examples, may be repeated (default: 200000); embed: prompts (default: 800); small: rows that are "
        "checked (default: 1000); answers: prompts (default: 96)",
    )
    add_reports(bench)


def _bench(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe

    recipe, part = load_recipe(options.recipe, options.overrides), options.part
    names = sorted(set.union(*PARTS.values()))
    settings = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    for name in settings:
        if name not in PARTS[part]:
            raise UserError(f"--{name}: does not apply to --part {part}")
    if part != "data" and "rows" in settings:
        if len(settings["rows"]) > 1:
            raise UserError(f"--rows: takes one number with --part {part}")
        (settings["rows"],) = settings["rows"]
    name = "training" if part == "train" else part
    module = importlib.import_module(f"raydiv.commands.bench.{name}")
    result = getattr(module, f"bench_{name}")(recipe, **settings)

    def show() -> None:
        print_table(*getattr(module, f"{name}_table")(result))
        if part == "train":
            for note in module.training_notes(result):
                print(note)
        if part == "data":
            for stage in ("stream", "train"):
                print_table([stage, ""], [(key, f"{value:,.4g}") for key, value in result[stage].items()])

    print_report(options, result, show)
    return 0
