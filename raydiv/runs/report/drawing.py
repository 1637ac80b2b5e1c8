"""How pictures look, and the two forms each is kept in: a PNG on white, and SVG in the colours of the page around it."""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INK = "#010203"
"""Of text and axes. No other thing has this colour, so that in SVG it can stand for the colour of the page's text."""

PAPER = "#fefefe"
"""Behind words that lie on lines: in SVG it stands for the colour of the page."""

BLUE, RED, AMBER, TEAL, GREY = "#2f7ed8", "#d64545", "#c47a0a", "#1f9483", "#808080"
"""Legible on white and on the dark page alike."""

RAMP = ("#5158de", "#9449ce", "#c43ea4", "#e23f67", "#e75b03", "#c78709")
"""From violet to amber in equal steps of lightness and hue, and as legible as the colours above from end to end."""

SIZE = (4.6, 3.2)
"""Inches: at the width of a phone its text is as large as the page's small print."""

TITLE_WIDTH = 46
LONGEST_LABEL = 28
"""Characters."""

LEGEND_ROW = 0.19
"""Inches."""

STYLE: dict[str, Any] = {
    "figure.figsize": SIZE,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    # names of kinds are the user's, and may hold dollar signs
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "raydiv",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure, the name of its file, and what to see in it."""

    name: str
    title: str
    figure: Any
    caption: str


def styled() -> AbstractContextManager[None]:
    """Whatever is drawn within looks as STYLE says."""
    from matplotlib import rc_context

    return rc_context(STYLE)


def new_axis(title: str, below: str) -> tuple[Any, Any]:
    """A figure with one axis, and what its horizontal direction means."""
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    axis.set_title(textwrap.fill(title, TITLE_WIDTH))
    axis.set_xlabel(below)
    return figure, axis


def legend(figure: Any, axis: Any) -> None:
    """Below the axis, where it hides nothing, and of which it takes nothing; one curve alone needs none."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) < 2:
        return
    short = [shortened(label) for label in labels]
    longest = max(map(len, short))
    columns = 1 if longest > 22 else 2 if longest > 14 or len(short) == 4 else 3
    figure.legend(handles, short, loc="outside lower left", ncols=columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * (math.ceil(len(short) / columns) - 1))


def shortened(label: str, most: int = LONGEST_LABEL) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"


def broken(words: str, width: int, most: int) -> str:
    """In lines of ``width`` characters, cut after ``most`` of them."""
    return "\n".join(textwrap.wrap(words, width, max_lines=most, placeholder="…"))


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


def write_pictures(folder: Path, drawn: Iterable[Picture]) -> None:
    """Leave a PNG of each in ``folder``."""
    folder.mkdir(exist_ok=True)
    for picture in drawn:
        (folder / f"{picture.name}.png").write_bytes(png(picture.figure))


def svg(figure: Any, name: str, described: str) -> str:
    """An element to stand in a page, as wide as its place, read out as ``described``.

    ``name`` begins its ids, of which a page must have no two alike.
    """
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", transparent=True)
    drawn = buffer.getvalue()
    # what only a file of its own needs: the prologue, namespaces, metadata, comments and a style sheet for all elements
    drawn = drawn[drawn.index("<svg") :].replace("xlink:href=", "href=")
    drawn = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", drawn, flags=re.DOTALL)
    opening, _, rest = drawn.partition(">")
    (box,) = re.findall(r'viewBox="[^"]*"', opening)
    drawn = f'<svg {box} role="img" aria-label="{html.escape(described)}">{rest}'
    drawn = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", drawn)
    return re.sub(r"\n\s*", "\n", drawn).replace(INK, "currentColor").replace(PAPER, "var(--page)").strip()
