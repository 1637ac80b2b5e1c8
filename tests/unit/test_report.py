"""The report of a run: its pictures, read back from matplotlib's objects, its table and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import chi2

from helpers.made_run import UPDATES, make_run
from helpers.report_reader import Reader, drawn, lines
from raydiv.runs.directory import RunDirectory
from raydiv.runs.measurements import MeasuredValue, SeparationFile
from raydiv.runs.report import figures
from raydiv.runs.report.drawing import INK, MAX_LABEL_LENGTH, Picture, png, styled, svg
from raydiv.runs.report.page import page, write_report
from raydiv.runs.report.table import before_after, measured_rows

TV = {"divergence/name": "TV(D+ || D-)", "divergence/ceiling": 1.0}
NO_PICTURES: dict[str, list[Picture]] = {"training": [], "separation": [], "rewards": []}
PICTURES = {
    *("loss", "divergence", "rewards", "margin", "log-ratio", "gradient", "reward-distribution"),
    *("plane-before", "plane-after", "separation"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    made = make_run(tmp_path_factory.mktemp("runs"))
    write_report(made)
    return made


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that measured nothing but its updates."""
    made = make_run(tmp_path_factory.mktemp("bare"), measured=False)
    write_report(made)
    return made


def separated(plane: list[list[float]], kinds: list[str], harmful: list[bool]) -> SeparationFile:
    return SeparationFile(MeasuredValue(0.5), plane, kinds, harmful, [])


def test_divergence_is_drawn_under_its_name_with_its_ceiling() -> None:
    records = [{"step": 0, "eval/divergence": 0.0}, {"step": 1, "divergence": 0.3, **TV}]
    axis = drawn(figures.divergence(records))
    assert axis.get_title(loc="left") + axis.get_title() == "divergence: TV(D+ || D-)"
    curves = lines(axis)
    assert set(curves["ceiling 1"].get_ydata()) == {1.0}
    assert list(curves["held-out"].get_xdata()) == [0]
    assert list(curves["one update"].get_ydata()) == [0.3]


def test_unbounded_divergence_has_no_line() -> None:
    axis = drawn(figures.divergence([{"step": 1, "divergence": 0.3, "divergence/name": "KL(D+ || D-)"}]))
    assert list(lines(axis)) == ["one update"]


def test_a_single_value_is_drawn_as_a_point() -> None:
    (line,) = drawn(figures.gradient([{"step": 1, "grad_norm": 2.0}])).get_lines()
    assert line.get_marker() == "o"


def test_metrics_that_were_not_logged_give_no_picture() -> None:
    records = [{"step": 1}]
    draws = (figures.loss, figures.divergence, figures.rewards, figures.margin, figures.log_ratio, figures.separation)
    assert [draw(records) for draw in draws] == [None] * len(draws)
    assert figures.reward_distribution({}) is None


def test_separation_is_drawn_at_every_step_that_measured_it() -> None:
    records = [{"step": step, "separation/d_b": step / 10} for step in (0, 5, 10)]
    curves = lines(drawn(figures.separation([*records, {"step": 7, "loss": 1.0}])))
    assert list(curves["all prompts"].get_xdata()) == [0, 5, 10]


def test_ellipse_holds_95_percent_of_the_gaussian() -> None:
    points = np.random.default_rng(0).multivariate_normal([3, -1], [[9, 3], [3, 2]], 20_000)
    centre, (long, short), degrees = figures.ellipse_around(points[:, ::-1])
    assert centre == pytest.approx(points.mean(0)[::-1])
    covariance = np.cov(points[:, ::-1], rowvar=False)
    turn = np.radians(degrees)
    directions = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    spreads = np.array([long, short]) ** 2 / 4 / chi2.ppf(0.95, 2)
    assert directions @ np.diag(spreads) @ directions.T == pytest.approx(covariance)
    along = (points[:, ::-1] - centre) @ directions / (np.array([long, short]) / 2)
    assert ((along**2).sum(1) <= 1).mean() == pytest.approx(0.95, abs=0.005)


def test_an_ellipse_around_one_point_or_equal_points_is_a_point() -> None:
    for points in (np.ones((1, 2)), np.ones((4, 2))):
        centre, axes, _ = figures.ellipse_around(points)
        assert centre == pytest.approx([1, 1])
        assert axes == pytest.approx([0, 0])


def test_each_class_has_an_ellipse_whatever_the_names_of_its_kinds() -> None:
    points = [[0, 0], [1, 1], [0, 2], [9, 9], [8, 7], [9, 5]]
    kinds = ["costs $5 or $6", "b", "b", "safe", "safe", "<b>"]
    report = separated(points, kinds, [True, True, True, False, False, False])
    with styled():
        picture = figures.plane(report, "after")
        axis = drawn(picture)
        assert [patch.center for patch in axis.patches] == [pytest.approx((1 / 3, 1)), pytest.approx((26 / 3, 7))]
        assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == list(dict.fromkeys(kinds))
        image = svg(picture.figure, "it", "after")
    assert "costs $5 or $6" in image
    assert "&lt;b&gt;" in image


def test_rewards_of_both_classes_share_their_bins() -> None:
    axis = drawn(figures.reward_distribution({"aligned": [0.0, 1.0, 1.2], "unaligned": [-3.0, -2.5]}))
    assert [line.get_xdata()[0] for line in axis.get_lines()] == pytest.approx([2.2 / 3, -2.75])
    corners = [set(patch.get_xy()[:, 0].round(9)) for patch in axis.patches]
    assert corners[0] == corners[2]


def test_rewards_of_one_class_alone() -> None:
    axis = drawn(figures.reward_distribution({"aligned": [0.5], "unaligned": []}))
    assert len(axis.get_lines()) == 1


def test_svg_has_the_colour_of_the_page_and_unique_ids() -> None:
    records = [{"step": step, "loss": 1 / step} for step in (1, 2)]
    with styled():
        picture = figures.loss(records)
        image, again, other = (svg(picture.figure, name, "a & b") for name in ("one", "one", "two"))
    assert image == again
    assert "currentColor" in image
    assert INK not in image
    assert 'aria-label="a &amp; b"' in image
    ids = [set(re.findall(r'\bid="([^"]*)"', element)) for element in (image, other)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r"#(one-[\w-]+)", image)) <= ids[0]


def test_png_is_on_white() -> None:
    with styled():
        content = png(figures.loss([{"step": 1, "loss": 2.0}]).figure)
    assert content.startswith(b"\x89PNG")


def test_every_rate_is_in_the_table_after_its_metric(run: RunDirectory) -> None:
    rows = {row.spec.name: row for row in measured_rows(run)}
    names = list(rows)
    assert names.index("evaluate/asr/prefix_injection") == names.index("evaluate/asr") + 1
    assert names.index("separation/length_auc") < names.index("evaluate/asr")
    assert names.index("evaluate/safety/self_harm") < names.index("eval/divergence")
    asr = rows["evaluate/asr"]
    assert (asr.before.value, asr.after.value, asr.totals) == (0.95, 0.18, [100])
    assert asr.after.interval == pytest.approx((0.095, 0.265), abs=1e-3)
    assert rows["separation/d_b"].after.interval == pytest.approx((0.192, 0.48))
    assert rows["evaluate/kl"].after == MeasuredValue(8.1, (6.0, 10.2))
    assert rows["evaluate/kl"].before is None
    assert rows["evaluate/odd"].after == MeasuredValue(7)


def test_the_table_of_the_terminal_has_registered_metrics_and_attacks_alone(
    run: RunDirectory, bare: RunDirectory
) -> None:
    table = {label: ends for label, *ends in before_after(run)}
    assert table["refused: harmful"] == ["1%", "82%"]
    assert table["divergence estimate, held-out examples"] == ["0.000", "0.418"]
    assert table["attack success (ASR): prefix injection"] == ["97%", "47%"]
    assert "odd" not in table
    assert not any("self harm" in label for label in table)
    assert before_after(bare) == []


def test_a_metric_that_was_measured_once(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    answers = made.evaluation / "before.json"
    content = json.loads(answers.read_text())
    del content["rates"]["evaluate/asr/prefix_injection"], content["odd"]
    answers.write_text(json.dumps(content))
    rows = {row.spec.name: row for row in measured_rows(made)}
    assert rows["evaluate/asr/prefix_injection"].before is None
    assert rows["evaluate/odd"].before is None
    assert "<td>&ndash; <small></small></td>" in page(made, NO_PICTURES)


def test_pictures_are_written_as_files_too(run: RunDirectory, bare: RunDirectory) -> None:
    assert {path.stem for path in run.pictures.iterdir()} == PICTURES
    for path in run.pictures.iterdir():
        image = imread(path)
        assert image.shape[1] > 900
        assert image[0, 0, :3].min() == 1  # white
    measured_only = {"plane-before", "plane-after", "separation", "reward-distribution"}
    assert {path.stem for path in bare.pictures.iterdir()} == PICTURES - measured_only


def test_page_is_well_formed_and_loads_nothing(run: RunDirectory) -> None:
    content = run.report.read_text()
    reader = Reader(content)
    assert reader.open == []
    assert "http:" not in content
    assert "https:" not in content
    places = [attributes.get(name) for _, attributes in reader.tags for name in ("src", "href") if name in attributes]
    assert all(place.startswith("#") for place in places)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in reader.tags}
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert sum(tag == "svg" for tag, _ in reader.tags) == len(PICTURES)


def test_page_names_the_keys_of_what_was_not_measured(bare: RunDirectory, tmp_path: Path) -> None:
    content = bare.report.read_text()
    assert all(f"<code>{key}</code>" in content for key in ("separation.prompts", "evaluate.prompts", "data.eval"))
    assert '<table class="measured">' not in content
    assert "no held-out examples" in content
    unreferenced = make_run(tmp_path, "loss.type=simpo", "loss.mix=null", "data.eval=0.1", measured=False)
    write_report(unreferenced)
    assert "no reference to count rewards from" in unreferenced.report.read_text()
    assert not (unreferenced.pictures / "log-ratio.png").exists()


def test_the_same_run_gives_the_same_report(run: RunDirectory) -> None:
    content = run.report.read_text()
    write_report(run)
    assert run.report.read_text() == content


def test_content_of_files_is_escaped(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    result = json.loads(made.result.read_text())
    result["name"] = "<script>alert(1)</script>"
    result["versions"]["<i>"] = "&amp;"
    made.result.write_text(json.dumps(result))
    answers = made.evaluation / "after.json"
    answers.write_text(answers.read_text().replace("self_harm", "<u>").replace("string rules", "<em>rules"))
    made.recipe.write_text(made.recipe.read_text() + "# </pre><b>\n")
    content = page(made, NO_PICTURES)
    assert Reader(content).open == []
    for raw in ("<script>", "<i>", "<u>", "<em>", "</pre><b>"):
        assert raw not in content
    assert "&lt;script&gt;" in content
    assert "&amp;amp;" in content


def test_prompts_and_answers_are_shown_only_where_the_run_kept_them(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    verdict = {"id": "0", "kind": "harmful", "verdict": "refused"}
    texts = {"prompt": "How <so>?", "answer": "I can't & won't."}
    turns = {"prompt": [{"role": "user", "content": "Hello"}], "answer": "Hi"}
    write_answers(made, "before", [verdict | texts])
    write_answers(made, "after", [verdict | texts, verdict | turns])
    content = page(made, NO_PICTURES)
    assert Reader(content).open == []
    assert content.count("I can&#39;t &amp; won&#39;t.") == 2
    assert content.count("How &lt;so&gt;?") == 1
    assert "user: Hello" in content
    for when in ("before", "after"):
        write_answers(made, when, [verdict])
    assert "<h2>Answers</h2>" not in page(made, NO_PICTURES)


def write_answers(run: RunDirectory, when: str, answers: list[dict[str, Any]]) -> None:
    lines = [json.dumps(answer) + "\n" for answer in answers]
    (run.evaluation / f"{when}.answers.jsonl").write_text("".join(lines))


def test_updates_are_counted(run: RunDirectory) -> None:
    assert f"<dd>{UPDATES} of {UPDATES}</dd>" in run.report.read_text()


def test_kinds_beyond_the_colours_are_drawn_together() -> None:
    points = [[n, n] for n in range(16)]
    picture = figures.plane(separated(points, [*"abcdefgh"] * 2, [True] * 8 + [False] * 8), "after")
    (legend,) = picture.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "7 other kinds", "a", "b", "6 other kinds"]
    assert sum(len(cloud.get_offsets()) for cloud in drawn(picture).collections) == 16


def test_a_long_label_is_cut_and_a_long_title_is_wrapped() -> None:
    name = "JS(D+ x D- || D- x D+) of the pairs as they were before labels flipped with probability e"
    axis = drawn(figures.divergence([{"step": 1, "divergence": 0.3, "divergence/name": name}]))
    assert axis.get_title(loc="left").count("\n") + axis.get_title().count("\n") == 2
    picture = figures.plane(separated([[0, 0], [1, 2]], ["k" * 90, "b"], [True, False]), "after")
    longest = picture.figure.legends[0].get_texts()[0].get_text()
    assert len(longest) == MAX_LABEL_LENGTH
    assert longest.endswith("…")
