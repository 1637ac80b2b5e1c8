"""Depth of an alignment: curves of log-ratios by position against known laws, and scores token by token."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from helpers.made_run import make_run
from raydiv.data.reference_scorer import LogProbScorer
from raydiv.evaluation.baseline_cache import Measurement
from raydiv.evaluation.depth import DepthCurve, HeldOutDepth, chosen_examples
from raydiv.model.load import ModelSource
from raydiv.runs.measurements import AnswersFile, DepthFile
from raydiv.runs.report import figures


def chain(seed: int, length: int = 12) -> np.ndarray:
    """A law over two tokens at each position, given the token before: probabilities [t, previous, token]."""
    return np.random.default_rng(seed).dirichlet([2, 2], size=(length, 2))


def sample(law: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    tokens = np.zeros((count, len(law)), int)
    previous = np.zeros(count, int)
    for position, table in enumerate(law):
        previous = (generator.random(count) > table[previous, 0]).astype(int)
        tokens[:, position] = previous
    return tokens


def log_probs(law: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    previous = np.concatenate([np.zeros((len(tokens), 1), int), tokens[:, :-1]], axis=1)
    return np.log(law[np.arange(len(law)), previous, tokens])


def exact_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of the tokens up to each position, by the chain rule, [t]."""
    at, terms = np.array([1.0, 0.0]), []
    for mine, theirs in zip(p, q, strict=True):
        terms.append(at @ (mine * np.log(mine / theirs)).sum(1))
        at = at @ mine
    return np.cumsum(terms)


def test_the_curve_of_own_answers_is_the_kl_up_to_each_token() -> None:
    p, q = chain(0), chain(1)
    exact = exact_kl(p, q)
    covered, halves_covered = np.zeros(len(p)), 0
    for seed in range(40):
        tokens = sample(p, 400, np.random.default_rng(seed))
        curve = DepthCurve.of(list(log_probs(p, tokens) - log_probs(q, tokens)))
        covered += np.abs(np.array(curve.values) - exact) <= np.array(curve.half_widths) + 1e-4
        half = int((exact >= exact[-1] / 2).argmax()) + 1
        assert curve.half is not None
        assert curve.half_interval is not None
        assert curve.half_interval[0] <= curve.half <= curve.half_interval[1]
        assert curve.half_interval[1] - curve.half_interval[0] < 5
        halves_covered += curve.half_interval[0] <= half <= curve.half_interval[1]
    # 38 of 40 in the mean
    assert (covered >= 34).all()
    assert halves_covered >= 34


def test_a_response_that_has_ended_keeps_its_sum() -> None:
    curve = DepthCurve.of([np.array([1.0]), np.array([1.0, 2.0, 3.0])])
    assert curve.values == [1.0, 2.0, 3.5]
    assert curve.responses == [2, 1, 1]
    assert curve.half == 2
    assert curve.half_widths[0] == 0


def test_the_margin_is_that_of_the_means_of_both_classes() -> None:
    aligned, unaligned = [np.array([0.0, 1.0])], [np.array([-3.0]), np.array([-1.0, -1.0, 0.0])]
    curve = DepthCurve.of_classes(aligned, unaligned)
    assert curve.values == [2.0, 3.5, 3.5]
    assert curve.half == 1
    assert curve.responses == [3, 2, 1]


def test_a_curve_that_ends_at_zero_or_below_has_no_half() -> None:
    assert DepthCurve.of([np.zeros(3), np.zeros(2)]).half is None
    curve = DepthCurve.of([np.array([2.0, -3.0]), np.array([1.0, -2.0])])
    assert curve.values == [1.5, -1.0]
    assert (curve.half, curve.half_interval) == (None, None)


def test_one_response_has_a_half_and_no_interval() -> None:
    curve = DepthCurve.of([np.array([1.0, 1.0, 1.0, 1.0])])
    assert (curve.half, curve.half_interval) == (2, None)


def test_examples_are_drawn_from_both_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydiv.evaluation.depth.CLASS_EXAMPLES", 5)
    aligned = np.array([True] * 40 + [False] * 3)
    rows = chosen_examples(aligned)
    assert aligned[rows].sum() == 5
    assert (~aligned[rows]).sum() == 3
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_scores_of_tokens_sum_to_the_score_of_the_response(tiny_model: Path) -> None:
    source = ModelSource(tiny_model)
    rows = [{"prompt": [3, 4, 5][: n % 3 + 1], "response": list(range(5, 7 + n))} for n in range(7)]
    whole, by_token = LogProbScorer(source)(rows), LogProbScorer(source, by_token=True)(rows)
    for row, one, terms in zip(rows, whole, by_token, strict=True):
        assert one.keys() == {"logp"}
        assert terms["logp"] == one["logp"]
        assert len(terms["tokens"]) == len(row["response"])
        assert sum(terms["tokens"]) == pytest.approx(one["logp"], rel=1e-5)


def test_curves_are_in_the_run_and_in_its_report(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = [np.array([2.0, 1.0, 0.5]), np.array([2.5, 0.5]), np.array([-1.0, -0.5]), np.array([-2.0])]
    measured = HeldOutDepth.of(rows, np.array([True, True, False, False]))
    measurement = Measurement({}, {}, []).with_depth(measured)
    assert measurement.metrics == {"eval/depth/half": 1.0}
    measurement.write_into(run.path)
    kl = {"value": 3.0, "interval": None, "per_token": 1.0, "answers": 2}
    after = run.evaluation / "after.json"
    curve = DepthCurve.of([np.array([1.0, 1.0, 1.0]), np.array([1.5, 1.5])])
    content = json.loads(after.read_text()) | {"kl": kl | {"depth": asdict(curve)}}
    after.write_text(json.dumps(content))
    found = AnswersFile.load(after)
    assert found is not None
    assert found.values["evaluate/depth/half"].value == curve.half
    held_out, own = DepthFile.load(run.evaluation / "depth.json"), DepthFile.load(after)
    assert held_out is not None
    assert held_out.curves["margin"][2] == 1
    with figures.styled():
        picture = figures.depth(held_out, own)
    assert picture is not None
    (axis,) = picture.figure.axes
    labels = {line.get_label() for line in axis.get_lines() if not str(line.get_label()).startswith("_")}
    assert labels == {
        "aligned, held-out", "unaligned, held-out", "aligned less unaligned", "the model's own answers: KL to the base"
    }  # fmt: skip
    assert figures.depth(None, DepthFile({})) is None
