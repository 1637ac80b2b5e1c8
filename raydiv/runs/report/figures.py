"""The pictures of a run, a function each; one that would show nothing is None."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiv.runs.directory import RunDirectory
from raydiv.runs.measurements import SeparationFile
from raydiv.runs.metrics_log import Metrics
from raydiv.runs.report.drawing import AMBER, BLUE, GREY, INK, RED, TEAL, Picture, legend, new_axis, styled
from raydiv.utils.storage import read_json

ALIGNED, UNALIGNED = BLUE, RED
HARMFUL, HARMLESS = (RED, AMBER), (BLUE, TEAL, GREY)
"""Of the kinds of prompts of a class, in turn; the last is of all kinds that are left."""

SOLID = {"linewidth": 1.5}
FAINT = {"linewidth": 0.9, "alpha": 0.5}
HELD_OUT = {"linewidth": 1.0, "linestyle": "--", "marker": "o", "markersize": 4.5, "markerfacecolor": "none"}
MEASURED = {"linewidth": 1.5, "marker": "o", "markersize": 4}
CONTROL = {"linewidth": 1.2, "linestyle": ":", "marker": "s", "markersize": 3.5}

ELLIPSE = 0.95
"""Share of a Gaussian that an ellipse holds."""

MOST_BINS = 40


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the run, as it is drawn."""

    metric: str
    label: str
    colour: str
    style: Mapping[str, Any]


def pictures(run: RunDirectory) -> dict[str, list[Picture]]:
    """By section of the report: training, separation, rewards."""
    records = run.metrics.read()
    planes = {when: SeparationFile.load(run.separation / f"{when}.json") for when in ("before", "after")}
    compared = [log_ratio] if run.read_recipe().loss.needs_reference else []
    with styled():
        drawn = {
            "training": [draw(records) for draw in (loss, divergence, rewards, margin, *compared, gradient)],
            "separation": [*(plane(report, when) for when, report in planes.items() if report), separation(records)],
            "rewards": [reward_distribution(read_json(run.rewards) if run.rewards.exists() else {})],
        }
    return {section: [picture for picture in found if picture] for section, found in drawn.items()}


def loss(records: Sequence[Metrics]) -> Picture | None:
    curves = [Curve("loss", "training", BLUE, SOLID), Curve("eval/loss", "held-out", AMBER, HELD_OUT)]
    return _over_the_run("loss", "loss", "What training minimises, by its own formula.", records, curves)


def divergence(records: Sequence[Metrics]) -> Picture | None:
    """Titled with what is estimated, and with its ceiling where it has one."""
    curves = [
        Curve("divergence", "one update", BLUE, FAINT),
        Curve("divergence/ema", "running mean", BLUE, SOLID),
        Curve("eval/divergence", "held-out", AMBER, HELD_OUT),
    ]
    known = next((record for record in records if "divergence/name" in record), {})
    title = f"divergence: {known['divergence/name']}" if known else "divergence"
    caption = "What the objective estimates. Held-out values that stay behind training's show over-fitting."
    return _over_the_run("divergence", title, caption, records, curves, known.get("divergence/ceiling"))


def rewards(records: Sequence[Metrics]) -> Picture | None:
    curves = [
        Curve("reward/aligned", "aligned", ALIGNED, SOLID),
        Curve("eval/reward/aligned", "aligned, held-out", ALIGNED, HELD_OUT),
        Curve("reward/unaligned", "unaligned", UNALIGNED, SOLID),
        Curve("eval/reward/unaligned", "unaligned, held-out", UNALIGNED, HELD_OUT),
    ]
    caption = (
        "Mean of beta times log-ratio (without a reference: log-prob). Above zero: likelier than under the reference."
    )
    return _over_the_run("rewards", "rewards", caption, records, curves)


def margin(records: Sequence[Metrics]) -> Picture | None:
    curves = [
        Curve("reward/margin", "one update", BLUE, FAINT),
        Curve("reward/margin/ema", "running mean", BLUE, SOLID),
        Curve("eval/reward/margin", "held-out", AMBER, HELD_OUT),
    ]
    return _over_the_run("margin", "reward margin", "Reward of the aligned class less the other's.", records, curves)


def log_ratio(records: Sequence[Metrics]) -> Picture | None:
    curves = [
        Curve("log_ratio/rms", "training", BLUE, SOLID),
        Curve("eval/log_ratio/rms", "held-out", AMBER, HELD_OUT),
    ]
    caption = "How far the model has moved from the reference, in nats a response. A broken model has gone far."
    return _over_the_run("log-ratio", "log-ratio, root mean square", caption, records, curves)


def gradient(records: Sequence[Metrics]) -> Picture | None:
    curves = [Curve("grad_norm", "training", BLUE, SOLID)]
    return _over_the_run("gradient", "gradient norm", "Before clipping.", records, curves)


def separation(records: Sequence[Metrics]) -> Picture | None:
    curves = [
        Curve("separation/d_b", "all prompts", BLUE, MEASURED),
        Curve("separation/d_b_length_matched", "token lengths matched", TEAL, MEASURED),
        Curve("separation/d_b_shuffled", "labels shuffled", GREY, CONTROL),
    ]
    caption = "Distance of harmful from harmless prompts. What shuffled labels reach is chance."
    return _over_the_run("separation", "separation D_B", caption, records, curves)


def _over_the_run(
    name: str,
    title: str,
    caption: str,
    records: Sequence[Metrics],
    curves: Sequence[Curve],
    ceiling: float | None = None,
) -> Picture | None:
    """The curves that there are values of, over optimizer updates."""
    figure, axis = new_axis(title, "optimizer update")
    for curve in curves:
        points = [(record["step"], record[curve.metric]) for record in records if curve.metric in record]
        if points:
            alone = {"marker": "o"} if len(points) == 1 else {}
            axis.plot(*zip(*points, strict=True), color=curve.colour, label=curve.label, **{**curve.style, **alone})
    if not axis.has_data():
        return None
    if ceiling is not None:
        axis.axhline(ceiling, linestyle=(0, (1, 2)), color=INK, linewidth=1.2, label=f"ceiling {ceiling:.3g}")
    axis.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axis)
    return Picture(name, title, figure, caption)


def plane(report: SeparationFile, when: str) -> Picture:
    """Prompts in the plane of their first two principal components, and an ellipse around each class."""
    from matplotlib.patches import Ellipse

    title = f"{when}: D_B {report.d_b.value:.2f}"
    figure, axis = new_axis(title, "first principal component")
    axis.set_ylabel("second principal component")
    axis.set_aspect("equal", adjustable="datalim")
    points, kinds, harmful = np.array(report.plane), np.array(report.kinds), np.array(report.harmful)
    for is_harmful, colours, marker in ((True, HARMFUL, "x"), (False, HARMLESS, "o")):
        groups = _grouped(list(dict.fromkeys(kinds[harmful == is_harmful].tolist())), len(colours))
        for (label, members), colour in zip(groups.items(), colours, strict=False):
            own = points[(harmful == is_harmful) & np.isin(kinds, members)]
            axis.scatter(*own.T, s=16, linewidth=1, marker=marker, alpha=0.75, color=colour, label=label)
        centre, axes, angle = ellipse_around(points[harmful == is_harmful])
        axis.add_patch(
            Ellipse((centre[0], centre[1]), *axes, angle=angle, fill=False, edgecolor=colours[0], linewidth=1.5)
        )
    legend(figure, axis)
    caption = (
        f"Hidden states of the prompts {when} training: last layer, last token. An ellipse holds {ELLIPSE:.0%} of a Gaussian "
        "with its class's mean and covariance."
    )
    return Picture(f"plane-{when}", title, figure, caption)


def _grouped(kinds: list[str], most: int) -> dict[str, list[str]]:
    """Kinds by label: each by itself, and those that are too many together."""
    if len(kinds) <= most:
        return {kind: [kind] for kind in kinds}
    left = kinds[most - 1 :]
    return {kind: [kind] for kind in kinds[: most - 1]} | {f"{len(left)} other kinds": left}


def ellipse_around(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Centre [2], length of both axes [2] and angle in degrees of the ellipse that holds ELLIPSE of the points' Gaussian.

    (x - m)' S^-1 (x - m) = q for points [n, 2] with mean m and covariance S, where q is chi-squared's quantile with two degrees
    of freedom, -2 log(1 - ELLIPSE).
    """
    centre = points.mean(0)
    if len(points) < 2:
        return centre, np.zeros(2), 0.0
    spreads, directions = np.linalg.eigh(np.cov(points, rowvar=False))
    lengths = 2 * np.sqrt(-2 * math.log(1 - ELLIPSE) * spreads.clip(min=0))
    return centre, lengths, math.degrees(math.atan2(directions[1, 0], directions[0, 0]))


def reward_distribution(by_class: Mapping[str, Sequence[float]]) -> Picture | None:
    """Histograms of held-out rewards, in the same bins, each class's mean marked."""
    values = [value for found in by_class.values() for value in found]
    if not values:
        return None
    title = "rewards of held-out examples"
    figure, axis = new_axis(title, "beta * log-ratio")
    axis.set_ylabel("examples")
    edges = np.histogram_bin_edges(values, "auto")
    if len(edges) > MOST_BINS + 1:
        edges = np.histogram_bin_edges(values, MOST_BINS)
    for name, colour in (("aligned", ALIGNED), ("unaligned", UNALIGNED)):
        found = by_class[name]
        if found:
            axis.hist(found, edges, histtype="stepfilled", color=colour, alpha=0.35, label=name)
            axis.hist(found, edges, histtype="step", color=colour, linewidth=1.2)
            axis.axvline(float(np.mean(found)), color=colour, linewidth=1.2, linestyle="--")
    axis.yaxis.get_major_locator().set_params(integer=True)
    legend(figure, axis)
    caption = "At the end of training; dashed: each class's mean. The less the classes overlap, the better they are told apart."
    return Picture("reward-distribution", title, figure, caption)
