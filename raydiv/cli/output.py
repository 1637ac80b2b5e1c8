"""What commands share: how they are added, and how a table or one JSON object is printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

WIDEST = 4000
"""Characters of a table's line, at most."""

Handler = Callable[[argparse.Namespace], int]


def add_command(commands: Any, name: str, handler: Handler, about: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    command.set_defaults(handler=handler)
    return command


def add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, as section.key=value"
    )


def add_reports(command: argparse.ArgumentParser, shows_text: bool = False) -> None:
    command.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output and nothing else there"
    )
    if shows_text:
        command.add_argument(
            "--show-text", action="store_true", help="write prompts and answers out, not their ids alone"
        )


_results: list[TextIO] = []
"""Where results are printed, while a command runs."""


@contextmanager
def results_alone() -> Iterator[None]:
    """Standard output for results, and for nothing that a library prints: that goes to standard error."""
    _results.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.pop()


def write_result(text: str) -> None:
    """A piece of a result, as it comes."""
    _results[-1].write(text)
    _results[-1].flush()


def print_report(options: argparse.Namespace, content: Any, show: Callable[[], None]) -> None:
    """Print one JSON object, or what ``show`` prints."""
    with redirect_stdout(_results[-1]):
        if options.json:
            print(json.dumps(content, indent=2))
        else:
            show()
        sys.stdout.flush()  # where nobody reads it any more is known here


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As wide as its words are: a terminal breaks what is too long for it, and nothing is left out. Words are no markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console(width=WIDEST, markup=False, emoji=False).print(table)
