"""Readers of reports: the tags of a page, the axis of a figure, the lines of an axis."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from raydiv.runs.report.drawing import Picture


class Reader(HTMLParser):
    """Every tag with its attributes, and the tags that are still open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def drawn(picture: Picture | None) -> Any:
    """The picture's only axis."""
    assert picture
    (axis,) = picture.figure.axes
    return axis


def lines(axis: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axis.get_lines()}
