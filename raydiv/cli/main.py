"""The entry point: parse the arguments, run one command, and turn its errors into exit codes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

from raydiv.cli.bench import add_bench_command
from raydiv.cli.data import add_data_commands
from raydiv.cli.evaluation import add_evaluation_commands
from raydiv.cli.experiments import add_experiment_commands
from raydiv.cli.info import add_info_commands
from raydiv.cli.label import add_label_command
from raydiv.cli.output import Handler, results_alone
from raydiv.cli.runs import add_run_commands
from raydiv.cli.submit import add_submit_command
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.signals import SIGTERM_EXIT_STATUS, Terminated, on_sigterm
from raydiv.utils.versions import versions

MESSAGE_LENGTH = 2000
"""Characters of the message of an error; its traceback has all of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 the user must change something, 1 the run failed,
    130 interrupted, 143 stopped by SIGTERM (a training run writes a checkpoint first).

    An error is one line; the traceback of one that is not the user's is in a file that the line names.
    """
    options = _parse(arguments)
    handler: Handler = options.handler
    try:
        with results_alone(), on_sigterm():
            return handler(options)
    except UserError as error:
        print(f"raydiv: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        print(f"raydiv: the run failed: {_describe(error)} (traceback: {_write_traceback(error)})", file=sys.stderr)
        return 1
    except Terminated as stopped:
        print(f"raydiv: {stopped}", file=sys.stderr)
        return SIGTERM_EXIT_STATUS
    except KeyboardInterrupt:
        print("raydiv: interrupted", file=sys.stderr)
        return 130


def _describe(error: Exception) -> str:
    """One line: the message of an error that raydiv raises, and the type and message of any other."""
    expected = isinstance(error, RuntimeError | FloatingPointError | OSError) and str(error)
    return one_line(error if expected else f"{type(error).__name__}: {error}", MESSAGE_LENGTH)


def _write_traceback(error: Exception) -> str:
    """The path of a new file, readable by its owner alone, with the traceback of an error and the versions."""
    lines = [*traceback.format_exception(error), "\n", json.dumps(versions()), "\n"]
    try:
        descriptor, path = tempfile.mkstemp(prefix="raydiv-", suffix=".log", text=True)
        with os.fdopen(descriptor, "w") as log:
            log.writelines(lines)
    except OSError as problem:  # the disk is full
        return f"not written: {problem.strerror}"
    return path


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each command sets ``handler``."""
    parser = argparse.ArgumentParser(
        prog="raydiv", description="Align language models for safety on Ray, and measure whether it worked."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_run_commands(commands)
    add_experiment_commands(commands)
    add_evaluation_commands(commands)
    add_label_command(commands)
    add_data_commands(commands)
    add_submit_command(commands)
    add_bench_command(commands)
    add_info_commands(commands, make_parser)
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command. ``key=value`` may stand anywhere among them, which argparse alone does not allow.

    For ``submit``, ``words`` holds the words after ``--``, and ``command`` their parsed options.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_submit = words[:1] == ["submit"]
    submitted: list[str] = []
    if is_submit and "--" in words:
        words, submitted = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = make_parser()
    options, rest = parser.parse_known_args(words)
    unknown = [word for word in rest if not hasattr(options, "overrides") or word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    if is_submit:
        options.words, options.command = submitted, _parse(submitted) if submitted else None
    return options
