"""``raydiv sweep`` and ``raydiv study``: many runs, and what they say together."""

from __future__ import annotations

import argparse
from typing import Any

from raydiv.cli.output import add_command, add_recipe, add_reports, print_report, print_table


def add_comparing_commands(commands: Any) -> None:
    sweep = add_command(commands, "sweep", _sweep, "Ray Tune over the recipe's section sweep")
    add_recipe(sweep)
    sweep.add_argument("--resume", action="store_true", help="go on with the sweep if it is there")
    add_reports(sweep)

    study = add_command(commands, "study", _study, "grid of models x data x losses -> the papers' tables and plots")
    add_recipe(study)
    study.add_argument(
        "--resume", action="store_true", help="go on with the study if it is there, also with more cells"
    )
    add_reports(study)


def _sweep(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe
    from raydiv.experiments.sweep.page import sweep_notes, sweep_table
    from raydiv.experiments.sweep.sweep import sweep

    found = sweep(load_recipe(options.recipe, options.overrides), resume=options.resume)

    def show() -> None:
        print_table(*sweep_table(found.report))
        for note in sweep_notes(found.report):
            print(note)
        print(f"\nreport   {found.directory.report}")

    print_report(options, found.report, show)
    return 0


def _study(options: argparse.Namespace) -> int:
    from raydiv.config import load_recipe
    from raydiv.experiments.study.regression import claim_table
    from raydiv.experiments.study.study import study

    found = study(load_recipe(options.recipe, options.overrides), resume=options.resume)

    def show() -> None:
        for table in (*found.tables, claim_table(found.claims)):
            print(table.title)
            print_table(table.header, [(*row.words, *map(str, row.figures)) for row in table.rows])
            for note in table.notes:
                print(note)
        for name, error in found.failures.items():
            print(f"the cell {name} failed and is left out: {error}")
        print(f"\ntables   {found.directory.tables}\nreport   {found.directory.report}")

    print_report(options, found.as_json(), show)
    return 0
