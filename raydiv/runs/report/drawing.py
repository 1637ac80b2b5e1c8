"""The style of pictures and their two formats: PNG on white, and SVG in the colours of the page that contains it."""

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
"""Colour of text and axes alone, so that in SVG it can be replaced by the colour of the page's text."""

PAPER = "#fefefe"
"""Background of text that lies on lines; in SVG it is replaced by the colour of the page."""

BLUE, RED, AMBER, TEAL, GREY = "#2f7ed8", "#d64545", "#c47a0a", "#1f9483", "#808080"
"""Legible on the white and on the dark page."""

RAMP = ("#5158de", "#9449ce", "#c43ea4", "#e23f67", "#e75b03", "#c78709")
"""From violet to amber in equal steps of lightness and hue, each as legible as the colours above."""

FIGURE_SIZE = (4.6, 3.2)
"""Inches. At the width of a phone the text is as large as the page's small print."""

TITLE_WIDTH = 46
MAX_LABEL_LENGTH = 28
"""Characters."""

LEGEND_ROW_HEIGHT = 0.19
"""Inches."""

STYLE: dict[str, Any] = {
    "figure.figsize": FIGURE_SIZE,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    # names of kinds come from the user and may contain dollar signs
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
    """A figure with the name of its file, its title and its caption."""

    name: str
    title: str
    figure: Any
    caption: str


def styled() -> AbstractContextManager[None]:
    """A context in which figures are drawn in STYLE."""
    from matplotlib import rc_context

    return rc_context(STYLE)


def new_axis(title: str, x_label: str) -> tuple[Any, Any]:
    """A figure with one axis."""
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    axis.set_title(textwrap.fill(title, TITLE_WIDTH))
    axis.set_xlabel(x_label)
    return figure, axis


def legend(figure: Any, axis: Any) -> None:
    """Add a legend below the axis, and its height to the figure; a single curve gets none."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) < 2:
        return
    short = [shortened(label) for label in labels]
    longest = max(map(len, short))
    columns = 1 if longest > 22 else 2 if longest > 14 or len(short) == 4 else 3
    figure.legend(handles, short, loc="outside lower left", ncols=columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW_HEIGHT * (math.ceil(len(short) / columns) - 1))


def shortened(label: str, length: int = MAX_LABEL_LENGTH) -> str:
    return label if len(label) <= length else f"{label[: length - 1]}…"


def wrapped(text: str, width: int, max_lines: int) -> str:
    """The text in lines of ``width`` characters, cut after ``max_lines`` lines."""
    return "\n".join(textwrap.wrap(text, width, max_lines=max_lines, placeholder="…"))


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()


def write_pictures(folder: Path, pictures: Iterable[Picture]) -> None:
    """Write a PNG of each picture into ``folder``."""
    folder.mkdir(exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(png(picture.figure))


def svg(figure: Any, name: str, description: str) -> str:
    """An <svg> element as wide as its container; screen readers read ``description``.

    ``name`` is the prefix of its ids, which must be unique in a page.
    """
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", transparent=True)
    element = buffer.getvalue()
    # drop what only a separate file needs: prologue, namespaces, metadata, comments and a style sheet for all elements
    element = element[element.index("<svg") :].replace("xlink:href=", "href=")
    element = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", element, flags=re.DOTALL)
    opening, _, rest = element.partition(">")
    (box,) = re.findall(r'viewBox="[^"]*"', opening)
    element = f'<svg {box} role="img" aria-label="{html.escape(description)}">{rest}'
    element = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", element)
    return re.sub(r"\n\s*", "\n", element).replace(INK, "currentColor").replace(PAPER, "var(--page)").strip()
