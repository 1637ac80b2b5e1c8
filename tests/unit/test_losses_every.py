"""Properties of every objective at every choice of its options: finite numbers, ceilings, order, scope."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.loss_cases import (
    ALIGNED,
    MISMATCHED,
    NONE,
    PAIRS,
    RATIOS,
    REFERENCE,
    TOKENS,
    A,
    ceiling,
    divergence,
    evaluate,
    every_variant,
    known_batch,
    make_batch,
    with_defaults,
)
from raydiv.losses import OBJECTIVES, Batch, Scope

# -- drawn batches ---------------------------------------------------------------------------------
LARGEST = 1e4
Example = tuple[float, float, int, bool]
"""(reward, log-prob of the likelier of policy and reference, tokens, aligned)."""

rewards = st.one_of(st.sampled_from([-LARGEST, -1.0, 0.0, 1.0, LARGEST]), st.floats(-LARGEST, LARGEST, width=32))
examples = st.lists(
    st.tuples(rewards, st.sampled_from([0.0, -1e-6, -2.0, -300.0]), st.integers(1, 60), st.booleans()),
    min_size=1,
    max_size=6,
)


def batch_of(
    name: str, options: Mapping[str, Any], drawn: Sequence[Example], mismatched: Sequence[float], dtype: torch.dtype
) -> Batch:
    """A batch of log-probs of at most 0, with as many pairs as there are, for paired objectives."""
    beta = with_defaults(name, options).get("beta", 1.0)
    ratios = np.array([reward / beta for reward, _, _, _ in drawn])
    likelier = np.array([logp for _, logp, _, _ in drawn])
    aligned = [label for _, _, _, label in drawn]
    better = [position for position, label in enumerate(aligned) if label]
    worse = [position for position, label in enumerate(aligned) if not label]
    pairs = list(zip(better, worse, strict=False)) if OBJECTIVES[name].data == "paired" else NONE
    return make_batch(
        ratios,
        aligned,
        pairs,
        reference=likelier - np.maximum(ratios, 0),
        tokens=[tokens for _, _, tokens, _ in drawn],
        mismatched=[reward / beta for reward in mismatched],
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_variant
@settings(max_examples=10, deadline=None, derandomize=True)
@given(first=examples, second=examples, mismatched=st.lists(rewards, max_size=3))
@example([(LARGEST, -2.0, 5, True)], [(-LARGEST, -2.0, 5, True)], [LARGEST])
@example([(LARGEST, -2.0, 5, False)], [(-LARGEST, -2.0, 5, False)], [-LARGEST])
@example([(LARGEST, 0.0, 1, True), (-LARGEST, 0.0, 1, False)], [(-LARGEST, 0.0, 1, True), (LARGEST, 0.0, 1, False)], [])
@example([(0.0, 0.0, 1, True), (0.0, 0.0, 1, False)], [(0.0, 0.0, 1, True)], [])
def test_always_finite(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    first: list[Example],
    second: list[Example],
    mismatched: list[float],
) -> None:
    state = OBJECTIVES[name].state
    for drawn in (first, second):
        value, gradient = evaluate(name, batch_of(name, options, drawn, mismatched, dtype), state, **options)
        assert math.isfinite(value.loss.item())
        assert np.isfinite(gradient).all()
        assert value.divergence is None or math.isfinite(divergence(value))
        assert set(value.state) == set(state)
        assert all(type(number) is float and math.isfinite(number) for number in value.state.values())
        state = value.state


@every_variant
@settings(max_examples=10, deadline=None, derandomize=True)
@given(drawn=examples, mismatched=st.lists(rewards, max_size=3))
@example([(LARGEST, -2.0, 5, True), (-LARGEST, -2.0, 5, False)], [])
@example([(math.log(2), -2.0, 5, True), (-LARGEST, -2.0, 5, False)], [])
def test_estimate_stays_below_the_ceiling(
    name: str, options: dict[str, Any], drawn: list[Example], mismatched: list[float]
) -> None:
    state, limit = OBJECTIVES[name].state, ceiling(name, options)
    for _ in range(2):
        value, _ = evaluate(name, batch_of(name, options, drawn, mismatched, torch.float64), state, **options)
        if limit is None or value.divergence is None:
            assert limit is None
        else:
            assert divergence(value) <= limit + 1e-9
        state = value.state


# -- known batches ---------------------------------------------------------------------------------
def moved_state(name: str) -> dict[str, float]:
    return dict.fromkeys(OBJECTIVES[name].state, 0.3)


@every_variant
def test_single_precision_gives_the_same_result(name: str, options: dict[str, Any]) -> None:
    generator = np.random.default_rng(3)
    ratios, reference = generator.normal(0, 3, 80), -generator.uniform(10, 60, 80)
    tokens, pairs = generator.integers(5, 30, 80), [(row, row + 1) for row in range(0, 80, 2)]
    half = make_batch(ratios, [True, False] * 40, pairs, reference=reference, tokens=tokens, dtype=torch.bfloat16)
    same = make_batch(
        half.log_ratios.detach().double(),
        [True, False] * 40,
        pairs,
        reference=half.reference_logps.double().numpy(),
        tokens=tokens,
    )
    value, gradient = evaluate(name, half, moved_state(name), **options)
    exact, expected = evaluate(name, same, moved_state(name), **options)
    assert value.loss.item() == pytest.approx(exact.loss.item(), rel=0.03, abs=0.03)
    np.testing.assert_allclose(gradient, expected, rtol=0.1, atol=0.05 * np.abs(expected).max())
    assert value.state == {key: pytest.approx(number, rel=0.03, abs=0.03) for key, number in exact.state.items()}


@every_variant
def test_order_does_not_matter(name: str, options: dict[str, Any]) -> None:
    generator = np.random.default_rng(1)
    place = generator.permutation(len(RATIOS))
    where = np.argsort(place)
    shuffled = make_batch(
        RATIOS[place],
        A[place].tolist(),
        [(int(where[better]), int(where[worse])) for better, worse in (PAIRS[2], PAIRS[0], PAIRS[1])],
        reference=REFERENCE[place],
        tokens=TOKENS[place],
        mismatched=MISMATCHED[::-1],
    )
    value, gradient = evaluate(name, known_batch(), moved_state(name), **options)
    other, moved = evaluate(name, shuffled, moved_state(name), **options)
    assert np.abs(gradient).sum() > 0
    assert other.loss.item() == pytest.approx(value.loss.item(), abs=1e-12)
    np.testing.assert_allclose(moved, gradient[place], atol=1e-12)
    assert other.state == {key: pytest.approx(number, abs=1e-12) for key, number in value.state.items()}


@every_variant
def test_an_estimate_is_returned_unless_declared_none(name: str, options: dict[str, Any]) -> None:
    value, _ = evaluate(name, known_batch(), **options)
    assert (value.divergence is None) == (OBJECTIVES[name].divergence(with_defaults(name, options)) == "none")


@every_variant
def test_estimate_is_zero_before_training(name: str, options: dict[str, Any]) -> None:
    value, _ = evaluate(name, known_batch(0 * RATIOS, mismatched=[0.0]), **options)
    if value.divergence is None or not OBJECTIVES[name].needs_reference:
        return
    if name == "bco" and "lambda_aligned" in options:  # a classifier at 0 does not know the classes' weights
        assert divergence(value) < 0
    else:
        assert divergence(value) == pytest.approx(0, abs=1e-12)


# -- scope -----------------------------------------------------------------------------------------
WITHIN: dict[Scope, Sequence[Sequence[int]]] = {
    "example": [[row] for row in range(len(ALIGNED))],
    "pair": PAIRS,
    "batch": [range(len(ALIGNED))],
}


def depends_on_others(name: str, options: dict[str, Any], members: Sequence[int]) -> bool:
    """Whether the coefficients of examples ``members`` change with the log-probs of the others, at fixed labels and
    state.
    """
    fixed, generator, rows = np.isin(np.arange(len(RATIOS)), members), np.random.default_rng(4), []
    for _ in range(4):
        ratios = np.where(fixed, RATIOS, generator.uniform(-60, -0.1, len(RATIOS)) - REFERENCE)
        _, gradient = evaluate(name, known_batch(ratios), moved_state(name), **options)
        rows.append(gradient[fixed])
    return not np.allclose(rows, rows[0], rtol=1e-12, atol=1e-14)


@every_variant
def test_coefficients_depend_on_nothing_outside_the_scope(name: str, options: dict[str, Any]) -> None:
    declared = OBJECTIVES[name].scope(with_defaults(name, options))
    assert not any(depends_on_others(name, options, members) for members in WITHIN[declared])


# a wider scope than needed costs a second pass
@every_variant
def test_no_narrower_scope_would_be_right(name: str, options: dict[str, Any]) -> None:
    declared = OBJECTIVES[name].scope(with_defaults(name, options))
    narrower: list[Scope] = {"example": [], "pair": ["example"], "batch": ["example", "pair"]}[declared]
    for scope in narrower:
        assert any(depends_on_others(name, options, members) for members in WITHIN[scope]), scope
