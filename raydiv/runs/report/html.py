"""Pieces of the pages that raydiv writes. A page is one file that asks for no other, for a screen, a phone or paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from raydiv.runs.report.drawing import Picture, svg

STYLE = Path(__file__).with_name("style.css")


def document(title: str, facts: Mapping[str, str], sections: Sequence[str]) -> str:
    """A whole page: what it is of, in a line of ``facts``, and its sections."""
    pairs = "".join(f"<div><dt>{name}</dt><dd>{escape(fact)}</dd></div>\n" for name, fact in facts.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>raydiv: {escape(title)}</title>
<style>
{STYLE.read_text()}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<dl class="facts">
{pairs}</dl>
</header>
<main>
{"".join(sections)}</main>
</body>
</html>
"""


def section(heading: str, *parts: str) -> str:
    return "\n".join(["<section>", f"<h2>{heading}</h2>", *filter(None, parts), "</section>", ""])


def paragraph(text: str) -> str:
    return f"<p>{text}</p>"


def scroll(table: str, name: str) -> str:
    """A box in which a wide table moves by itself."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">\n{table}\n</div>'


def note_list(words: Sequence[str]) -> str:
    items = "\n".join(f"<li>{escape(note)}</li>" for note in words)
    return f'<ul class="notes">\n{items}\n</ul>' if words else ""


def figures(drawn: Sequence[Picture]) -> str:
    return '<div class="pictures">\n' + "\n".join(map(figure, drawn)) + "\n</div>" if drawn else ""


def figure(picture: Picture) -> str:
    image = svg(picture.figure, picture.name, picture.title)
    return f"<figure>\n{image}\n<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"


def table(caption: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], kind: str = "") -> str:
    """A table with a heading for each row, and for each column where ``columns`` names them; ``kind`` is its CSS class."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>'
        for name, *values in rows
    )
    top = f"<thead><tr><td></td>{head}</tr></thead>\n" if columns else ""
    named = f' class="{kind}"' if kind else ""
    return scroll(f"<table{named}>\n<caption>{caption}</caption>\n{top}<tbody>\n{body}\n</tbody></table>", caption)
