"""``raydiv losses``, ``schema``, ``env``, ``examples`` and ``completion``: what there is, without running anything."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raydiv.cli.output import add_command, add_reports, print_report
from raydiv.utils.units import size_text


def add_info_commands(commands: Any, make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """``make_parser`` makes the parser of all commands, which ``completion`` describes to a shell."""
    losses = add_command(commands, "losses", _losses, "the objectives: divergence, ceiling, required data, options")
    losses.add_argument("names", nargs="*", metavar="NAME", help="describe only these, in full")
    add_reports(losses)

    examples = add_command(commands, "examples", _examples, "the shipped recipes; with a NAME, copy one to edit it")
    examples.add_argument(
        "name", nargs="?", metavar="NAME", help="the recipe to copy, with the recipes that it extends"
    )
    examples.add_argument(
        "destination", nargs="?", metavar="DEST", type=Path, help="a folder or a new file (default: the current folder)"
    )
    add_reports(examples)

    env = add_command(commands, "env", _env, "versions, devices and paths of this machine, for a bug report")
    add_reports(env)

    add_command(commands, "schema", _schema, "the JSON Schema of a recipe, for editors")

    completion = add_command(
        commands, "completion", _completion, "the completion script of a shell, on standard output"
    )
    completion.add_argument(
        "shell", choices=["bash", "zsh", "fish"], help="the shell; the first lines of the script say where it goes"
    )
    completion.set_defaults(make_parser=make_parser)


def _losses(options: argparse.Namespace) -> int:
    from raydiv.commands.losses import PASSES, describe_losses

    described = describe_losses(options.names)

    def show() -> None:
        for name, facts in described.items():
            print(f"{name}: {facts['description' if options.names else 'summary']}")
            print(f"  data        {facts['data']}{'' if facts['reference'] else ', no reference'}")
            for number, estimate in enumerate(facts["estimates"]):
                ceiling = "none" if estimate["ceiling"] is None else f"{estimate['ceiling']:.4g}"
                chosen = ", ".join(f"{key}: {value}" for key, value in estimate["options"].items())
                print(
                    f"  {'' if number else 'estimates':<11} {estimate['divergence']}; ceiling {ceiling}; "
                    f"{PASSES[estimate['scope']]}{f' ({chosen})' if chosen else ''}"
                )
            print(f"  options     {', '.join(f'{key}: {text}' for key, text in facts['options'].items()) or 'none'}")
            print(f"  paper       {facts['paper']}\n")

    print_report(options, described, show)
    return 0


def _examples(options: argparse.Namespace) -> int:
    from raydiv.commands.examples import copy_example, examples

    if options.name is None:
        shipped = examples()
        lines = [f"{example.name:<24} {example.command:<6} {example.description}" for example in shipped]
        print_report(options, {"examples": [asdict(example) for example in shipped]}, lambda: print(*lines, sep="\n"))
        return 0
    copied = copy_example(options.name, options.destination)
    print_report(options, {"files": [str(path) for path in copied]}, lambda: print(*copied, sep="\n"))
    return 0


def _env(options: argparse.Namespace) -> int:
    from raydiv.commands.env import env

    report = env()

    def show() -> None:
        devices = report["devices"]
        memory = devices["memory_bytes"]
        gpus = [f"{gpu['name']}, {size_text(gpu['memory_bytes'])}" for gpu in devices["gpus"]]
        lines = {
            **{name: version or "-" for name, version in report["versions"].items()},
            "cpus": str(devices["cpus"]),
            "memory": size_text(memory) if memory else "-",
            "gpus": "; ".join(gpus) or "none",
            **{name: value or "not set" for name, value in report["paths"].items()},
        }
        for name, text in lines.items():
            print(f"{name:<20} {text}")

    print_report(options, report, show)
    return 0


def _schema(options: argparse.Namespace) -> int:
    from raydiv.commands.schema import schema

    print_report(argparse.Namespace(json=True), schema(), lambda: None)
    return 0


def _completion(options: argparse.Namespace) -> int:
    import shtab

    script = shtab.complete(options.make_parser(), options.shell)
    print_report(argparse.Namespace(json=False), None, lambda: print(script))
    return 0
