"""What commands share: how they are added, and how a table or one JSON object is printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

WIDEST = 4000
"""Characters of a table's line, at most."""

Handler = Callable[[argparse.Namespace], int]


def add_command(commands: Any, name: str, handler: Handler, about: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    command.set_defaults(handler=handler)
    return command


def add_reports(command: argparse.ArgumentParser, shows_text: bool = False) -> None:
    command.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output and nothing else there"
    )
    if shows_text:
        command.add_argument(
            "--show-text", action="store_true", help="write prompts and answers out, not their ids alone"
        )


def print_report(options: argparse.Namespace, content: Any, show: Callable[[], None]) -> None:
    if options.json:
        print(json.dumps(content, indent=2))
    else:
        show()


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
