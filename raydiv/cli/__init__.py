"""The command line: arguments in, one function of the package called, a table or one JSON object out.

``main`` assembles the parser and maps errors to exit codes. Every other module adds a group of commands and prints
their results; ``output`` and ``options`` hold what the groups share. What a command does is in ``raydiv.commands``.
"""

from raydiv.cli.main import main as main

__all__ = ["main"]
