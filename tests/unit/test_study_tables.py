"""The tables of a study against values by hand, and its regression against numpy's and scipy's."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress, pearsonr, permutation_test, ttest_1samp, ttest_rel, wilcoxon

from helpers.study_cells import INTERCEPTS, LOSSES, MATCHED, SLOPE, metrics_of, study
from raydiv.experiments.study import regression
from raydiv.experiments.study.cells import BASE, NO_DATA, Cell, baseline_cells, grouped_cells
from raydiv.experiments.study.measures import ASR, D_B, D_B_LENGTH_MATCHED, MAHALANOBIS, attack_success, measures
from raydiv.experiments.study.regression import (
    ClaimTest,
    SlopeEstimate,
    claim_test,
    claim_tests,
    correlation_of,
    prediction_of,
    slope_of,
)
from raydiv.experiments.study.regression_table import claim_table
from raydiv.experiments.study.table_io import Table, TableCell, TableRow, markdown, write_tables
from raydiv.experiments.study.tables import against, cell_table, paired, rank_table, tables_of

NO_ESTIMATE = "no estimate: {} cells; with an intercept for each model and data, at least {} are needed"


def cell_of(model: str, data: str, loss: str, seed: int = 0, **metrics: float) -> Cell:
    """``asr=0.1`` is evaluate/asr, ``d_b=1`` separation/d_b; a name with a slash is itself."""
    short = {"asr": "evaluate/asr", "d_b": "separation/d_b", "degenerate": "evaluate/degenerate"}
    named = {short.get(name, name): value for name, value in metrics.items()}
    return Cell(model, data, loss, seed, named, {}, "")


def column(table: Table, name: str) -> list[str]:
    """The figures of a column in words."""
    place = table.header.index(name) - table.keys
    return [str(row.figures[place]) for row in table.rows]


def best(table: Table, name: str) -> list[tuple[str, ...]]:
    """The rows whose figure of a column is marked as best."""
    place = table.header.index(name) - table.keys
    return [row.words for row in table.rows if row.figures[place].best]


def test_base_cell_is_the_mean_of_the_metrics_before_training() -> None:
    cells = [
        replace(cell_of("m", "CR", "dpo"), before={"evaluate/asr": 0.8, "evaluate/kl": 1.0}),
        replace(cell_of("m", "CR", "kto"), before={"evaluate/asr": 0.9}),
        replace(cell_of("n", "CR", "kto"), before={"evaluate/asr": 0.5}),
    ]
    first, second = baseline_cells(cells)
    assert (first.model, first.data, first.loss, first.seed) == ("m", NO_DATA, BASE, 0)
    assert first.metrics == first.before == {"evaluate/asr": pytest.approx(0.85), "evaluate/kl": 1.0}
    assert (second.model, second.metrics) == ("n", {"evaluate/asr": 0.5})
    assert baseline_cells([*cells, first, second]) == [replace(first), second]
    assert baseline_cells([]) == []


def test_cells_are_grouped_by_model_with_the_base_cell_first() -> None:
    cells = [cell_of("m", "CR", "b", 1), cell_of("n", "CR", "b"), cell_of("m", "Pref", "a"), cell_of("m", "CR", "b", 0)]
    groups = grouped_cells([*cells, *baseline_cells(cells)])
    assert list(groups) == [
        ("m", NO_DATA, BASE),
        ("m", "CR", "b"),
        ("m", "Pref", "a"),
        ("n", NO_DATA, BASE),
        ("n", "CR", "b"),
    ]
    assert [cell.seed for cell in groups["m", "CR", "b"]] == [0, 1]
    assert grouped_cells([]) == {}


def test_measures_are_those_that_a_cell_has() -> None:
    known = measures(study())
    assert [measure.label for measure in known] == [
        "D_B",
        "D_B length-matched",
        "D_B shuffled",
        "silhouette",
        "ASR",
        "ASR prefill",
        "ASR AdvBench",
        "ASR Salad-Data:base_set",
        "over-refusal",
        "over-refusal XSTest",
        "safe answers",
        "degenerate",
        "toxicity",
        "KL",
        "perplexity",
        "gsm8k, exact_match, strict-match",
    ]
    assert {measure.label for measure in known if not measure.better} == {"D_B shuffled", "KL", "perplexity"}
    assert [measure.label for measure in attack_success(study())] == [
        "ASR",
        "ASR prefill",
        "ASR AdvBench",
        "ASR Salad-Data:base_set",
    ]
    assert measures([]) == []


def test_capability_errors_are_better_when_lower() -> None:
    names = ("capability/wikitext/word_perplexity", "capability/mmlu/acc", "capability/perplexity/acc")
    known = measures([cell_of("m", "CR", "dpo", **dict.fromkeys(names, 1.0))])
    assert {measure.metric: measure.better for measure in known} == dict(zip(names, (-1, 1, 1), strict=True))


def test_a_number_that_is_not_finite_counts_as_missing() -> None:
    missing = cell_of(
        "m", "CR", "dpo", asr=math.nan, d_b=math.inf, **{"evaluate/toxicity/a": 0.5, "evaluate/toxicity/b": 0.1}
    )
    assert ASR.value_in(missing) is None
    assert D_B.value_in(missing) is None
    (toxicity,) = measures([missing])
    assert toxicity.value_in(missing) == pytest.approx(0.3)


def test_cells_show_means_and_deviations_over_seeds_and_mark_the_best() -> None:
    cells = [cell_of("m", "CR", "dpo", seed, asr=value, d_b=1.0) for seed, value in enumerate((0.1, 0.2, 0.3))]
    cells += [cell_of("m", "CR", "kto", 0, asr=0.4, d_b=2.0), cell_of("m", "CR", "kto", 1, asr=0.4)]
    cells += [cell_of("m", "Pref", "dpo", asr=0.5), cell_of("m", "Pref", "kto", asr=0.5)]
    base = Cell("m", NO_DATA, BASE, 0, {"evaluate/asr": 0.9}, {}, "")
    table = cell_table([*cells, base])
    assert table.header == ("model", "data", "loss", "D_B", "ASR")
    assert [row.words for row in table.rows] == [
        ("m", "-", "none"),
        ("m", "CR", "dpo"),
        ("m", "CR", "kto"),
        ("m", "Pref", "dpo"),
        ("m", "Pref", "kto"),
    ]
    assert column(table, "ASR") == ["90.0%", "20.0% ± 10.0%", "40.0% ± 0.0%", "50.0%", "50.0%"]
    assert column(table, "D_B") == ["-", "1.000 ± 0.000", "2.000", "-", "-"]
    # both losses on Pref are equal, and a base cell has no other loss beside it
    assert best(table, "ASR") == [("m", "CR", "dpo")]
    assert best(table, "D_B") == [("m", "CR", "kto")]
    (note,) = table.notes
    assert "1 to 3" in note
    assert cell_table(study()).notes == ()


def test_a_broken_model_is_never_marked() -> None:
    cells = [cell_of("m", "CR", "dpo", asr=0.3, d_b=1.0, degenerate=0.0), cell_of("m", "CR", "kto", asr=0.4, d_b=2.0)]
    table = cell_table([*cells, cell_of("m", "CR", "plain", asr=0.0, d_b=9.0, degenerate=0.5)])
    assert best(table, "ASR") == [("m", "CR", "dpo")]
    assert best(table, "D_B") == [("m", "CR", "kto")]
    (note,) = table.notes
    assert "20% degenerate" in note
    assert note.endswith(": 1")


def test_measures_without_a_good_end_are_never_marked() -> None:
    table = cell_table(study())
    assert {name for name in table.header[3:] if not best(table, name)} == {
        *("D_B shuffled", "KL", "perplexity"),
        "degenerate",  # the same everywhere
    }


def test_ranks_by_hand() -> None:
    cells = [
        *(
            cell_of("m", "CR", loss, asr=asr, d_b=d_b)
            for loss, asr, d_b in (("a", 0.1, 3), ("b", 0.1, 2), ("c", 0.5, 1))
        ),
        *(
            cell_of("n", "CR", loss, asr=asr, d_b=d_b)
            for loss, asr, d_b in (("a", 0.3, 1), ("b", 0.2, 2), ("c", 0.1, 3))
        ),
        *(cell_of("n", "Pref", loss, asr=0.0, d_b=9) for loss in "ab"),
        Cell("n", NO_DATA, BASE, 0, {"evaluate/asr": 0.0}, {}, ""),
    ]
    cells[3].metrics["evaluate/degenerate"] = 0.1  # type: ignore[index]
    table = rank_table(cells)
    assert table.header == ("loss", "safety", "D_B", "ASR", "degenerate")
    assert [row.words for row in table.rows] == [("a",), ("b",), ("c",)]
    # attack success: (1.5 + 3) / 2, (1.5 + 2) / 2, (3 + 1) / 2
    assert [row.figures[2].value for row in table.rows] == [2.25, 1.75, 2.0]
    assert [row.figures[1].value for row in table.rows] == [2.0, 2.0, 2.0]
    assert [row.figures[0].value for row in table.rows] == [2.25, 1.75, 2.0]
    assert column(table, "degenerate") == ["-", "-", "-"]
    assert best(table, "ASR") == best(table, "safety") == [("b",)]
    assert best(table, "D_B") == []
    assert table.notes == (
        "safety: the mean of the ranks by ASR",
        "left out: m on CR by degenerate, which lacks a, b, c",
        "left out: n on CR by degenerate, which lacks b, c",
        "left out: n on Pref by D_B, ASR, which lacks c",
        "left out: n on Pref by degenerate, which lacks a, b, c",
    )


def test_a_missing_loss_is_noted_once_for_all_measures() -> None:
    cells = [cell for cell in study() if (cell.model, cell.data, cell.loss) != ("gemma-2-2b", "CR", "kto")]
    (_, note) = rank_table(cells).notes
    assert note == "left out: gemma-2-2b on CR, which lacks kto"


def test_safety_rank_is_the_mean_over_its_measures() -> None:
    table = rank_table(study())
    assert [str(row.figures[0]) for row in table.rows] == ["3.62", "2.88", "2.12", "1.38"]
    assert table.notes == ("safety: the mean of the ranks by ASR, ASR prefill, degenerate, toxicity",)
    assert rank_table([cell for cell in study() if cell.loss == "dpo"]).rows == ()


def test_two_kinds_of_data_are_compared() -> None:
    cells = [
        cell_of("m", "CR", "dpo", 0, asr=0.1),
        cell_of("m", "CR", "dpo", 1, asr=0.3),
        cell_of("m", "Pref", "dpo", asr=0.5),
        cell_of("m", "CR", "kto", asr=0.5, d_b=2.0),
        cell_of("m", "Pref", "kto", asr=0.4),
        cell_of("m", "Pref", "bco", asr=0.7),
    ]
    table = against(cells, "CR", "Pref")
    assert table.title == "CR against Pref"
    assert [row.words[1:] for row in table.rows] == [
        *(("dpo", "CR"), ("dpo", "Pref"), ("dpo", "difference")),
        *(("kto", "CR"), ("kto", "Pref"), ("kto", "difference")),
    ]
    assert column(table, "ASR") == ["20.0% ± 14.1%", "50.0%", "-30.0%", "50.0%", "40.0%", "+10.0%"]
    assert column(table, "D_B") == ["-", "-", "-", "2.000", "-", "-"]
    (asr,) = paired(cells, "CR", "Pref").rows
    assert asr.words == ("ASR",)
    expected = ttest_rel([0.2, 0.5], [0.5, 0.4]).confidence_interval()
    values = [figure.value for figure in asr.figures]
    assert values[:4] == pytest.approx([2, 0.35, 0.45, -0.1])
    assert values[4:6] == pytest.approx([expected.low, expected.high])
    assert values[6] is None


def test_paired_differences_have_t_intervals_and_p_of_wilcoxon() -> None:
    cells = study(noise=0.3)
    rows = {row.words[0]: [figure.value for figure in row.figures] for row in paired(cells, "CR", "Pref").rows}
    asr = {cell.key: cell.metrics["evaluate/asr"] for cell in cells}
    differences = [asr[m, "CR", loss] - asr[m, "Pref", loss] for m in INTERCEPTS for loss in LOSSES]
    interval = ttest_1samp(differences, 0).confidence_interval()
    assert rows["ASR"][0] == 12
    assert rows["ASR"][3:] == pytest.approx(
        [np.mean(differences), interval.low, interval.high, wilcoxon(differences).pvalue]
    )
    # all differences are 0: Wilcoxon's test has nothing to rank
    assert rows["degenerate"][3:] == [0.0, 0.0, 0.0, None]


def test_one_pair_has_no_interval() -> None:
    (row,) = paired([cell_of("m", "CR", "a", asr=0.1), cell_of("m", "Pref", "a", asr=0.2)], "CR", "Pref").rows
    assert [figure.value for figure in row.figures[4:]] == [None, None, None]


def test_every_two_kinds_of_data_are_compared() -> None:
    titles = [table.title for table in tables_of(study())]
    assert titles == ["Cells", "Average rank", "CR against Pref", "CR against Pref: paired differences"]
    three = [*study(), *(replace(cell, data="Own") for cell in study()[:8])]
    assert {"CR against Own", "Pref against Own", "CR against Pref"} < {table.title for table in tables_of(three)}
    assert tables_of([]) == []
    assert [table.title for table in tables_of([cell_of("m", "CR", "dpo", asr=0.1)])] == ["Cells"]


def dummies(cells: list[Cell], separation: str, asr: str) -> tuple[float, float]:
    """Slope and partial correlation, by numpy with an indicator for each model and data."""
    x = np.log([cell.metrics[separation] for cell in cells])
    y = np.array([cell.metrics[asr] for cell in cells])
    blocks = sorted({(cell.model, cell.data) for cell in cells})
    indicators = np.array([[(cell.model, cell.data) == block for block in blocks] for cell in cells], dtype=float)
    coefficients = np.linalg.lstsq(np.column_stack([x, indicators]), y, rcond=None)[0]
    left = [values - indicators @ np.linalg.lstsq(indicators, values, rcond=None)[0] for values in (x, y)]
    return float(coefficients[0]), float(pearsonr(*left).statistic)


def intercepts(claim: ClaimTest) -> dict[tuple[str, str], float]:
    assert claim.slope
    return {(model, data): value for model, data, value in claim.slope.intercepts}


def test_regression_recovers_the_known_slope() -> None:
    claim = claim_test(study(), D_B, ASR)
    assert claim.slope
    assert claim.correlation
    assert claim.slope.value == pytest.approx(SLOPE)
    assert claim.slope.interval == pytest.approx((SLOPE, SLOPE), abs=1e-6)
    assert (claim.slope.p, claim.slope.p_losses) == (pytest.approx(1e-4), pytest.approx(1 / 24))
    expected = {(model, data): value for model, value in INTERCEPTS.items() for data in ("CR", "Pref")}
    assert intercepts(claim) == pytest.approx(expected)
    assert claim.correlation.value == pytest.approx(-1)
    assert claim.correlation.interval == pytest.approx((-1, -1))
    assert claim.notes == ()
    matched = intercepts(claim_test(study(), D_B_LENGTH_MATCHED, ASR))
    assert matched == pytest.approx({key: value - SLOPE * math.log(MATCHED) for key, value in expected.items()})


@pytest.mark.parametrize("asr", ["evaluate/asr", "evaluate/asr/prefill", "evaluate/asr_set/AdvBench"])
def test_estimates_equal_least_squares_with_indicators(asr: str) -> None:
    cells = study(noise=0.4)
    claims = {
        (claim.separation.metric, claim.asr.metric): claim for claim in claim_tests([*cells, *baseline_cells(cells)])
    }
    assert len(claims) == 8
    claim = claims["separation/d_b", asr]
    slope, r = dummies(cells, "separation/d_b", asr)
    assert claim.slope
    assert claim.correlation
    assert claim.slope.value == pytest.approx(slope)
    assert (claim.correlation.value, claim.correlation.cells) == (pytest.approx(r), 24)


def test_each_loss_is_predicted_from_all_others() -> None:
    points = frame_of(claim_test(study(noise=0.4), D_B, ASR))
    errors = variations = 0.0
    for loss in sorted(set(points["loss"])):
        seen, left = points[points["loss"] != loss], points[points["loss"] == loss]
        blocks = sorted({*zip(points["model"], points["data"], strict=True)})

        def design(rows: pd.DataFrame, blocks: list[tuple[str, str]] = blocks) -> np.ndarray:
            of = list(zip(rows["model"], rows["data"], strict=True))
            return np.array([[x, *(block == own for block in blocks)] for x, own in zip(rows["x"], of, strict=True)])

        fitted, mean = (
            np.linalg.lstsq(columns(design(seen)), seen["asr"], rcond=None)[0]
            for columns in (lambda matrix: matrix, lambda matrix: matrix[:, 1:])
        )
        errors += float(np.square(left["asr"] - design(left) @ fitted).sum())
        variations += float(np.square(left["asr"] - design(left)[:, 1:] @ mean).sum())
    found = prediction_of(points)
    assert found is not None
    assert found.interval is not None
    assert found.r2 == pytest.approx(1 - errors / variations)
    assert found.interval[0] < found.r2 < found.interval[1] < 1
    exact = claim_test(study(), D_B, ASR).prediction
    assert exact is not None
    assert exact.r2 == pytest.approx(1)
    assert claim_test(study()[:3], D_B, ASR).prediction is None


def test_an_unrelated_measure_predicts_worse_than_the_mean() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(200):
        x, y = generator.normal(size=(2, 20))
        estimate = prediction_of(frame(x, y, np.arange(20) // 5, np.arange(20) % 5))
        assert estimate is not None
        found.append(estimate.r2)
    assert np.mean(found) < 0
    assert np.mean(np.array(found) > 0.2) < 0.1


def test_the_claim_is_also_tested_on_depth_where_measured() -> None:
    cells = [
        replace(cell, metrics={**cell.metrics, "evaluate/depth/half": float(n % 7 + 1)})
        for n, cell in enumerate(study(noise=0.4))
    ]
    claims = claim_tests(cells)
    assert [claim.separation.label for claim in claims[:3]] == ["D_B", "D_B length-matched", "KL half at token"]
    slope, r = dummies(cells, "evaluate/depth/half", "evaluate/asr")
    assert claims[2].slope is not None
    assert claims[2].correlation is not None
    assert (claims[2].slope.value, claims[2].correlation.value) == pytest.approx((slope, r))


def test_seeds_are_averaged_first() -> None:
    cells = study(noise=0.4, seeds=3)
    claim = claim_test(cells, D_B, ASR)
    assert len(claim.points) == 24
    first = [cell for cell in cells if cell.key == cells[0].key]
    assert claim.points[0].separation == pytest.approx(np.mean([cell.metrics["separation/d_b"] for cell in first]))
    assert claim.points[0].asr == pytest.approx(np.mean([cell.metrics["evaluate/asr"] for cell in first]))


def frame_of(claim: ClaimTest) -> pd.DataFrame:
    """The points of a test on the logarithm of its measure."""
    points = pd.DataFrame([asdict(point) for point in claim.points])
    return points.assign(x=np.log(points["separation"]))


def frame(x: np.ndarray, y: np.ndarray, block: np.ndarray, loss: np.ndarray) -> pd.DataFrame:
    """Points of the regression: ``block`` is the model, and the data are one."""
    return pd.DataFrame({"model": block, "data": "CR", "loss": loss, "x": x, "asr": y})


def test_p_is_that_of_scipys_permutation_test() -> None:
    generator = np.random.default_rng(2)
    x = generator.normal(size=6)
    y = 0.5 * x + generator.normal(size=6)
    expected = permutation_test(
        (x,), lambda values: abs(np.corrcoef(values, y)[0, 1]), permutation_type="pairings", alternative="greater"
    ).pvalue
    slope = slope_of(frame(x, y, np.zeros(6, int), np.arange(6)))
    assert slope.p_losses == pytest.approx(expected)  # one block: exchanging its losses is exchanging losses
    assert slope.p == pytest.approx(expected, abs=0.015)


Draw = Callable[[np.random.Generator], pd.DataFrame]


def null(models: int, data: int, losses: int, seeds: int = 1, loss_effect: float = 0.0) -> Draw:
    """Separation and attack success that have nothing to do with each other, with effects of sd 1 of models and data
    on both, noise of sd 1, and effects of losses.
    """

    def draw(generator: np.random.Generator) -> pd.DataFrame:
        shape = (2, models, data, losses)
        effects = generator.normal(size=(2, models, 1, 1)) + generator.normal(size=(2, 1, data, 1))
        values = effects + loss_effect * generator.normal(size=(2, 1, 1, losses)) + generator.normal(size=shape)
        values = values + generator.normal(size=(seeds, *shape)).mean(axis=0)
        model, kind, loss = (axis.ravel() for axis in np.indices(shape[1:]))
        return pd.DataFrame(
            {"model": model, "data": kind, "loss": loss, "x": values[0].ravel(), "asr": values[1].ravel()}
        )

    return draw


def rejected(draw: Draw, p_of: Callable[[SlopeEstimate], float | None], runs: int = 400) -> float:
    """The share of simulated studies that the test at 5% rejects."""
    generator = np.random.default_rng(0)
    return float(np.mean([float(p_of(slope_of(draw(generator))) or 1.0) < 0.05 for _ in range(runs)]))


@pytest.mark.parametrize("design", [null(1, 2, 4), null(5, 2, 4), null(5, 2, 4, seeds=3), null(1, 1, 6)])
def test_unrelated_cells_are_rejected_in_5_percent(design: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "RESAMPLES", 199)
    monkeypatch.setattr(regression._Exchanged, "interval", lambda self, estimate: None)
    assert 0.03 <= rejected(design, lambda slope: slope.p) <= 0.07


def test_losses_that_act_alike_everywhere_are_exchanged_as_wholes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "RESAMPLES", 199)
    monkeypatch.setattr(regression._Exchanged, "interval", lambda self, estimate: None)
    design = null(5, 2, 6, loss_effect=2.0)
    assert 0.03 <= rejected(design, lambda slope: slope.p_losses) <= 0.07
    assert rejected(design, lambda slope: slope.p, runs=200) > 0.15


def test_the_interval_of_the_slope_covers_it_in_95_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "RESAMPLES", 399)
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        points = null(2, 2, 5)(generator)
        points["asr"] += 0.7 * points["x"]
        low, high = slope_of(points).interval
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 200 <= 0.99


def test_the_bootstrap_of_the_correlation_covers_it_with_many_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "RESAMPLES", 399)
    generator, covered, rho = np.random.default_rng(0), 0, -0.6
    for _ in range(200):
        points = null(2, 2, 12)(generator)
        points["asr"] += (
            rho / math.sqrt(1 - rho**2) * (points["x"] - points.groupby(["model", "data"])["x"].transform("mean"))
        )
        low, high = correlation_of(points).interval
        covered += low <= rho <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_too_few_permutations_give_no_interval() -> None:
    points = frame(
        np.array([1.0, 2.0, 4.0, 1.0, 3.0]),
        np.array([0.3, 0.2, 0.1, 0.4, 0.3]),
        np.array([0, 0, 0, 1, 1]),
        np.array([0, 1, 2, 0, 1]),
    )
    slope = slope_of(points)
    assert slope.interval is None
    assert slope.p_losses is None  # the blocks have different losses
    assert slope.p > 0.05


def test_cells_without_a_log_of_the_separation_are_left_out_and_counted() -> None:
    cells = study(noise=0.4)
    incomplete = [cell_of("gemma-2-2b", "CR", f"x{n}", asr=0.1, d_b=d_b) for n, d_b in enumerate((0.0, -1.0, math.nan))]
    incomplete += [cell_of("gemma-2-2b", "CR", "y", asr=0.1), cell_of("gemma-2-2b", "CR", "z", d_b=1.0)]
    claim = claim_test([*cells, *incomplete], D_B, ASR)
    assert claim.slope == claim_test(cells, D_B, ASR).slope
    assert claim.notes == (
        "left out, D_B missing or not above 0: 4 of 29 cells",
        "left out, ASR missing: 1 of 29 cells",
    )


def test_a_separation_below_chance_is_not_left_out() -> None:
    cells = [cell_of("m", "CR", f"x{n}", asr=0.1 * n) for n in range(5)]
    values = (-4.0, 0.0, 4.0, 16.0, 36.0)
    cells = [
        replace(cell, metrics={**cell.metrics, MAHALANOBIS.metric: value})
        for cell, value in zip(cells, values, strict=True)
    ]
    claim = claim_test(cells, MAHALANOBIS, ASR)
    assert [point.separation for point in claim.points] == list(values)
    expected = linregress([-2, 0, 2, 4, 6], [0.0, 0.1, 0.2, 0.3, 0.4])
    assert claim.slope
    assert claim.slope.value == pytest.approx(expected.slope)
    assert claim.notes == ()


def test_no_estimate_from_too_few_cells_or_without_variation() -> None:
    def reason(claim: ClaimTest) -> str:
        assert claim.slope is claim.correlation is claim.without_one is claim.whole is None
        return claim.notes[-1]

    few = study()[:2] + study()[8:10]
    assert reason(claim_test(few, D_B, ASR)) == NO_ESTIMATE.format(4, 5)
    assert reason(claim_test([], D_B, ASR)) == NO_ESTIMATE.format(0, 4)
    same = "no estimate: {} is the same in all cells of each model and data"
    constant = [cell_of("m", "CR", str(n), d_b=2.0, asr=n / 9) for n in range(6)]
    assert reason(claim_test(constant, D_B, ASR)) == same.format("separation")
    safe = [cell_of(model, "CR", str(n), d_b=1.0 + n, asr=0.1) for model in "mn" for n in range(4)]
    assert reason(claim_test(safe, D_B, ASR)) == same.format("attack success")


def test_broken_models_are_left_out_of_the_second_correlation() -> None:
    cells = study(noise=0.4)
    broken = [cell_of(model, "CR", "plain", d_b=50.0, asr=0.9, degenerate=0.85) for model in INTERCEPTS]
    claim, without = claim_test([*cells, *broken], D_B, ASR), claim_test(cells, D_B, ASR)
    assert claim.whole == without.correlation == without.whole
    assert claim.correlation
    assert without.correlation
    assert claim.correlation.value > without.correlation.value
    assert len(claim.points) == 27
    assert all(point.broken == (point.loss == "plain") for point in claim.points)
    assert claim.notes == ("broken models (more than 20% degenerate answers): 3 of 27 cells",)


def test_range_of_the_correlation_without_each_loss_and_each_data_set() -> None:
    cells = study(noise=0.4)
    claims = [claim_test([cell for cell in cells if cell.loss != loss], D_B, ASR) for loss in LOSSES]
    claims += [claim_test([cell for cell in cells if cell.data != data], D_B, ASR) for data in ("CR", "Pref")]
    values = [claim.correlation.value for claim in claims if claim.correlation]
    assert len(values) == 6
    assert claim_test(cells, D_B, ASR).without_one == pytest.approx((min(values), max(values)))
    assert claim_test([cell for cell in cells if cell.loss == "dpo"], D_B, ASR).without_one is None


def test_table_of_claims() -> None:
    table = claim_table(claim_tests(study(noise=0.4)))
    assert len(table.rows) == 8
    assert {len(row.words) + len(row.figures) for row in table.rows} == {len(table.header)} == {18}
    assert len(set(table.header)) == len(table.header)
    assert table.rows[0].words == ("ASR", "log of D_B")
    few = claim_table(claim_tests(study()[:3]))
    assert {str(figure) for row in few.rows for figure in row.figures} == {"3", "-"}
    assert few.notes[1:] == (NO_ESTIMATE.format(3, 4),)
    complete = study()[0]
    metrics = {name: value for name, value in complete.metrics.items() if name != D_B.metric}
    lacking = replace(complete, metrics=metrics)
    claims = [claim_test([lacking], D_B, ASR), claim_test([complete], D_B_LENGTH_MATCHED, ASR)]
    assert claim_table(claims).notes[1:] == (
        "ASR on D_B: left out, D_B missing or not above 0: 1 of 1 cells",
        f"ASR on D_B: {NO_ESTIMATE.format(0, 4)}",
        f"ASR on D_B length-matched: {NO_ESTIMATE.format(1, 4)}",
    )
    assert claim_table([]).rows == ()


def test_keys_of_a_regression_in_study_json() -> None:
    record = claim_test(study(noise=0.4), D_B, ASR).as_json()
    assert record.keys() == {
        "separation", "asr", "points", "scale", "slope", "correlation", "prediction", "without_one", "whole", "notes",
    }  # fmt: skip
    assert record["separation"] == {
        "metric": "separation/d_b", "label": "D_B", "form": "{:.3f}", "better": 1, "safety": False, "averaged": False,
    }  # fmt: skip
    assert record["asr"]["safety"]
    assert record["slope"].keys() == {"value", "interval", "p", "p_losses", "intercepts"}
    assert record["points"][0].keys() == {"model", "data", "loss", "separation", "asr", "broken"}


def test_csv_has_every_digit(tmp_path: Path) -> None:
    cells = study(noise=0.4, seeds=2)
    tables = [*tables_of([*cells, *baseline_cells(cells)]), claim_table(claim_tests(cells))]
    write_tables(tmp_path / "tables", tables)
    assert len(list((tmp_path / "tables").iterdir())) == 2 * len(tables)
    for table in tables:
        with (tmp_path / "tables" / f"{table.slug}.csv").open(newline="") as content:
            read = list(csv.DictReader(content))
        assert len(read) == len(table.rows)
        for line, row in zip(read, table.rows, strict=True):
            assert tuple(line[name] for name in table.header[: table.keys]) == row.words
            for name, figure in zip(table.header[table.keys :], row.figures, strict=True):
                assert line[name] == ("" if figure.value is None else repr(figure.value))
                if figure.spread is not None:
                    assert line[f"{name} sd"] == repr(figure.spread)


def test_names_are_escaped_in_markdown_and_in_csv(tmp_path: Path) -> None:
    odd = 'a|b_c*d<e>,"f"\ng'
    table = Table("Of a|b", ("model", odd), (TableRow((odd,), (TableCell(0.5, "{:.0%}", best=True),)),), ("a_note_",))
    lines = markdown(table).splitlines()
    assert lines == [
        r"## Of a\|b",
        "",
        r'| model | a\|b_c\*d\<e\>,"f" g |',
        "| --- | ---: |",
        r'| a\|b_c\*d\<e\>,"f" g | **50%** |',
        "",
        r"- a_note\_",
    ]
    write_tables(tmp_path, [table])
    with (tmp_path / "of-a-b.csv").open(newline="") as content:
        assert list(csv.reader(content)) == [["model", odd], [odd, "0.5"]]


def test_an_empty_table_is_written(tmp_path: Path) -> None:
    write_tables(tmp_path, [Table("Nothing", ("loss",), ())])
    assert (tmp_path / "nothing.csv").read_text() == "loss\n"


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        (TableCell(None), "-"),
        (TableCell(-0.001), "0.00"),
        (TableCell(-0.0001, "{:+.1%}"), "0.0%"),
        (TableCell(0.25, "{:.1%}", 0.005), "25.0% ± 0.5%"),
        (TableCell(1.5e-9, "{:.2g}"), "1.5e-09"),
    ],
)
def test_figures_in_words(figure: TableCell, words: str) -> None:
    assert str(figure) == words


def test_metrics_outside_the_columns_are_left_out() -> None:
    assert {"separation/length_auc", "reward/margin"} < metrics_of(1.0, 0.1).keys()
    assert not {measure.metric for measure in measures(study())} & {"separation/length_auc", "reward/margin"}


def test_claim_is_also_tested_on_all_dimensions_where_measured() -> None:
    plain = study(noise=0.02)
    fuller = [
        replace(cell, metrics={**cell.metrics, "separation/mahalanobis": cell.metrics["separation/d_b"] ** 2})
        for cell in plain
    ]
    labels = [claim.separation.label for claim in claim_tests(fuller)]
    assert labels[:3] == ["D_B", "D_B length-matched", "Mahalanobis, squared"]
    assert len(labels) == 3 * len(claim_tests(plain)) // 2
    first, _, full = claim_tests(fuller)[:3]
    assert first.slope is not None
    assert full.slope is not None
    # the square of D_B: its root is D_B, of which the logarithm is the first test's
    x = [cell.metrics["separation/d_b"] for cell in plain]
    blocks = [f"{cell.model} {cell.data}" for cell in plain]
    points = pd.DataFrame({"x": x, "asr": [cell.metrics["evaluate/asr"] for cell in plain]})
    within = points - points.groupby(blocks).transform("mean")
    assert full.slope.value == pytest.approx(float(within["x"] @ within["asr"] / (within["x"] @ within["x"])))
