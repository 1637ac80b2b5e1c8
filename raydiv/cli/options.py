"""Command-line options generated from the fields of a recipe section, and the section built from them."""

from __future__ import annotations

import argparse
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError

from raydiv.config.section import Section
from raydiv.utils.errors import UserError

S = TypeVar("S", bound=Section)

NOT_OPTIONS = {"every", "depth_every", "prompts"}
"""Fields that only apply in training, and those whose option is written by hand."""


def add_section_options(command: argparse.ArgumentParser, section: type[Section], **metavars: str) -> None:
    """Add an option for each field, with its description, default and choices; ``section_of`` checks the values.

    A list becomes a repeated option in the singular: ``tasks`` is ``--task``.
    """
    for name, field in section.model_fields.items():
        if name in NOT_OPTIONS:
            continue
        default = field.get_default(call_default_factory=True)
        repeated, choice = (get_origin(field.annotation) is kind for kind in (list, Literal))
        shown = ", ".join(map(str, default)) if isinstance(default, list) else "" if default is None else str(default)
        note = ("; may be repeated" if repeated else "") + (f" (default: {shown})" if shown else "")
        command.add_argument(
            _option(section, name),
            dest=name,
            action="append" if repeated else "store",
            default=argparse.SUPPRESS,
            choices=get_args(field.annotation) if choice else None,
            metavar=None if choice else metavars.get(name, "VALUE"),
            help=f"{field.description}{note}".replace("%", "%%"),
        )


def section_of(section: type[S], options: argparse.Namespace, **parsed: Any) -> S:
    """The section with the options' values; ``parsed`` replaces them. Raises UserError for the first invalid one."""
    fields = section.model_fields.keys() - NOT_OPTIONS
    values = {name: value for name, value in vars(options).items() if name in fields}
    try:
        return section.model_validate(values | parsed)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"{_option(section, str(first['loc'][0]))}: " if first["loc"] else ""
        raise UserError(f"{option}{first['msg'].removeprefix('Value error, ')}") from None


def _option(section: type[Section], name: str) -> str:
    singular = name.removesuffix("s") if get_origin(section.model_fields[name].annotation) is list else name
    return f"--{singular.replace('_', '-')}"
