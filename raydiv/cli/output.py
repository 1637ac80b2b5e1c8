"""What all commands share: adding a command to the parser, and printing its result as a table or one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

MAX_TABLE_WIDTH = 4000
"""Characters of a table's line."""

Handler = Callable[[argparse.Namespace], int]


def add_command(commands: Any, name: str, handler: Handler, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(handler=handler)
    return command


def add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a recipe (YAML file)")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as optim.lr=1e-4"
    )


def add_reports(command: argparse.ArgumentParser, shows_text: bool = False) -> None:
    command.add_argument(
        "--json", action="store_true", help="print one JSON object, and nothing else, on standard output"
    )
    if shows_text:
        command.add_argument("--show-text", action="store_true", help="write prompts and answers, not only their ids")


_results: list[TextIO] = []
"""The stream that results are printed to while a command runs."""


@contextmanager
def results_alone() -> Iterator[None]:
    """Reserve standard output for results: what libraries print goes to standard error."""
    _results.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.pop()


def results_stream() -> TextIO:
    """The stream that results are printed to."""
    return _results[-1]


def write_result(text: str) -> None:
    """Print a piece of a result at once."""
    _results[-1].write(text)
    _results[-1].flush()


def print_report(options: argparse.Namespace, content: Any, show: Callable[[], None]) -> None:
    """Print ``content`` as one JSON object under ``--json``, else call ``show``, which prints it."""
    with redirect_stdout(_results[-1]):
        if options.json:
            print(json.dumps(content, indent=2))
        else:
            show()
        sys.stdout.flush()  # raises BrokenPipeError here, where main handles it


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as wide as its cells: the terminal wraps long lines, no cell is cut, and markup is text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console(width=MAX_TABLE_WIDTH, markup=False, emoji=False).print(table)
