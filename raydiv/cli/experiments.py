"""``raydiv sweep`` and ``raydiv study``: many runs, and their comparison."""

from __future__ import annotations

import argparse
from typing import Any

from raydiv.cli.output import add_command, add_recipe, add_reports, print_report, print_table


def add_experiment_commands(commands: Any) -> None:
    sweep = add_command(
        commands, "sweep", _sweep, "search hyperparameters with Ray Tune, over the recipe's section sweep"
    )
    add_recipe(sweep)
    sweep.add_argument("--resume", action="store_true", help="continue an existing sweep; finished trials are kept")
    add_reports(sweep)

    study = add_command(commands, "study", _study, "a grid of models x data x losses -> the papers' tables and plots")
    add_recipe(study)
    study.add_argument(
        "--resume",
        action="store_true",
        help="continue an existing study, also with more cells; finished cells are kept",
    )
    add_reports(study)


def _sweep(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe
    from raydiv.experiments.sweep.page import sweep_notes, sweep_table
    from raydiv.experiments.sweep.sweep import sweep

    result = sweep(load_recipe(options.recipe, options.overrides), resume=options.resume)

    def show() -> None:
        print_table(*sweep_table(result.record))
        for note in sweep_notes(result.record):
            print(note)
        print(f"\nreport   {result.directory.report}")

    print_report(options, result.report, show)
    return 0


def _study(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe
    from raydiv.experiments.study.regression_table import claim_table
    from raydiv.experiments.study.study import study

    result = study(load_recipe(options.recipe, options.overrides), resume=options.resume)

    def show() -> None:
        for table in (*result.tables, claim_table(result.claims)):
            print(table.title)
            print_table(table.header, [(*row.words, *map(str, row.figures)) for row in table.rows])
            for note in table.notes:
                print(note)
        for name, error in result.failures.items():
            print(f"cell {name} failed and is not in the tables: {error}")
        print(f"\ntables   {result.directory.tables}\nreport   {result.directory.report}")

    print_report(options, result.as_json(), show)
    return 0
