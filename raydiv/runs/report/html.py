"""Rendering of the pages that raydiv writes: jinja2 templates whose values are escaped.

A page is one file that loads no other, for a screen, a phone or paper. ``templates/document.html`` is the frame of
every page, ``templates/parts.html`` has the macros that pages share. Templates are named by their path in the package.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from raydiv.runs.report.drawing import Picture, svg

PACKAGE = Path(__file__).parents[2]


def render(template: str, **context: object) -> str:
    """The page of a template; ``context`` has its values, ``title`` and ``facts`` among them."""
    return _environment.get_template(template).render(**context)


def _svg(picture: Picture) -> str:
    return svg(picture.figure, picture.name, picture.title)


def _minus(number: str) -> str:
    """The number with a minus sign instead of its hyphen."""
    return number.replace("-", "\N{MINUS SIGN}")


_environment = Environment(
    loader=FileSystemLoader(PACKAGE),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_environment.filters |= {"svg": _svg, "minus": _minus}
