"""The report of a sweep: the drawn objects of its pictures, its table, its notes and its page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axis import Tick
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from helpers.made_sweep import (
    D_B,
    OVER_REFUSAL,
    SPACE,
    at_least,
    at_most,
    finished_trial,
    make_sweep,
    maximize,
    minimize,
    unfinished_trial,
)
from helpers.report_reader import Reader, drawn, lines
from raydiv.experiments.sweep.figures import by_parameter, pareto_front, pareto_fronts, sweep_pictures
from raydiv.experiments.sweep.page import sweep_notes, sweep_page, sweep_table, write_sweep_report
from raydiv.experiments.sweep.parallel_coordinates import parallel_coordinates
from raydiv.experiments.sweep.record import SweepRecord, TrialRecord, undominated
from raydiv.runs.report.drawing import PAPER, RAMP, Picture, styled, svg

ASR = "evaluate/asr"
NO_PICTURES: dict[str, list[Picture]] = {"trade-off": [], "parameters": []}
TWO = [maximize(D_B), minimize(ASR)]


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with styled():
        yield


def record_of(*trials: TrialRecord, **changed: Any) -> SweepRecord:
    """A record of these trials, without constraints."""
    return make_sweep(0, **{"constraints": [], "space": {"a.x": "uniform(0, 4)"}, "trials": list(trials)} | changed)


def dots(axis: Any) -> dict[str, list[list[float]]]:
    """The points of each label in the legend."""
    return {cloud.get_label(): cloud.get_offsets().tolist() for cloud in axis.collections}


def axis_of(record: SweepRecord, key: str) -> Any:
    """The axis of the picture of one parameter."""
    (parameter,) = (parameter for parameter in record.parameters if parameter.key == key)
    return drawn(by_parameter(record, record.objectives[0], parameter))


def test_trials_are_drawn_by_feasibility() -> None:
    record = record_of(
        finished_trial(1, {"a.x": 1.0}, {D_B: 0.5}),
        finished_trial(2, {"a.x": 2.0}, {D_B: 0.7}),
        finished_trial(3, {"a.x": 3.0}, {D_B: 0.9}, feasible=False),
        unfinished_trial(4, "stopped", values={"a.x": 4.0}, metrics={D_B: 2.0}),
        finished_trial(5, {"a.x": 2.5}, {}),
        constraints=[at_most(OVER_REFUSAL, 0.1)],
    )
    axis = axis_of(record, "a.x")
    assert dots(axis) == {
        "within the bounds": [[1.0, 0.5]],
        "beyond a bound": [[3.0, 0.9]],
        "best: trial 2": [[2.0, 0.7]],
    }
    assert axis.get_xscale() == "linear"
    assert axis.get_xlim()[0] <= 0 < 4 <= axis.get_xlim()[1]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("a.x", "higher is better")


@pytest.mark.parametrize(
    ("space", "log", "ends"),
    [
        ("uniform(0, 4)", False, (0.0, 4.0)),
        ("loguniform(1e-3, 10)", True, (0.001, 10.0)),
        ("lograndint(1, 512)", True, (1.0, 511.0)),
        ("quniform(0, 9, 0.5)", False, (0.0, 9.0)),
        ({"in": "loguniform(1, 4)", "when": {"b": "c"}}, True, (1.0, 4.0)),
    ],
)
def test_axis_shows_the_whole_interval(space: Any, log: bool, ends: tuple[float, ...]) -> None:
    trials = [finished_trial(1, {"x": 1.0}, {D_B: 0.5}), finished_trial(2, {"x": 2.0}, {D_B: 0.6})]
    axis = axis_of(record_of(*trials, space={"b": ["c"], "x": space}), "x")
    assert axis.get_xscale() == ("log" if log else "linear")
    for end in ends:
        assert axis.get_xlim()[0] <= end <= axis.get_xlim()[1]


def test_log_axes_have_plain_numbers() -> None:
    trials = [finished_trial(1, {"x": 0.01}, {D_B: 1}), finished_trial(2, {"x": 1.0}, {D_B: 2})]
    axis = axis_of(record_of(*trials, space={"x": "loguniform(0.01, 1)"}), "x")
    axis.figure.draw_without_rendering()
    assert {"0.01", "0.02", "0.1", "1"} <= {tick.get_text() for tick in axis.get_xticklabels()}


def test_categories_have_the_order_of_the_space() -> None:
    record = make_sweep()
    axis = axis_of(record, "loss.divergence")
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["kl", "jensen-shannon", "alpha"]
    positions = [x for points in dots(axis).values() for x, _ in points]
    assert len(set(positions)) == 24
    assert max(abs(x - round(x)) for x in positions) <= 0.25
    assert dots(axis) == dots(axis_of(record, "loss.divergence"))
    assert [tick.get_text() for tick in axis_of(record, "model.lora").get_xticklabels()] == ["null", "true"]


def test_conditional_parameter_is_drawn_for_trials_that_have_it() -> None:
    record = make_sweep()
    points = sum(map(len, dots(axis_of(record, "loss.alpha")).values()))
    assert points == sum("loss.alpha" in trial.values for trial in record.finished())


def test_pictures_without_a_comparison_are_left_out() -> None:
    trial = finished_trial(1, {"a.x": 1.0}, {D_B: 0.5, ASR: 0.1})
    same = finished_trial(2, {"a.x": 1.0}, {D_B: 0.9, ASR: 0.3})
    assert sweep_pictures(record_of(trial, objectives=TWO)) == NO_PICTURES
    assert sweep_pictures(record_of(objectives=TWO)) == NO_PICTURES
    pictures = sweep_pictures(record_of(trial, same, objectives=TWO))
    assert [picture.name for picture in pictures["trade-off"]] == ["front-separation-d_b-evaluate-asr"]
    assert pictures["parameters"] == []


def test_picture_for_each_objective_and_parameter() -> None:
    names = [picture.name for section in sweep_pictures(make_sweep(objectives=TWO)).values() for picture in section]
    assert len(names) == len(set(names)) == 2 * len(SPACE) + 2
    assert "evaluate-asr-by-loss.beta" in names


def test_undominated() -> None:
    points = [(1, 4), (2, 2), (2, 3), (4, 1), (1, 4), (5, 5)]
    trials = [finished_trial(number, {}, {"a": a, "b": b}) for number, (a, b) in enumerate(points)]
    front = undominated(trials, [minimize("a"), minimize("b")])
    assert [trial.number for trial in front] == [0, 1, 3, 4]


POINTS = [(0.1, 0.2), (0.2, 0.6), (0.3, 0.5), (0.4, 0.9), (0.2, 0.1)]
"""Values of the constraint's metric and of the objective."""


@pytest.mark.parametrize(
    ("relation", "direction", "front", "where"),
    [
        ("<=", "maximize", [(0.1, 0.2), (0.2, 0.6), (0.4, 0.9)], "steps-post"),
        (">=", "maximize", [(0.4, 0.9)], "steps-pre"),
        ("<=", "minimize", [(0.1, 0.2), (0.2, 0.1)], "steps-post"),
        (">=", "minimize", [(0.2, 0.1), (0.3, 0.5), (0.4, 0.9)], "steps-pre"),
    ],
)
def test_front_in_each_direction(relation: str, direction: str, front: list[tuple[float, float]], where: str) -> None:
    trials = [
        finished_trial(number, {}, {OVER_REFUSAL: x, D_B: y}, feasible=bool(number % 2))
        for number, (x, y) in enumerate(POINTS, 1)
    ]
    objective = maximize(D_B) if direction == "maximize" else minimize(D_B)
    constraint = at_most(OVER_REFUSAL, 0.25) if relation == "<=" else at_least(OVER_REFUSAL, 0.25)
    (picture,) = pareto_fronts(record_of(*trials, objectives=[objective], constraints=[constraint]))
    axis = drawn(picture)
    if len(front) == 1:
        assert "none better in both" not in lines(axis)
    else:
        steps = lines(axis)["none better in both"]
        assert [tuple(point) for point in steps.get_xydata()] == front
        assert steps.get_drawstyle() == where
    assert set(lines(axis)[f"bound: {relation} 25%"].get_xdata()) == {0.25}
    assert sum(map(len, dots(axis).values())) == len(POINTS)
    assert axis.get_xlabel().endswith("lower is better" if relation == "<=" else "higher is better")
    assert axis.get_ylabel().endswith("higher is better" if direction == "maximize" else "lower is better")


def test_front_of_two_objectives_has_feasible_trials_only() -> None:
    trials = [
        finished_trial(1, {}, {D_B: 1.0, ASR: 0.5, OVER_REFUSAL: 0.0}),
        finished_trial(2, {}, {D_B: 2.0, ASR: 0.6, OVER_REFUSAL: 0.1}),
        finished_trial(3, {}, {D_B: 3.0, ASR: 0.1, OVER_REFUSAL: 0.9}, feasible=False),
    ]
    (picture,) = pareto_fronts(record_of(*trials, objectives=TWO, constraints=[at_most(OVER_REFUSAL, 0.1)]))
    axis = drawn(picture)
    assert lines(axis)["none better in both"].get_xydata().tolist() == [[0.5, 1.0], [0.6, 2.0]]
    assert dots(axis) == {"beyond a bound": [[0.1, 3.0]], "best: 2 trials": [[0.5, 1.0], [0.6, 2.0]]}
    assert picture.title == "separation D_B (paper protocol) against attack success (ASR)"


def test_one_objective_without_a_constraint_has_no_front() -> None:
    assert pareto_fronts(make_sweep(constraints=[])) == []
    assert pareto_fronts(make_sweep(constraints=[at_least(D_B, 0.2)])) == []


def test_bound_of_an_objective_is_drawn_on_its_axis() -> None:
    record = make_sweep(objectives=TWO, constraints=[at_least(D_B, 0.4)])
    picture = pareto_front(record, minimize(ASR), maximize(D_B))
    assert set(lines(drawn(picture))["bound: >= 0.4"].get_ydata()) == {0.4}


def test_parallel_coordinates() -> None:
    space = {
        "x": "loguniform(0.01, 1)",
        "c": ["u", "v", "w"],
        "y": {"in": "uniform(0, 9)", "when": {"c": "u"}},
        "z": [1],
    }
    record = record_of(
        finished_trial(1, {"x": 0.01, "c": "u", "y": 2.0, "z": 1}, {D_B: 1.0}),
        finished_trial(2, {"x": 0.1, "c": "v", "z": 1}, {D_B: 3.0}),
        finished_trial(3, {"x": 1.0, "c": "u", "y": 8.0, "z": 1}, {D_B: 2.0}, feasible=False),
        space=space,
    )
    axis = drawn(parallel_coordinates(record))
    paths = [line for line in axis.get_lines() if len(line.get_ydata()) == 4]
    assert [line.get_xdata() for line in paths] == [
        pytest.approx([0, 0, 0, 0]),
        pytest.approx([1, 0, 1, 0.5]),
        pytest.approx([0.5, 0.5, -0.1, 1]),
    ]
    assert [line.get_linestyle() for line in paths] == ["-", ":", "-"]
    assert paths[2].get_linewidth() > 2 * paths[0].get_linewidth()
    assert (to_hex(paths[0].get_color()), to_hex(paths[2].get_color())) == (RAMP[0], RAMP[-1])
    names = [tick.get_text() for tick in axis.get_yticklabels()]
    assert names == ["x", "c", "y", "separation D_B\n(paper protocol)\nhigher is better"]
    ticks = [(text.get_text(), *text.xy) for text in axis.texts]
    assert ticks == [
        *[("0.01", 0, 0), ("1", 1, 0), ("u", 0, -1), ("v", 0.5, -1), ("w", 1, -1)],
        *[("2", 0, -2), ("8", 1, -2), ("-", -0.1, -2), ("1", 0, -3), ("3", 1, -3)],
    ]


def test_parallel_coordinates_of_a_minimized_objective_need_two_parameters() -> None:
    outcomes = [({"x": 1, "y": 5}, {ASR: 0.1}), ({"x": 2, "y": 5.5}, {ASR: 0.4})]
    trials = [finished_trial(number, *outcome) for number, outcome in enumerate(outcomes, 1)]
    space = {"x": "randint(0, 9)", "y": "uniform(0, 9)"}
    record = record_of(*trials, space=space, objectives=TWO[1:])
    paths = [line for line in drawn(parallel_coordinates(record)).get_lines() if len(line.get_ydata()) == 3]
    assert [to_hex(line.get_color()) for line in paths] == [RAMP[0], RAMP[-1]]
    assert paths[-1].get_xdata() == pytest.approx([0, 0, 0])
    assert parallel_coordinates(replace(record, parameters=record.parameters[:1])) is None


def crowded_sweep() -> SweepRecord:
    """A sweep with many parameters, long names and many categories."""
    formats = [
        "a-rather-long-name",
        "prompt-chosen",
        "kto",
        "x",
        "messages",
        "something else",
        "more",
        "$5 or $6",
        "last one of all",
    ]
    space = SPACE | {"data.format": formats} | {f"p.quite_a_long_name_of_{n}": "uniform(0, 1)" for n in "abcde"}
    record = make_sweep(30, space=space, objectives=TWO, constraints=[at_most(OVER_REFUSAL, 0.125)])
    for trial in record.trials.values():
        trial.values |= {key: (trial.number + 0.3) * 0.618 % 1 for key in space if key.startswith("p.")}
        trial.values["data.format"] = formats[trial.number * 5 % 9]
    return record


def test_texts_of_a_picture_do_not_overlap() -> None:
    for picture in [picture for section in sweep_pictures(crowded_sweep()).values() for picture in section]:
        picture.figure.draw_without_rendering()
        boxes = [(text.get_text(), Text.get_window_extent(text).padded(-1)) for text in visible_texts(picture)]
        assert len(boxes) > 5
        for (text, box), (other, other_box) in combinations(boxes, 2):
            assert not box.overlaps(other_box), f"{picture.name}: {text!r} on {other!r}"


def visible_texts(picture: Picture) -> list[Text]:
    """All texts but the labels of ticks beyond the ends of their axis, which are not drawn."""
    axis = drawn(picture)
    sides = ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim()))
    shown = [
        tick.label1 for side, (low, high) in sides for tick in side.get_major_ticks() if low <= tick.get_loc() <= high
    ]
    labels = {text for tick in picture.figure.findobj(Tick) for text in (tick.label1, tick.label2)}
    texts = [*(text for text in picture.figure.findobj(Text) if text not in labels), *shown]
    return [text for text in texts if text.get_visible() and text.get_text()]


def test_background_of_texts_has_the_colour_of_the_page() -> None:
    picture = parallel_coordinates(make_sweep())
    assert picture
    image = svg(picture.figure, "it", "lines")
    assert "var(--page)" in image
    assert PAPER not in image


def test_table_is_best_first_and_ends_with_unfinished_trials() -> None:
    record = record_of(
        unfinished_trial(1, "failed", error="out of memory"),
        finished_trial(2, {"a.x": 0.123456, "b.x": True, "y": None}, {ASR: 0.3, OVER_REFUSAL: 0.05}),
        finished_trial(3, {"a.x": 2.0, "b.x": False, "y": "w"}, {ASR: 0.1, OVER_REFUSAL: 0.5}, feasible=False),
        unfinished_trial(4, "stopped", values={"a.x": 3, "b.x": False}, metrics={ASR: 0.01}),
        finished_trial(5, {"a.x": 1.0, "b.x": True}, {ASR: 0.2, OVER_REFUSAL: 0.1}),
        unfinished_trial(6, "waiting"),
        finished_trial(7, {"a.x": 1.0, "b.x": True}, {}),
        unfinished_trial(8, "stopped"),
        objectives=TWO[1:],
        constraints=[at_most(OVER_REFUSAL, 0.125)],
        space={"a.x": "uniform(0, 4)", "b.x": [True, False], "y": [None, "w"]},
    )
    header, rows = sweep_table(record)
    assert header == ["#", "status", "a.x", "b.x", "y", "attack success (ASR)", "refused: all harmless <= 12.5%"]
    assert rows == [
        ("5", "best", "1", "true", "-", "20.0%", "10.0%"),
        ("2", "finished", "0.1235", "true", "null", "30.0%", "5.0%"),
        ("7", "finished", "1", "true", "-", "-", "-"),
        ("3", "infeasible", "2", "false", "w", "10.0%", "50.0%"),
        ("4", "stopped", "3", "false", "-", "1.0%", "-"),
        ("8", "stopped", "-", "-", "-", "-", "-"),
        ("1", "failed", "-", "-", "-", "-", "-"),
        ("6", "waiting", "-", "-", "-", "-", "-"),
    ]


def test_constraint_on_an_objective_has_no_column() -> None:
    header, _ = sweep_table(make_sweep(constraints=[at_least(D_B, 0.2)]))
    assert header[-1] == "separation D_B (paper protocol) >= 0.2"
    assert sum("separation" in name for name in header) == 1


def test_notes_have_counts_by_status_and_selection_bias() -> None:
    notes = sweep_notes(make_sweep())
    assert [note.partition(":")[0] for note in notes[:3]] == ["finished", "stopped early by asha", "failed"]
    assert "24 of 26" in notes[0]
    assert notes[1].endswith(": 1")
    assert "(trial 26): the loss is not finite at update 7" in notes[2]
    assert "selection bias" in notes[3]
    assert "24 trials" in notes[3]
    assert len(notes) == 4


def test_notes_of_a_sweep_without_a_feasible_trial() -> None:
    infeasible = finished_trial(1, {"a.x": 1.0}, {D_B: 0.5, OVER_REFUSAL: 0.2}, feasible=False)
    failed = [unfinished_trial(number, "failed", error=error) for number, error in ((2, "one"), (3, None), (4, "one"))]
    waiting = unfinished_trial(5, "waiting")
    constraints = [at_most(OVER_REFUSAL, 0.1)]
    finished, not_started, same, unknown, violated = sweep_notes(
        record_of(infeasible, *failed, waiting, constraints=constraints)
    )
    assert "1 of 5" in finished
    assert not_started.endswith(": 1")
    assert same == "failed: 2 (trial 2, 4): one"
    assert unknown.startswith("failed: 1 (trial 3)")
    assert violated.endswith(": refused: all harmless <= 10%")


def test_page_is_complete_and_loads_no_other_file(tmp_path: Path) -> None:
    path, folder = tmp_path / "report.html", tmp_path / "pictures"
    write_sweep_report(path, folder, make_sweep(objectives=TWO))
    content = path.read_text()
    reader = Reader(content)
    assert reader.open == []
    assert "http:" not in content
    assert "https:" not in content
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in reader.tags}
    references = [attributes[name] for _, attributes in reader.tags for name in ("src", "href") if name in attributes]
    assert all(reference.startswith("#") for reference in references)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    files = sorted(folder.iterdir())
    assert sum(tag == "svg" for tag, _ in reader.tags) == len(files) == 2 * len(SPACE) + 2
    assert imread(files[0])[0, 0, :3].min() == 1  # white
    write_sweep_report(path, folder, make_sweep(objectives=TWO))
    assert path.read_text() == content


def test_page_has_the_best_trial_or_the_front() -> None:
    record = make_sweep()
    page = sweep_page(record, NO_PICTURES)
    assert f"<caption>Best: trial {record.best[0].number}</caption>" in page
    assert "separation D_B (paper protocol), token lengths matched" in page
    assert "<dd>24 of 26 trials</dd>" in page
    several = sweep_page(make_sweep(objectives=TWO), NO_PICTURES)
    assert "Pareto front" in several
    assert "Best: trial" not in several


def test_page_without_a_best_trial(tmp_path: Path) -> None:
    path, folder = tmp_path / "report.html", tmp_path / "pictures"
    write_sweep_report(path, folder, make_sweep(0, trials=[unfinished_trial(1, "failed", error="a & b")]))
    content = path.read_text()
    assert "No trial has finished." in content
    assert "<svg" not in content
    assert "a &amp; b" in content
    assert list(folder.iterdir()) == []
    infeasible = finished_trial(1, {"a.x": 1.0}, {D_B: 0.5}, feasible=False)
    assert "No finished trial satisfies the constraints." in sweep_page(record_of(infeasible), NO_PICTURES)


def test_page_has_the_run_and_the_error_of_each_trial() -> None:
    record = make_sweep(2, scheduler="none", mlflow=None)
    record.trials[1].kept = False
    page = sweep_page(record, NO_PICTURES)
    assert "<td>trials/001, not kept</td>" in page
    assert "<td>trials/002</td>" in page
    assert "<td>20</td><td>16</td><td>trials/003</td>" in page
    assert "Traceback" in page
    assert "MLflow" not in page
    assert "loguniform(0.01, 1)" in page


def test_texts_of_the_user_are_escaped() -> None:
    raw = "<b>&"
    record = make_sweep(
        3,
        name=raw,
        goal=raw,
        recipe="</pre><script>",
        search=raw,
        space={f"loss.{raw}": [raw, "c"], "y": {"in": [1], "when": {f"loss.{raw}": raw}}},
        versions={raw: raw},
        objectives=[maximize(f"capability/{raw}")],
    )
    for trial in record.trials.values():
        trial.values = {f"loss.{raw}": raw if trial.number == 1 else "c"}
        trial.metrics = {f"capability/{raw}": trial.number / 7, OVER_REFUSAL: 0.0}
        trial.error = raw
    page = sweep_page(record, sweep_pictures(record))
    assert Reader(page).open == []
    assert raw not in page
    assert "</pre><script>" not in page
    assert "&lt;b&gt;&amp;" in page


def test_values_that_are_not_finite_are_not_drawn() -> None:
    record = record_of(
        finished_trial(1, {"a.x": 1.0}, {D_B: math.inf}),
        finished_trial(2, {"a.x": 2.0}, {D_B: 0.4}),
        finished_trial(3, {"a.x": 3.0}, {}),
    )
    assert sweep_pictures(record) == NO_PICTURES
    assert [row[0] for row in sweep_table(record)[1]] == ["2", "1", "3"]
