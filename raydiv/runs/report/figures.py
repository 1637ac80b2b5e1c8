"""The pictures of a run, one function each; None instead of an empty picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raydiv.runs.directory import RunDirectory
from raydiv.runs.measurements import DepthFile, SeparationFile, rewards_by_class
from raydiv.runs.metrics_log import Metrics
from raydiv.runs.report.drawing import AMBER, BLUE, GREY, INK, RED, TEAL, Picture, legend, new_axis, styled

ALIGNED, UNALIGNED = BLUE, RED
HARMFUL, HARMLESS = (RED, AMBER), (BLUE, TEAL, GREY)
"""Colours of the kinds of prompts in a class; the last colour is shared by all further kinds."""

SOLID = {"linewidth": 1.5}
FAINT = {"linewidth": 0.9, "alpha": 0.5}
HELD_OUT = {"linewidth": 1.0, "linestyle": "--", "marker": "o", "markersize": 4.5, "markerfacecolor": "none"}
MEASURED = {"linewidth": 1.5, "marker": "o", "markersize": 4}
CONTROL = {"linewidth": 1.2, "linestyle": ":", "marker": "s", "markersize": 3.5}

ELLIPSE_SHARE = 0.95
"""Share of a Gaussian that an ellipse holds."""

MAX_BINS = 40


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the updates of a run: label, colour and line style."""

    metric: str
    label: str
    colour: str
    style: Mapping[str, Any]


def pictures(run: RunDirectory) -> dict[str, list[Picture]]:
    """Pictures by section of the report: training, separation, rewards."""
    records = run.metrics.read()
    planes = {when: SeparationFile.load(run.separation / f"{when}.json") for when in ("before", "after")}
    reference_pictures = [log_ratio] if run.read_recipe().loss.needs_reference else []
    with styled():
        by_section = {
            "training": [draw(records) for draw in (loss, divergence, rewards, margin, *reference_pictures, gradient)],
            "separation": [*(plane(report, when) for when, report in planes.items() if report), separation(records)],
            "rewards": [
                reward_distribution(rewards_by_class(run.rewards)),
                depth_of_steps(records),
                depth(DepthFile.load(run.evaluation / "depth.json"), DepthFile.load(run.evaluation / "after.json")),
            ],
        }
    return {section: [picture for picture in drawn if picture] for section, drawn in by_section.items()}


def loss(records: Sequence[Metrics]) -> Picture | None:
    curves = [Curve("loss", "training", BLUE, SOLID), Curve("eval/loss", "held-out", AMBER, HELD_OUT)]
    return _metric_picture("loss", "loss", "The objective that training minimises, in its own units.", records, curves)


def divergence(records: Sequence[Metrics]) -> Picture | None:
    """Titled with the name of the divergence; with a line at its ceiling where it has one."""
    # the estimate of all held-out examples has less bias than a step's
    held_out = ("eval/divergence/equal_size", "held-out, as many examples")
    if not any(held_out[0] in record for record in records):
        held_out = ("eval/divergence", "held-out")
    curves = [
        Curve("divergence", "one update", BLUE, FAINT),
        Curve("divergence/ema", "running mean", BLUE, SOLID),
        Curve(*held_out, AMBER, HELD_OUT),
    ]
    named = next((record for record in records if "divergence/name" in record), {})
    title = f"divergence: {named['divergence/name']}" if named else "divergence"
    caption = "The estimate of the objective. Held-out values below those of training show over-fitting."
    return _metric_picture("divergence", title, caption, records, curves, named.get("divergence/ceiling"))


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
    return _metric_picture("rewards", "rewards", caption, records, curves)


def margin(records: Sequence[Metrics]) -> Picture | None:
    curves = [
        Curve("reward/margin", "one update", BLUE, FAINT),
        Curve("reward/margin/ema", "running mean", BLUE, SOLID),
        Curve("eval/reward/margin", "held-out", AMBER, HELD_OUT),
    ]
    return _metric_picture(
        "margin",
        "reward margin",
        "Mean reward of the aligned class minus that of the unaligned class.",
        records,
        curves,
    )


def log_ratio(records: Sequence[Metrics]) -> Picture | None:
    curves = [
        Curve("log_ratio/rms", "training", BLUE, SOLID),
        Curve("eval/log_ratio/rms", "held-out", AMBER, HELD_OUT),
    ]
    caption = (
        "Distance of the model from the reference, in nats per response (tokens count as loss.position says). It is "
        "large in a broken model."
    )
    return _metric_picture("log-ratio", "log-ratio, root mean square", caption, records, curves)


def gradient(records: Sequence[Metrics]) -> Picture | None:
    curves = [Curve("grad_norm", "training", BLUE, SOLID)]
    return _metric_picture("gradient", "gradient norm", "Before clipping.", records, curves)


def separation(records: Sequence[Metrics]) -> Picture | None:
    curves = [
        Curve("separation/d_b", "all prompts", BLUE, MEASURED),
        Curve("separation/d_b_length_matched", "token lengths matched", TEAL, MEASURED),
        Curve("separation/d_b_shuffled", "labels shuffled", GREY, CONTROL),
    ]
    caption = "Distance between harmful and harmless prompts. Shuffled labels show the value that chance gives."
    return _metric_picture("separation", "separation D_B", caption, records, curves)


def _metric_picture(
    name: str,
    title: str,
    caption: str,
    records: Sequence[Metrics],
    curves: Sequence[Curve],
    ceiling: float | None = None,
) -> Picture | None:
    """Curves over optimizer updates, without those that have no values."""
    figure, axis = new_axis(title, "optimizer update")
    for curve in curves:
        points = [(record["step"], record[curve.metric]) for record in records if curve.metric in record]
        if points:
            style = {**curve.style, **({"marker": "o"} if len(points) == 1 else {})}
            axis.plot(*zip(*points, strict=True), color=curve.colour, label=curve.label, **style)
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
        groups = _kinds_by_label(list(dict.fromkeys(kinds[harmful == is_harmful].tolist())), len(colours))
        for (label, members), colour in zip(groups.items(), colours, strict=False):
            selected = points[(harmful == is_harmful) & np.isin(kinds, members)]
            axis.scatter(*selected.T, s=16, linewidth=1, marker=marker, alpha=0.75, color=colour, label=label)
        centre, axes, angle = ellipse_around(points[harmful == is_harmful])
        axis.add_patch(
            Ellipse((centre[0], centre[1]), *axes, angle=angle, fill=False, edgecolor=colours[0], linewidth=1.5)
        )
    legend(figure, axis)
    caption = (
        f"Hidden states of the prompts {when} training: last layer, last token. An ellipse holds {ELLIPSE_SHARE:.0%} "
        "of a Gaussian with its class's mean and covariance."
    )
    return Picture(f"plane-{when}", title, figure, caption)


def _kinds_by_label(kinds: list[str], max_groups: int) -> dict[str, list[str]]:
    """Kinds by label: a label each, and one label for all beyond ``max_groups``."""
    if len(kinds) <= max_groups:
        return {kind: [kind] for kind in kinds}
    others = kinds[max_groups - 1 :]
    return {kind: [kind] for kind in kinds[: max_groups - 1]} | {f"{len(others)} other kinds": others}


def ellipse_around(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Centre [2], lengths of both axes [2] and angle in degrees of an ellipse around points [n, 2].

    The ellipse holds ELLIPSE_SHARE of the Gaussian with the points' mean m and covariance S: (x - m)' S^-1 (x - m) = q,
    where q is the quantile of chi-squared with two degrees of freedom, -2 log(1 - ELLIPSE_SHARE).
    """
    centre = points.mean(0)
    if len(points) < 2:
        return centre, np.zeros(2), 0.0
    spreads, directions = np.linalg.eigh(np.cov(points, rowvar=False))
    lengths = 2 * np.sqrt(-2 * math.log(1 - ELLIPSE_SHARE) * spreads.clip(min=0))
    return centre, lengths, math.degrees(math.atan2(directions[1, 0], directions[0, 0]))


def reward_distribution(by_class: Mapping[str, Sequence[float]]) -> Picture | None:
    """Histograms of held-out rewards in the same bins, with the mean of each class."""
    values = [value for rewards in by_class.values() for value in rewards]
    if not values:
        return None
    title = "rewards of held-out examples"
    figure, axis = new_axis(title, "beta * log-ratio")
    axis.set_ylabel("examples")
    edges = np.histogram_bin_edges(values, "auto")
    if len(edges) > MAX_BINS + 1:
        edges = np.histogram_bin_edges(values, MAX_BINS)
    for name, colour in (("aligned", ALIGNED), ("unaligned", UNALIGNED)):
        if by_class[name]:
            axis.hist(by_class[name], edges, histtype="stepfilled", color=colour, alpha=0.35, label=name)
            axis.hist(by_class[name], edges, histtype="step", color=colour, linewidth=1.2)
            axis.axvline(float(np.mean(by_class[name])), color=colour, linewidth=1.2, linestyle="--")
    axis.yaxis.get_major_locator().set_params(integer=True)
    legend(figure, axis)
    caption = (
        "At the end of training; dashed: the mean of each class. The less the classes overlap, the better the model "
        "separates them."
    )
    return Picture("reward-distribution", title, figure, caption)


def depth_of_steps(records: Sequence[Metrics]) -> Picture | None:
    """None where it was measured after training alone."""
    if sum("eval/depth/half" in record for record in records) < 2:
        return None
    curves = [Curve("eval/depth/half", "held-out", AMBER, MEASURED)]
    caption = "Tokens of the response by which half of the held-out reward margin lies; none while it is not positive."
    return _metric_picture("depth-of-steps", "tokens to half of the margin", caption, records, curves)


def depth(*files: DepthFile | None) -> Picture | None:
    """Mean log-ratios up to each token of a response, with their 95% intervals and dots at half of the last value."""
    curves = {name: curve for file in files if file for name, curve in file.curves.items()}
    if not curves:
        return None
    styles = {
        "aligned": ("aligned, held-out", ALIGNED),
        "unaligned": ("unaligned, held-out", UNALIGNED),
        "margin": ("aligned less unaligned", INK),
        "kl": ("the model's own answers: KL to the base", TEAL),
    }
    title = "log-ratio up to each token"
    figure, axis = new_axis(title, "tokens of the response")
    axis.set_ylabel("nats")
    for name, (values, half_widths, half) in curves.items():
        label, colour = styles[name]
        positions, middle, width = np.arange(1, len(values) + 1), np.array(values), np.array(half_widths)
        axis.plot(positions, middle, color=colour, label=label, linewidth=1.5)
        axis.fill_between(positions, middle - width, middle + width, color=colour, alpha=0.15, linewidth=0)
        if half is not None:
            axis.plot(half, middle[half - 1], "o", color=colour, markersize=5)
    legend(figure, axis)
    caption = (
        "Mean of the responses' log-ratios to the base after training, up to each token; a response that has ended "
        "keeps its sum. A dot: half of the last value. A curve that rises in the first tokens alone is a shallow "
        "alignment: an answer that has begun goes on as the base's would."
    )
    return Picture("depth", title, figure, caption)
