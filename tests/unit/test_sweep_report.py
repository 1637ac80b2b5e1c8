"""The report of a sweep, read back from its pictures' own objects, its table and its page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axis import Tick
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from helpers.made_sweep import D_B, OVER_REFUSAL, SPACE, make_sweep, trial, unfinished
from helpers.report_reader import Reader, drawn, lines
from raydiv.experiments.sweep.figures import by_parameter, front, fronts, parallel, sweep_pictures, undominated
from raydiv.experiments.sweep.page import sweep_notes, sweep_page, sweep_table, write_sweep_report
from raydiv.experiments.sweep.report_record import Aim, aims, parameters
from raydiv.runs.report.drawing import PAPER, RAMP, Picture, styled, svg

ASR = "evaluate/asr"
NO_PICTURES: dict[str, list[Picture]] = {"trade-off": [], "parameters": []}
TWO = [{"metric": D_B, "direction": "maximize"}, {"metric": ASR, "direction": "minimize"}]


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with styled():
        yield


def record(*trials: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """Of these trials alone, without constraints."""
    return make_sweep(0, **{"constraints": [], "space": {"a.x": "uniform(0, 4)"}, "trials": list(trials)} | changed)


def dots(axis: Any) -> dict[str, list[list[float]]]:
    return {cloud.get_label(): cloud.get_offsets().tolist() for cloud in axis.collections}


def only(content: dict[str, Any], key: str) -> Any:
    (parameter,) = (one for one in parameters(content) if one.key == key)
    return drawn(by_parameter(content, aims(content)[0], parameter))


def test_trials_are_drawn_over_a_parameter_apart_by_whether_they_may_be_chosen() -> None:
    content = record(
        trial(1, {"a.x": 1.0}, {D_B: 0.5}),
        trial(2, {"a.x": 2.0}, {D_B: 0.7}),
        trial(3, {"a.x": 3.0}, {D_B: 0.9}, feasible=False),
        unfinished(4, "stopped", values={"a.x": 4.0}, metrics={D_B: 2.0}),
        trial(5, {"a.x": 2.5}, {}),
        constraints=[{"metric": OVER_REFUSAL, "relation": "<=", "bound": 0.1}],
        best=[2],
    )
    axis = only(content, "a.x")
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
        ("lograndint(1, 512)", True, (1.0, 512.0)),
        ("qloguniform(0.1, 1, 0.1)", True, (0.1, 1.0)),
        ("normal(0, 1)", False, ()),
        ({"in": "loguniform(1, 4)", "when": {"b": "c"}}, True, (1.0, 4.0)),
    ],
)
def test_an_axis_is_as_the_space_says(space: Any, log: bool, ends: tuple[float, ...]) -> None:
    content = record(trial(1, {"x": 1.0}, {D_B: 0.5}), trial(2, {"x": 2.0}, {D_B: 0.6}), space={"x": space})
    (parameter,) = parameters(content)
    assert (parameter.log, parameter.ends, parameter.categories) == (log, ends, ())
    axis = only(content, "x")
    assert axis.get_xscale() == ("log" if log else "linear")
    for end in ends:
        assert axis.get_xlim()[0] <= end <= axis.get_xlim()[1]


def test_log_axes_have_plain_numbers() -> None:
    content = record(
        trial(1, {"x": 0.01}, {D_B: 1}), trial(2, {"x": 1.0}, {D_B: 2}), space={"x": "loguniform(0.01, 1)"}
    )
    axis = only(content, "x")
    axis.figure.draw_without_rendering()
    assert {"0.01", "0.02", "0.1", "1"} <= {tick.get_text() for tick in axis.get_xticklabels()}


def test_categories_stand_side_by_side_in_the_order_of_the_space() -> None:
    content = make_sweep()
    axis = only(content, "loss.divergence")
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["kl", "jensen-shannon", "alpha"]
    places = [place for found in dots(axis).values() for place, _ in found]
    assert len(set(places)) == 24
    assert max(abs(place - round(place)) for place in places) <= 0.25
    assert dots(axis) == dots(only(content, "loss.divergence"))
    assert [tick.get_text() for tick in only(content, "model.lora").get_xticklabels()] == ["null", "true"]


def test_conditional_parameters_are_drawn_of_the_trials_that_have_them() -> None:
    content = make_sweep()
    drawn_ones = sum(map(len, dots(only(content, "loss.alpha")).values()))
    assert drawn_ones == sum("loss.alpha" in one["values"] for one in content["trials"] if one["status"] == "finished")


def test_what_would_show_nothing_is_left_out() -> None:
    one = trial(1, {"a.x": 1.0}, {D_B: 0.5, ASR: 0.1})
    same = trial(2, {"a.x": 1.0}, {D_B: 0.9, ASR: 0.3})
    assert sweep_pictures(record(one, objectives=TWO)) == NO_PICTURES
    assert sweep_pictures(record(objectives=TWO)) == NO_PICTURES
    both = sweep_pictures(record(one, same, objectives=TWO))
    assert [picture.name for picture in both["trade-off"]] == ["front-separation-d_b-evaluate-asr"]
    assert both["parameters"] == []


def test_there_is_a_picture_of_each_objective_and_parameter() -> None:
    found = sweep_pictures(make_sweep(objectives=TWO))
    names = [picture.name for several in found.values() for picture in several]
    assert len(names) == len(set(names)) == 2 * len(SPACE) + 2
    assert "evaluate-asr-by-loss.beta" in names


def test_undominated() -> None:
    costs = np.array([[1, 4], [2, 2], [2, 3], [4, 1], [1, 4], [5, 5]], float)
    assert undominated(costs).tolist() == [True, True, False, True, True, False]


def front_of(points: list[tuple[float, float]], relation: str, direction: str, **changed: Any) -> Any:
    """Points are (constraint's metric, objective); odd trials are feasible."""
    trials = [
        trial(number, {}, {OVER_REFUSAL: x, D_B: y}, feasible=bool(number % 2))
        for number, (x, y) in enumerate(points, 1)
    ]
    content = record(
        *trials,
        objectives=[{"metric": D_B, "direction": direction}],
        constraints=[{"metric": OVER_REFUSAL, "relation": relation, "bound": 0.25}],
        **changed,
    )
    (picture,) = fronts(content)
    return drawn(picture)


POINTS = [(0.1, 0.2), (0.2, 0.6), (0.3, 0.5), (0.4, 0.9), (0.2, 0.1)]


@pytest.mark.parametrize(
    ("relation", "direction", "line", "where"),
    [
        ("<=", "maximize", [(0.1, 0.2), (0.2, 0.6), (0.4, 0.9)], "steps-post"),
        (">=", "maximize", [(0.4, 0.9)], "steps-pre"),
        ("<=", "minimize", [(0.1, 0.2), (0.2, 0.1)], "steps-post"),
        (">=", "minimize", [(0.2, 0.1), (0.3, 0.5), (0.4, 0.9)], "steps-pre"),
    ],
)
def test_the_front_goes_through_what_nothing_beats_each_way(
    relation: str, direction: str, line: list[tuple[float, float]], where: str
) -> None:
    axis = front_of(POINTS, relation, direction)
    found = lines(axis)
    if len(line) == 1:
        assert "none better in both" not in found
    else:
        steps = found["none better in both"]
        assert [tuple(point) for point in steps.get_xydata()] == line
        assert steps.get_drawstyle() == where
    assert set(found[f"bound: {relation} 25%"].get_xdata()) == {0.25}
    assert sum(map(len, dots(axis).values())) == len(POINTS)
    assert axis.get_xlabel().endswith("lower is better" if relation == "<=" else "higher is better")
    assert axis.get_ylabel().endswith("higher is better" if direction == "maximize" else "lower is better")


def test_the_front_of_two_objectives_is_of_trials_within_the_bounds() -> None:
    trials = [
        trial(1, {}, {D_B: 1.0, ASR: 0.5, OVER_REFUSAL: 0.0}),
        trial(2, {}, {D_B: 2.0, ASR: 0.6, OVER_REFUSAL: 0.1}),
        trial(3, {}, {D_B: 3.0, ASR: 0.1, OVER_REFUSAL: 0.9}, feasible=False),
    ]
    rule = {"metric": OVER_REFUSAL, "relation": "<=", "bound": 0.1}
    (picture,) = fronts(record(*trials, objectives=TWO, constraints=[rule], best=[1, 2]))
    axis = drawn(picture)
    assert lines(axis)["none better in both"].get_xydata().tolist() == [[0.5, 1.0], [0.6, 2.0]]
    assert dots(axis) == {"beyond a bound": [[0.1, 3.0]], "best: 2 trials": [[0.5, 1.0], [0.6, 2.0]]}
    assert picture.title == "separation D_B (paper protocol) against attack success (ASR)"


def test_without_a_constraint_one_objective_has_no_front() -> None:
    assert fronts(make_sweep(constraints=[])) == []
    assert fronts(make_sweep(constraints=[{"metric": D_B, "relation": ">=", "bound": 0.2}])) == []


def test_a_bound_on_an_objective_is_drawn_on_its_axis() -> None:
    content = make_sweep(objectives=TWO, constraints=[{"metric": D_B, "relation": ">=", "bound": 0.4}])
    picture = front(content, Aim(ASR, False), Aim(D_B, True))
    assert set(lines(drawn(picture))["bound: >= 0.4"].get_ydata()) == {0.4}


def test_parallel_coordinates_run_from_values_to_what_was_reached() -> None:
    space = {
        "x": "loguniform(0.01, 1)",
        "c": ["u", "v", "w"],
        "y": {"in": "uniform(0, 9)", "when": {"c": "u"}},
        "z": [1],
    }
    content = record(
        trial(1, {"x": 0.01, "c": "u", "y": 2.0, "z": 1}, {D_B: 1.0}),
        trial(2, {"x": 0.1, "c": "v", "z": 1}, {D_B: 3.0}),
        trial(3, {"x": 1.0, "c": "u", "y": 8.0, "z": 1}, {D_B: 2.0}, feasible=False),
        space=space,
        best=[2],
    )
    axis = drawn(parallel(content))
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


def test_parallel_coordinates_minimise_too_and_want_two_parameters() -> None:
    values = [({"x": 1, "y": 5}, {ASR: 0.1}), ({"x": 2, "y": 5.5}, {ASR: 0.4})]
    trials = [trial(number, *given) for number, given in enumerate(values, 1)]
    space = {"x": "randint(0, 9)", "y": "uniform(0, 9)"}
    content = record(*trials, space=space, objectives=TWO[1:])
    paths = [line for line in drawn(parallel(content)).get_lines() if len(line.get_ydata()) == 3]
    assert [to_hex(line.get_color()) for line in paths] == [RAMP[0], RAMP[-1]]
    assert paths[-1].get_xdata() == pytest.approx([0, 0, 0])
    assert parallel(content | {"space": {"x": space["x"]}}) is None


def many_axes() -> dict[str, Any]:
    """Names and categories such as crowd a picture."""
    content = make_sweep(30, objectives=TWO, constraints=[{"metric": OVER_REFUSAL, "relation": "<=", "bound": 0.125}])
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
    space = (
        content["space"] | {"data.format": formats} | {f"p.quite_a_long_name_of_{n}": "uniform(0, 1)" for n in "abcde"}
    )
    for one in content["trials"]:
        added = {key: (one["number"] + 0.3) * 0.618 % 1 for key in space if key.startswith("p.")}
        one["values"] = one["values"] | added | {"data.format": formats[one["number"] * 5 % 9]}
    return content | {"space": space}


def test_no_words_of_a_picture_touch() -> None:
    for picture in [one for several in sweep_pictures(many_axes()).values() for one in several]:
        picture.figure.draw_without_rendering()
        boxes = [(text.get_text(), Text.get_window_extent(text).padded(-1)) for text in written_texts(picture)]
        assert len(boxes) > 5
        for (one, box), (other, another) in combinations(boxes, 2):
            assert not box.overlaps(another), f"{picture.name}: {one!r} on {other!r}"


def written_texts(picture: Picture) -> list[Text]:
    """Without the labels of ticks beyond the ends of their axis, which are not drawn."""
    axis = drawn(picture)
    sides = ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim()))
    shown = [
        tick.label1 for side, (low, high) in sides for tick in side.get_major_ticks() if low <= tick.get_loc() <= high
    ]
    labels = {text for tick in picture.figure.findobj(Tick) for text in (tick.label1, tick.label2)}
    texts = [*(text for text in picture.figure.findobj(Text) if text not in labels), *shown]
    return [text for text in texts if text.get_visible() and text.get_text()]


def test_what_lies_behind_words_has_the_colour_of_the_page() -> None:
    picture = parallel(make_sweep())
    assert picture
    image = svg(picture.figure, "it", "lines")
    assert "var(--page)" in image
    assert PAPER not in image


def test_the_table_is_best_first_and_ends_with_what_did_not_finish() -> None:
    rule = {"metric": OVER_REFUSAL, "relation": "<=", "bound": 0.125}
    content = record(
        unfinished(1, "failed", error="out of memory"),
        trial(2, {"a.x": 0.123456, "b.x": True, "y": None}, {ASR: 0.3, OVER_REFUSAL: 0.05}),
        trial(3, {"a.x": 2.0, "b.x": False, "y": "w"}, {ASR: 0.1, OVER_REFUSAL: 0.5}, feasible=False),
        unfinished(4, "stopped", values={"a.x": 3, "b.x": False}, metrics={ASR: 0.01}),
        trial(5, {"a.x": 1.0, "b.x": True}, {ASR: 0.2, OVER_REFUSAL: 0.1}),
        unfinished(6, "waiting"),
        trial(7, {"a.x": 1.0, "b.x": True}, {}),
        unfinished(8, "stopped"),
        objectives=TWO[1:],
        constraints=[rule],
        space={"a.x": "uniform(0, 4)", "b.x": [True, False], "y": [None, "w"]},
        best=[5],
    )
    header, rows = sweep_table(content)
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


def test_a_metric_with_a_bound_that_is_an_objective_too_has_one_column() -> None:
    header, _ = sweep_table(make_sweep(constraints=[{"metric": D_B, "relation": ">=", "bound": 0.2}]))
    assert header[-1] == "separation D_B (paper protocol) >= 0.2"
    assert sum("separation" in name for name in header) == 1


def test_notes_say_how_the_trials_ended() -> None:
    words = sweep_notes(make_sweep())
    assert words[:3] == [
        "finished: 24 of 26 trials",
        "stopped early by asha: 1",
        "failed: 1 (trial 26): the loss is not finite at update 7",
    ]
    assert "selection bias" in words[3]
    assert "the best of 24 trials" in words[3]
    assert len(words) == 4


def test_notes_of_a_sweep_that_found_nothing() -> None:
    rule = {"metric": OVER_REFUSAL, "relation": "<=", "bound": 0.1}
    beyond = trial(1, {"a.x": 1.0}, {D_B: 0.5, OVER_REFUSAL: 0.2}, feasible=False)
    failed = [unfinished(number, "failed", error=error) for number, error in ((2, "one"), (3, None), (4, "one"))]
    waiting = unfinished(5, "waiting")
    assert sweep_notes(record(beyond, *failed, waiting, constraints=[rule])) == [
        "finished: 1 of 5 trials",
        "not begun: 1",
        "failed: 2 (trial 2, 4): one",
        "failed: 1 (trial 3): no error was noted",
        "none of the finished trials satisfies the constraints: refused: all harmless <= 10%",
    ]


def test_the_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    path, folder = tmp_path / "report.html", tmp_path / "pictures"
    write_sweep_report(path, folder, make_sweep(objectives=TWO))
    content = path.read_text()
    reader = Reader(content)
    assert reader.open == []
    assert "http:" not in content
    assert "https:" not in content
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in reader.tags}
    places = [attributes.get(name) for _, attributes in reader.tags for name in ("src", "href") if name in attributes]
    assert all(place.startswith("#") for place in places)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    kept = sorted(folder.iterdir())
    assert sum(tag == "svg" for tag, _ in reader.tags) == len(kept) == 2 * len(SPACE) + 2
    assert imread(kept[0])[0, 0, :3].min() == 1  # white
    write_sweep_report(path, folder, make_sweep(objectives=TWO))
    assert path.read_text() == content


def test_the_page_gives_the_best_trial_or_the_front() -> None:
    content = make_sweep()
    page = sweep_page(content, NO_PICTURES)
    assert f"<caption>Best: trial {content['best'][0]}</caption>" in page
    assert "separation D_B (paper protocol), token lengths matched" in page
    assert "<dd>24 of 26 trials</dd>" in page
    several = sweep_page(make_sweep(objectives=TWO, best=[3, 9]), NO_PICTURES)
    assert "Pareto front" in several
    assert "Best: trial" not in several


def test_the_page_of_a_sweep_without_an_answer(tmp_path: Path) -> None:
    path, folder = tmp_path / "report.html", tmp_path / "pictures"
    write_sweep_report(path, folder, make_sweep(0, trials=[unfinished(1, "failed", error="a & b")]))
    content = path.read_text()
    assert "No trial has finished." in content
    assert "There is nothing to draw" in content
    assert "a &amp; b" in content
    assert list(folder.iterdir()) == []
    beyond = trial(1, {"a.x": 1.0}, {D_B: 0.5}, feasible=False)
    assert "No finished trial satisfies the constraints." in sweep_page(record(beyond), NO_PICTURES)


def test_the_page_has_what_each_trial_left() -> None:
    content = make_sweep(2, scheduler=None, mlflow=None)
    content["trials"][0]["kept"] = False
    page = sweep_page(content, NO_PICTURES)
    assert "<td>trials/001, not kept</td>" in page
    assert "<td>trials/002</td>" in page
    assert "<td>20</td><td>16</td><td>trials/003</td>" in page
    assert "Traceback" in page
    assert "stopped early: 1" in page
    assert "MLflow" not in page
    assert "loguniform(0.01, 1)" in page


def test_what_is_the_users_is_escaped() -> None:
    raw = "<b>&"
    content = make_sweep(
        3,
        name=raw,
        goal=raw,
        recipe="</pre><script>",
        search=raw,
        space={f"loss.{raw}": [raw, "c"], "y": {"in": [1], "when": {raw: raw}}},
        versions={raw: raw},
        objectives=[{"metric": f"capability/{raw}", "direction": "maximize"}],
    )
    for one in content["trials"]:
        one["values"] = {f"loss.{raw}": raw if one["number"] == 1 else "c"}
        one["metrics"] = {f"capability/{raw}": one["number"] / 7, OVER_REFUSAL: 0.0}
        one["run"] = one["error"] = raw
    content["best"] = [3]
    page = sweep_page(content, sweep_pictures(content))
    assert Reader(page).open == []
    assert raw not in page
    assert "</pre><script>" not in page
    assert "&lt;b&gt;&amp;" in page


def test_a_value_that_is_not_finite_is_not_drawn() -> None:
    content = record(
        trial(1, {"a.x": 1.0}, {D_B: math.inf}), trial(2, {"a.x": 2.0}, {D_B: 0.4}), trial(3, {"a.x": 3.0}, {D_B: None})
    )
    assert sweep_pictures(content) == NO_PICTURES
    assert [row[0] for row in sweep_table(content)[1]] == ["2", "1", "3"]
