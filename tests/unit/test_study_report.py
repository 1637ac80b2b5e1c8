"""The report of a study: its page, and its pictures as matplotlib objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from helpers.report_reader import Reader, drawn
from helpers.study_cells import INTERCEPTS, LOSSES, SLOPE, metrics_of, study
from raydiv.experiments.study.cells import Cell, baseline_cells
from raydiv.experiments.study.figures import COLOURS, FIT_POINTS, cell_pictures, claim_pictures, dots, scatter
from raydiv.experiments.study.measures import ASR, D_B, Measure
from raydiv.experiments.study.page import StudyRecord, write_study_report
from raydiv.experiments.study.regression import claim_test, claim_tests
from raydiv.experiments.study.tables import tables_of
from raydiv.runs.report.drawing import Picture, styled


def record(cells: Sequence[Cell], name: str = "example") -> StudyRecord:
    return {
        "name": name,
        "facts": {"Models": "3", "Losses": ", ".join(LOSSES)},
        "cells": cells,
        "tables": tables_of(cells),
        "claims": claim_tests(cells),
        "notes": ["a note of the study"],
    }


def broken(like: Cell) -> Cell:
    return replace(like, loss="plain", metrics=metrics_of(14.0, 0.05, degenerate=0.7))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    cells = study(noise=0.25)
    write_study_report(folder / "study.html", folder / "pictures", record([*baseline_cells(cells), *cells]))
    return folder / "study.html"


def dots_of(axis: Any) -> list[Any]:
    """The markers of single cells: lines of one point. Those of the legend have none."""
    return [line for line in axis.get_lines() if len(line.get_xdata()) == 1]


def test_scatter_has_every_cell_and_the_fitted_lines() -> None:
    cells = [*study(), broken(study()[-1])]
    with styled():
        picture = scatter(claim_test(cells, D_B, ASR), "claim-1")
    axis = drawn(picture)
    assert axis.get_xscale() == "log"
    points = dots_of(axis)
    assert {(line.get_xdata()[0], line.get_ydata()[0]) for line in points} == {
        (cell.metrics["separation/d_b"], cell.metrics["evaluate/asr"]) for cell in cells
    }
    assert [to_hex(line.get_markeredgecolor()) for line in points[::8][:3]] == list(COLOURS[:3])
    assert [line.get_marker() for line in points[:8]] == [*"os^D"] * 2
    assert [line.get_fillstyle() for line in points[:8]] == ["full"] * 4 + ["bottom"] * 4
    assert [line.get_fillstyle() == "none" for line in points] == [False] * 24 + [True]
    fit = claim_test(cells, D_B, ASR).slope
    assert fit
    lines = [line for line in axis.get_lines() if len(line.get_xdata()) == FIT_POINTS]
    assert len(lines) == 6
    for line, (_, _, intercept) in zip(lines, fit.intercepts, strict=True):
        assert line.get_ydata() == pytest.approx(intercept + fit.value * np.log(line.get_xdata()))
    assert "20% degenerate" in picture.caption


def test_scatter_legend_names_models_losses_and_data_once_for_all_seeds() -> None:
    with styled():
        figure = scatter(claim_test(study(noise=0.1, seeds=3), D_B, ASR), "claim-1").figure
    (axis,) = figure.axes
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*INTERCEPTS, *LOSSES, "CR", "Pref"]
    assert len(dots_of(axis)) == 24  # seeds are averaged


def test_caption_has_slope_and_correlation_or_the_reason_for_none() -> None:
    with styled():
        fitted = scatter(claim_test(study(), D_B, ASR), "claim-1")
        few = scatter(claim_test(study()[:2], D_B, ASR), "claim-1")
    assert f"{100 * SLOPE:+.1f} percentage points" in fitted.caption
    assert "correlation -1.00 (-1.00 to -1.00)" in fitted.caption
    assert few.caption.startswith("2 cells, models: 1. No estimate: 2 cells;")
    assert not [line for line in drawn(few).get_lines() if len(line.get_xdata()) == 2]


def test_a_test_without_cells_has_no_picture() -> None:
    assert claim_pictures([claim_test([], D_B, ASR)]) == []
    assert cell_pictures([]) == []
    assert dots(study(), Measure.of_metric("evaluate/unmeasured")) is None


def rows(picture: Picture) -> dict[str, list[tuple[float, float]]]:
    """The value and height of each drawn point, by marker."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in drawn(picture).get_lines():
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
            points.setdefault(line.get_marker(), []).append((float(x), float(y)))
    return points


def test_dot_plot_has_a_row_for_each_model_and_loss_with_data_side_by_side() -> None:
    cells = study()
    every = [*baseline_cells(cells), *cells, broken(cells[-1])]
    with styled():
        d_b, asr = cell_pictures(every)
    axis = drawn(d_b)
    names = ["none", *LOSSES] * 3
    assert [label.get_text() for label in axis.get_yticklabels()] == [*names, "plain"]
    assert [text.get_text() for text in axis.texts] == list(INTERCEPTS)
    points = rows(d_b)
    assert [value for value, _ in points["o"]] == [
        cell.metrics["separation/d_b"] for cell in cells if cell.data == "CR"
    ]
    heights = [height for _, height in points["o"]]
    assert heights == sorted(heights)
    for (_, first), (_, second) in zip(points["o"], points["s"][:12], strict=True):
        assert second - first == pytest.approx(0.3)
    assert len(points["x"]) == 3
    assert [line.get_fillstyle() for line in axis.get_lines()].count("none") == 1
    assert axis.get_xscale() == "log"
    assert drawn(asr).get_xscale() == "linear"


def test_seeds_are_faint_and_their_mean_is_not() -> None:
    with styled():
        picture = dots(study(noise=0.2, seeds=3), ASR)
    faint = [line for line in drawn(picture).get_lines() if line.get_alpha()]
    assert [len(line.get_xdata()) for line in faint] == [3] * 24


def test_attack_success_by_depth_has_a_line_for_each_loss_on_each_data() -> None:
    def cell(data: str, loss: str, seed: int, direct: float, *by_depth: float) -> Cell:
        depths = {f"evaluate/asr/prefill@{k}": value for k, value in zip((20, 1, 5), by_depth, strict=False)}
        return Cell("Model", data, loss, seed, {"evaluate/asr": direct, **depths}, {}, "")

    cells = [
        cell("-", "none", 0, 0.9, 1.0, 0.95, 0.97),
        cell("CR", "KLDO", 0, 0.1, 0.8, 0.2, 0.6),
        cell("CR", "KLDO", 1, 0.3, 1.0, 0.4, 0.8),
        cell("CR", "DPO", 0, 0.1, 0.8),
        cell("CR-recovery", "KLDO", 0, 0.2, 0.2, 0.2, 0.2),
    ]
    with styled():
        (picture,) = [picture for picture in cell_pictures(cells) if "depth" in picture.name]
    axis = drawn(picture)
    assert [text.get_text() for text in axis.get_xticklabels()] == ["none", "1", "5", "20"]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}
    assert lines == {
        "untrained": ([0, 1, 2, 3], pytest.approx([0.9, 0.95, 0.97, 1.0])),
        "CR, KLDO": ([0, 1, 2, 3], pytest.approx([0.2, 0.3, 0.7, 0.9])),
        "CR, DPO": ([0, 3], pytest.approx([0.1, 0.8])),
        "CR-recovery, KLDO": ([0, 1, 2, 3], pytest.approx([0.2] * 4)),
    }
    assert not any("depth" in picture.name for picture in cell_pictures(study()))


def test_a_separation_of_0_has_no_log_axis() -> None:
    cells = [replace(cell, metrics={**cell.metrics, "separation/d_b": 0.0}) for cell in study()[:4]]
    with styled():
        picture = dots(cells, D_B)
    assert drawn(picture).get_xscale() == "linear"


def test_colours_repeat_with_more_models_than_colours() -> None:
    cells = [replace(cell, model=f"model {n}") for n in range(8) for cell in study()[:4]]
    with styled():
        axis = drawn(scatter(claim_test(cells, D_B, ASR), "claim-1"))
    assert to_hex(dots_of(axis)[-1].get_markeredgecolor()) == COLOURS[1]


def test_page_is_complete_and_loads_nothing(page: Path) -> None:
    content = page.read_text()
    reader = Reader(content)
    assert reader.open == []
    assert "http:" not in content
    assert "https:" not in content
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in reader.tags}
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = sorted((page.parent / "pictures").iterdir())
    assert len(pictures) == sum(tag == "svg" for tag, _ in reader.tags) == 8 + 2
    assert all(imread(path)[0, 0, :3].min() == 1 for path in pictures)  # white


def test_every_table_of_the_study_is_on_the_page(page: Path) -> None:
    content = page.read_text()
    titles = ["Attack success and separation", "Cells", "Average rank", "CR against Pref: paired differences"]
    for heading in (*titles, "Notes", "Runs"):
        assert f"<h2>{heading}</h2>" in content
    reader = Reader(content)
    assert sum(attributes.get("class") == "scroll" for _, attributes in reader.tags) == 6
    assert '<th scope="row">Qwen2.5-1.5B, CR, kldo</th>' in content
    assert '<th scope="row">Qwen2.5-1.5B, -, none</th>' in content
    assert "<strong>" in content
    assert "runs/gemma-2-2b-Pref-kldo-0" in content
    assert "a note of the study" in content


def test_the_same_study_gives_the_same_page(page: Path, tmp_path: Path) -> None:
    cells = study(noise=0.25)
    write_study_report(tmp_path / "again.html", tmp_path / "pictures", record([*baseline_cells(cells), *cells]))
    assert (tmp_path / "again.html").read_text() == page.read_text()


def test_names_are_escaped(tmp_path: Path) -> None:
    markup = {"Qwen2.5-1.5B": "<i>&amp;$x$", "CR": '<u title="', "kldo": "<b>", "Pref": "Pref"}
    cells = [
        replace(
            cell,
            model=markup.get(cell.model, cell.model),
            data=markup[cell.data],
            loss=markup.get(cell.loss, cell.loss),
            metrics={name.replace("AdvBench", "<em>"): value for name, value in cell.metrics.items()},
            where="<s>",
        )
        for cell in study()
    ]
    write_study_report(tmp_path / "study.html", tmp_path / "pictures", record(cells, "<script>alert(1)</script>"))
    content = (tmp_path / "study.html").read_text()
    assert Reader(content).open == []
    for raw in ("<script>", "<i>", "<u ", "<b>", "<em>", "<s>"):
        assert raw not in content
    assert "&lt;i&gt;&amp;amp;$x$" in content
    assert 'aria-label="&lt;u title=&#34; against Pref"' in content


def test_a_study_without_cells_has_a_page(tmp_path: Path) -> None:
    empty: StudyRecord = {"name": "empty", "facts": {}, "cells": [], "tables": [], "claims": [], "notes": []}
    write_study_report(tmp_path / "study.html", tmp_path / "pictures", empty)
    content = (tmp_path / "study.html").read_text()
    assert Reader(content).open == []
    assert "No cells to test" in content
    assert list((tmp_path / "pictures").iterdir()) == []


def test_a_study_of_one_cell_has_a_page(tmp_path: Path) -> None:
    write_study_report(tmp_path / "study.html", tmp_path / "pictures", record(study()[:1]))
    content = (tmp_path / "study.html").read_text()
    assert Reader(content).open == []
    assert "no estimate: 1 cells" in content
    assert "<h2>Average rank</h2>" not in content
