"""The tables of a study against values by hand, and its regression against numpy's and scipy's."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress, pearsonr, ttest_1samp, ttest_rel, wilcoxon

from helpers.study_cells import INTERCEPTS, LOSSES, MATCHED, SLOPE, metrics_of, study
from raydiv.experiments.study.cells import BASE, NO_DATA, Cell, baseline_cells, grouped_cells
from raydiv.experiments.study.measures import ASR, D_B, D_B_LENGTH_MATCHED, attack_success, measures
from raydiv.experiments.study.regression import ClaimTest, claim_table, claim_test, claim_tests, correlation_of
from raydiv.experiments.study.table_io import Table, TableCell, TableRow, markdown, write_tables
from raydiv.experiments.study.tables import against, cell_table, paired, rank_table, tables_of

NO_ESTIMATE = "no estimate: {} cells; with an intercept for each model, at least {} are needed"


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
    assert [str(row.figures[0]) for row in table.rows] == ["3.70", "2.90", "2.10", "1.30"]
    assert table.notes == ("safety: the mean of the ranks by ASR, ASR prefill, safe answers, degenerate, toxicity",)
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


def dummies(cells: list[Cell], separation: str, asr: str) -> tuple[float, float, float]:
    """Slope, its standard error, and the partial correlation, by numpy with an indicator for each model."""
    x = np.log([cell.metrics[separation] for cell in cells])
    y = np.array([cell.metrics[asr] for cell in cells])
    models = sorted({cell.model for cell in cells})
    indicators = np.array([[cell.model == model for model in models] for cell in cells], dtype=float)
    design = np.column_stack([x, indicators])
    coefficients, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    variance = residual[0] / (len(y) - design.shape[1])
    error = np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
    left = [values - indicators @ np.linalg.lstsq(indicators, values, rcond=None)[0] for values in (x, y)]
    return float(coefficients[0]), float(error), float(pearsonr(*left).statistic)


def test_regression_recovers_the_known_slope() -> None:
    claim = claim_test(study(), D_B, ASR)
    assert claim.slope
    assert claim.correlation
    assert claim.slope.value == pytest.approx(SLOPE)
    assert claim.slope.intercepts == pytest.approx(INTERCEPTS)
    assert claim.slope.error == pytest.approx(0, abs=1e-9)
    assert claim.correlation.value == pytest.approx(-1)
    assert claim.correlation.interval == pytest.approx((-1, -1))
    assert claim.notes == ()
    matched = claim_test(study(), D_B_LENGTH_MATCHED, ASR)
    assert matched.slope
    assert matched.slope.intercepts == pytest.approx(
        {model: value - SLOPE * math.log(MATCHED) for model, value in INTERCEPTS.items()}
    )


@pytest.mark.parametrize("asr", ["evaluate/asr", "evaluate/asr/prefill", "evaluate/asr_set/AdvBench"])
def test_estimates_equal_least_squares_with_indicators(asr: str) -> None:
    cells = study(noise=0.4)
    claims = {
        (claim.separation.metric, claim.asr.metric): claim for claim in claim_tests([*cells, *baseline_cells(cells)])
    }
    assert len(claims) == 8
    claim = claims["separation/d_b", asr]
    slope, error, r = dummies(cells, "separation/d_b", asr)
    assert claim.slope
    assert claim.correlation
    assert (claim.slope.value, claim.slope.error) == pytest.approx((slope, error))
    assert (claim.correlation.value, claim.correlation.cells) == (pytest.approx(r), 24)
    # the t test of the slope and the test of r = 0 are the same
    assert claim.correlation.p == pytest.approx(claim.slope.p)
    z = 1.959963984540054 / math.sqrt(24 - 3 - 2)
    assert claim.correlation.interval == pytest.approx((math.tanh(math.atanh(r) - z), math.tanh(math.atanh(r) + z)))


def test_one_model_gives_the_ordinary_regression() -> None:
    cells = [cell for cell in study(noise=0.4) if cell.model == "gemma-2-2b"]
    x = np.log([cell.metrics["separation/d_b"] for cell in cells])
    y = [cell.metrics["evaluate/asr"] for cell in cells]
    expected, correlation = linregress(x, y), pearsonr(x, y)
    claim = claim_test(cells, D_B, ASR)
    assert claim.slope
    assert claim.correlation
    assert (claim.slope.value, claim.slope.error, claim.slope.p) == pytest.approx(
        (expected.slope, expected.stderr, expected.pvalue)
    )
    assert claim.slope.intercepts["gemma-2-2b"] == pytest.approx(expected.intercept)
    low, high = claim.slope.interval
    assert high - low == pytest.approx(2 * 2.4469118511449692 * expected.stderr)  # t(0.975; 6)
    assert claim.correlation.value == pytest.approx(correlation.statistic)
    assert claim.correlation.interval == pytest.approx(tuple(correlation.confidence_interval()))


def test_fishers_interval_covers_the_partial_correlation_in_95_percent() -> None:
    generator = np.random.default_rng(0)
    covered, rho, models, each = 0, -0.6, 4, 4
    model = np.repeat(np.arange(models), each)
    for _ in range(400):
        shift = 5 * generator.normal(size=(2, models))[:, model]
        x, noise = generator.normal(size=(2, models * each))
        y = rho * x + math.sqrt(1 - rho**2) * noise
        points = pd.DataFrame({"model": model, "log_d_b": x + shift[0], "asr": y + shift[1]})
        low, high = correlation_of(points).interval
        covered += low <= rho <= high
    assert 0.92 <= covered / 400 <= 0.98


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


def test_no_estimate_from_too_few_cells_or_without_variation() -> None:
    def reason(claim: ClaimTest) -> str:
        assert claim.slope is claim.correlation is claim.without_a_loss is claim.whole is None
        return claim.notes[-1]

    few = study()[:2] + study()[8:10]
    assert reason(claim_test(few, D_B, ASR)) == NO_ESTIMATE.format(4, 5)
    assert reason(claim_test([], D_B, ASR)) == NO_ESTIMATE.format(0, 4)
    constant = [cell_of("m", "CR", str(n), d_b=2.0, asr=n / 9) for n in range(6)]
    assert reason(claim_test(constant, D_B, ASR)) == "no estimate: separation is the same in all cells of each model"
    safe = [cell_of(model, "CR", str(n), d_b=1.0 + n, asr=0.1) for model in "mn" for n in range(4)]
    assert reason(claim_test(safe, D_B, ASR)) == "no estimate: attack success is the same in all cells of each model"


def test_broken_models_are_left_out_of_the_second_correlation() -> None:
    cells = study(noise=0.4)
    broken = [cell_of(model, "CR", "plain", d_b=50.0, asr=0.9, degenerate=0.85) for model in INTERCEPTS]
    claim, without = claim_test([*cells, *broken], D_B, ASR), claim_test(cells, D_B, ASR)
    assert claim.whole == without.correlation == without.whole
    assert claim.correlation
    assert without.correlation
    assert claim.correlation.value > without.correlation.value
    assert [point.broken for point in claim.points] == [False] * 24 + [True] * 3
    assert claim.notes == ("broken models (more than 20% degenerate answers): 3 of 27 cells",)


def test_range_of_the_correlation_without_each_loss() -> None:
    cells = study(noise=0.4)
    claims = [claim_test([cell for cell in cells if cell.loss != loss], D_B, ASR) for loss in LOSSES]
    values = [claim.correlation.value for claim in claims if claim.correlation]
    assert claim_test(cells, D_B, ASR).without_a_loss == pytest.approx((min(values), max(values)))
    assert claim_test([cell for cell in cells if cell.loss == "dpo"], D_B, ASR).without_a_loss is None


def test_dependent_seeds_are_noted() -> None:
    (note,) = claim_test(study(noise=0.2, seeds=2), D_B, ASR).notes
    assert "seed" in note


def test_table_of_claims() -> None:
    table = claim_table(claim_tests(study(noise=0.4)))
    assert len(table.rows) == 8
    assert {len(row.words) + len(row.figures) for row in table.rows} == {len(table.header)} == {15}
    assert len(set(table.header)) == len(table.header)
    assert table.rows[0].words == ("ASR", "D_B")
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
        *("separation", "asr", "points", "slope", "correlation", "without_a_loss", "whole", "notes"),
    }
    assert record["separation"] == {
        "metric": "separation/d_b", "label": "D_B", "form": "{:.3f}", "better": 1, "safety": False, "averaged": False,
    }  # fmt: skip
    assert record["asr"]["safety"]
    assert record["slope"].keys() == {"value", "error", "interval", "p", "intercepts"}
    assert record["points"][0].keys() == {"model", "data", "loss", "d_b", "asr", "broken"}


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
        replace(cell, metrics={**cell.metrics, "separation/d_b_full": cell.metrics["separation/d_b"] ** 2})
        for cell in plain
    ]
    labels = [claim.separation.label for claim in claim_tests(fuller)]
    assert labels[:3] == ["D_B", "D_B length-matched", "D_B all dimensions"]
    assert len(labels) == 3 * len(claim_tests(plain)) // 2
    first, _, full = claim_tests(fuller)[:3]
    assert first.slope is not None
    assert full.slope is not None
    assert full.slope.value == pytest.approx(first.slope.value / 2)
