"""The objectives: values and gradients by hand, divergences of known laws, extremes, and TRL as an oracle."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from raydiv.losses import OBJECTIVES, Batch, Value

torch.set_num_threads(1)

NONE: tuple[tuple[int, int], ...] = ()


def make_batch(
    log_ratios: Sequence[float] | np.ndarray | Tensor,
    aligned: Sequence[bool],
    pairs: Sequence[tuple[int, int]] = NONE,
    *,
    reference: Sequence[float] | np.ndarray | None = None,
    tokens: Sequence[int] | None = None,
    mismatched: Sequence[float] = (),
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """A batch whose log-probs are a leaf, or lead to ``log_ratios`` when that is a tensor with a graph."""
    ratios = torch.as_tensor(log_ratios, dtype=dtype)
    given = torch.full((len(aligned),), -3.0) if reference is None else torch.as_tensor(np.asarray(reference))
    logps = given.to(dtype) + ratios
    return Batch(
        logps=logps if logps.requires_grad else logps.requires_grad_(),
        reference_logps=given.to(dtype),
        aligned=torch.tensor(list(aligned), dtype=torch.bool),
        tokens=torch.tensor(tokens if tokens is not None else [4] * len(aligned), dtype=torch.long),
        pairs=torch.tensor(list(pairs), dtype=torch.long).reshape(-1, 2),
        mismatched_log_ratios=torch.tensor(list(mismatched), dtype=dtype),
    )


def evaluate(
    name: str, batch: Batch, state: Mapping[str, float] | None = None, **options: Any
) -> tuple[Value, np.ndarray]:
    """An objective's value, and its gradient by the log-probs."""
    objective = OBJECTIVES[name]
    value = objective.function(batch, objective.state if state is None else state, **options)
    assert value.loss.shape == ()
    (gradient,) = torch.autograd.grad(value.loss, batch.logps)
    return value, gradient.numpy()


def divergence(value: Value) -> float:
    assert value.divergence is not None
    return float(value.divergence.detach())


def ceiling(name: str, options: Mapping[str, Any]) -> float | None:
    return OBJECTIVES[name].ceiling({**OBJECTIVES[name].defaults, **options})


def variants() -> list[Any]:
    """Every objective at its defaults and at each choice of its options that is a choice; numbers where named here."""
    numbers: dict[str, list[Any]] = {"label_smoothing": [0.1], "skew": [0.5], "lambda_aligned": [0.3]}
    found = []
    for name, objective in OBJECTIVES.items():
        axes = []
        for option, (annotation, default) in objective.parameters.items():
            if annotation is bool:
                choices = [False, True]
            elif get_origin(annotation) is Literal:
                choices = list(get_args(annotation))
            elif option in numbers:
                choices = [default, *numbers[option]]
            else:
                continue
            axes.append([(option, choice) for choice in choices])
        for choice in itertools.product(*axes):
            label = "-".join([name, *(f"{key}={value}" for key, value in choice)])
            found.append(pytest.param(name, dict(choice), id=label))
    return found


every_variant = pytest.mark.parametrize(("name", "options"), variants())


# -- values and gradients by hand ------------------------------------------------------------------------------------

ALIGNED = [True, False, False, True, False, True, False]
A, U = np.array(ALIGNED), ~np.array(ALIGNED)
RATIOS = np.array([1.3, -0.4, 2.1, -1.7, 0.9, 3.2, -2.5])
REFERENCE = np.array([-12.0, -9.5, -31.0, -4.25, -7.0, -15.5, -2.0])
TOKENS = np.array([5, 3, 11, 2, 4, 7, 1])
PAIRS = [(0, 1), (3, 2), (5, 6)]
PLUS, MINUS = np.array([0, 3, 5]), np.array([1, 2, 6])
BETA = 0.3


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(-np.log1p(np.exp(-x)))


def bco_by_hand(r: np.ndarray, delta: float) -> float:
    return float(-log_sigmoid(r[A] - delta).mean() - log_sigmoid(delta - r[U]).mean())


def kto_by_hand(r: np.ndarray, z0: float, first: float, second: float) -> float:
    return float(first * (1 - sigmoid(r[A] - z0)).mean() + second * (1 - sigmoid(z0 - r[U])).mean())


def dpo_by_hand(r: np.ndarray, smoothing: float) -> float:
    difference = r[PLUS] - r[MINUS]
    return float((-(1 - smoothing) * log_sigmoid(difference) - smoothing * log_sigmoid(-difference)).mean())


def nca_by_hand(r: np.ndarray) -> float:
    return float((-log_sigmoid(r[PLUS]) - log_sigmoid(-r[PLUS]) / 2 - log_sigmoid(-r[MINUS]) / 2).mean())


def sft_by_hand(ratios: np.ndarray) -> float:
    return float(-(REFERENCE + ratios)[A].sum() / TOKENS[A].sum())


def skewed(r: np.ndarray, skew: float) -> float:
    return float(np.log(skew * np.exp(r[A]).mean() + (1 - skew) * np.exp(r[U]).mean()) - r[A].mean())


# what the objectives detach is computed here from RATIOS, which the finite differences leave alone
MIDPOINT = float(BETA * (RATIOS[A].mean() + RATIOS[U].mean()) / 2)
MISMATCHED = [0.8, -0.3, 1.9]
Z0 = BETA * 0.8  # (0.8 - 0.3 + 1.9) / 3 = 0.8

Formula = Callable[[np.ndarray], float]
BY_HAND: dict[str, tuple[str, dict[str, Any], dict[str, float], Sequence[float], Formula]] = {
    "kldo": ("kldo", {}, {}, (), lambda a: skewed(BETA * a, 0.0)),
    "kldo-skew": ("kldo", {"skew": 0.2}, {}, (), lambda a: skewed(BETA * a, 0.2)),
    "bco-fixed": ("bco", {"delta": "fixed"}, {}, (), lambda a: bco_by_hand(BETA * a, 0.0)),
    "bco-batch": ("bco", {"delta": "batch"}, {"delta": 9.0}, (), lambda a: bco_by_hand(BETA * a, MIDPOINT)),
    "bco-running": (
        "bco",
        {"delta": "running", "delta_rate": 0.25},
        {"delta": 0.6},
        (),
        lambda a: bco_by_hand(BETA * a, 0.75 * 0.6 + 0.25 * MIDPOINT),
    ),
    "kto": ("kto", {}, {}, MISMATCHED, lambda a: kto_by_hand(BETA * a, Z0, 1.0, 1.0)),
    "kto-clamped": ("kto", {}, {}, [-0.8, 0.3], lambda a: kto_by_hand(BETA * a, 0.0, 1.0, 1.0)),
    "kto-alone": ("kto", {}, {}, (), lambda a: kto_by_hand(BETA * a, 0.0, 1.0, 1.0)),
    "kto-lambdas": (
        "kto",
        {"lambda_aligned": 1.5, "lambda_unaligned": 0.4},
        {},
        MISMATCHED,
        lambda a: kto_by_hand(BETA * a, Z0, 1.5, 0.4),
    ),
    "dpo": ("dpo", {}, {}, (), lambda a: dpo_by_hand(BETA * a, 0.0)),
    "dpo-smoothed": ("dpo", {"label_smoothing": 0.15}, {}, (), lambda a: dpo_by_hand(BETA * a, 0.15)),
    "nca": ("nca", {}, {}, (), lambda a: nca_by_hand(BETA * a)),
    "sft": ("sft", {}, {}, (), sft_by_hand),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_value_and_gradient_by_hand(case: str) -> None:
    name, options, state, mismatched, formula = BY_HAND[case]
    beta = {"beta": BETA} if "beta" in OBJECTIVES[name].parameters else {}
    batch = make_batch(
        RATIOS, ALIGNED, PAIRS, reference=REFERENCE, tokens=TOKENS.tolist(), mismatched=mismatched, dtype=torch.float64
    )
    value, gradient = evaluate(name, batch, {**OBJECTIVES[name].state, **state}, **beta, **options)
    assert value.loss.item() == pytest.approx(formula(RATIOS), abs=1e-12)
    steps = 1e-5 * np.eye(len(RATIOS))
    differences = [(formula(RATIOS + step) - formula(RATIOS - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(gradient, differences, atol=1e-9)


def test_simple_numbers() -> None:
    # E+[r] = 2, E-[exp r] = (1 + 3) / 2
    value, _ = evaluate("kldo", make_batch([1, 3, 0, math.log(3)], [True, True, False, False]), beta=1.0)
    assert value.loss.item() == pytest.approx(math.log(2) - 2)
    assert divergence(value) == pytest.approx(2 - math.log(2))
    # s(log 3) = 3/4, s(-log 3) = 1/4
    pair = make_batch([math.log(3), 0.0], [True, False], [(0, 1)])
    value, _ = evaluate("dpo", pair, beta=1.0)
    assert value.loss.item() == pytest.approx(math.log(4 / 3))
    value, _ = evaluate("dpo", pair, beta=1.0, label_smoothing=0.25)
    assert value.loss.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    # s(log 2) = 2/3
    value, _ = evaluate("nca", make_batch([math.log(2), -math.log(3)], [True, False], [(0, 1)]), beta=1.0)
    assert value.loss.item() == pytest.approx(math.log(1.5) + math.log(3) / 2 + math.log(4 / 3) / 2)
    # z0 = log 2, so s(r - z0) = s(log 3) = 3/4 and s(z0 - r) = s(log 2) = 2/3
    shifted = make_batch([math.log(6), 0.0], [True, False], mismatched=[0.0, 2 * math.log(2)])
    value, _ = evaluate("kto", shifted, beta=1.0, lambda_unaligned=3.0)
    assert value.loss.item() == pytest.approx(1 / 4 + 3 * 1 / 3)


@pytest.mark.parametrize("skew", [0.0, 0.4])
def test_moving_denominator_over_two_steps(skew: float) -> None:
    rate, mean, state = 0.25, 1.0, OBJECTIVES["kldo"].state
    options: dict[str, Any] = {"beta": BETA, "skew": skew, "estimator": "ema", "ema_rate": rate}
    for shift in (0.0, 2.5):
        r = BETA * (RATIOS + shift)
        mean = (1 - rate) * mean + rate * (skew * np.exp(r[A]).mean() + (1 - skew) * np.exp(r[U]).mean())
        value, gradient = evaluate("kldo", make_batch(RATIOS + shift, ALIGNED), state, **options)
        assert value.loss.item() == pytest.approx(math.log(mean) - r[A].mean(), abs=1e-12)
        # MINE: the batch's gradient of the denominator, divided by the running mean
        weights = np.where(A, skew / A.sum(), (1 - skew) / U.sum()) * np.exp(r) / mean
        np.testing.assert_allclose(gradient, BETA * (weights - A / A.sum()), atol=1e-12)
        state = value.state
        assert state["log_mean"] == pytest.approx(math.log(mean), abs=1e-12)


def test_moving_denominator_at_rate_one_is_the_batch() -> None:
    batch = make_batch(RATIOS, ALIGNED)
    moving, gradient = evaluate("kldo", batch, {"log_mean": 5.0}, estimator="ema", ema_rate=1.0)
    own, expected = evaluate("kldo", batch)
    assert moving.loss.item() == pytest.approx(own.loss.item(), abs=1e-12)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("reward", [-1e4, 0.0, 1e4])
def test_moving_denominator_weighs_within_bounds(reward: float) -> None:
    batch = make_batch([0.0, reward, reward - 1], [True, False, False])
    _, gradient = evaluate("kldo", batch, {"log_mean": -5.0}, beta=1.0, estimator="ema", ema_rate=0.1)
    assert 0 <= gradient[1:].sum() <= 10 + 1e-9


def test_delta_runs_over_steps() -> None:
    delta, state = 0.0, OBJECTIVES["bco"].state
    for shift in (0.0, 4.0):
        # the mean of the two class means, not the mean over all seven examples
        delta = 0.9 * delta + 0.1 * (MIDPOINT + BETA * shift)
        value, _ = evaluate("bco", make_batch(RATIOS + shift, ALIGNED), state, beta=BETA)
        state = value.state
        assert state == {"delta": pytest.approx(delta, abs=1e-12)}
    value, _ = evaluate("bco", make_batch(RATIOS, ALIGNED), state, beta=BETA, delta="batch")
    assert value.state == {"delta": pytest.approx(MIDPOINT)}
    value, _ = evaluate("bco", make_batch(RATIOS, ALIGNED), beta=BETA, delta="fixed")
    assert value.state == {"delta": 0.0}


@pytest.mark.parametrize("skew", [0.0, 0.3])
def test_a_constant_moves_kldo_nowhere(skew: float) -> None:
    value, gradient = evaluate("kldo", make_batch(RATIOS, ALIGNED), skew=skew)
    moved, same = evaluate("kldo", make_batch(RATIOS + 700, ALIGNED), skew=skew)
    assert moved.loss.item() == pytest.approx(value.loss.item(), abs=1e-9)
    np.testing.assert_allclose(same, gradient, atol=1e-12)


@pytest.mark.parametrize("reward", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_kldo_pushes_at_any_reward(reward: float) -> None:
    batch = make_batch([0.0, reward, reward], [True, False, False], dtype=torch.float32)
    _, gradient = evaluate("kldo", batch, beta=1.0)
    # fp32 numbers near 1e4 lie 1e-3 apart, and so does the exponent of each weight
    np.testing.assert_allclose(gradient, [-1, 0.5, 0.5], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skew", [0.5, 0.1, 0.001])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2, 1e4])
def test_skewed_kldo_is_bounded(skew: float, scale: float, dtype: torch.dtype) -> None:
    floor, slack = -math.log(1 / skew), 4 * scale * torch.finfo(dtype).eps + 1e-6
    generator = np.random.default_rng(0)
    for signs in (A * 2.0 - 1, 1 - A * 2.0, generator.uniform(-1, 1, len(A))):
        value, _ = evaluate("kldo", make_batch(scale * signs, ALIGNED, dtype=dtype), beta=1.0, skew=skew)
        assert value.loss.item() >= floor - slack
        assert divergence(value) == -value.loss.item()
    # aligned far above unaligned: E-[exp r] / E+[exp r] = 0
    value, _ = evaluate("kldo", make_batch(1e4 * A, ALIGNED, dtype=dtype), beta=1.0, skew=skew)
    assert value.loss.item() == pytest.approx(floor, abs=1e-2)


# -- divergences of known laws ----------------------------------------------------------------------------------------


def kl(p: np.ndarray, q: np.ndarray) -> float:
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())


def js(p: np.ndarray, q: np.ndarray) -> float:
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def js_of_pairs(p: np.ndarray, q: np.ndarray) -> float:
    return js(np.outer(p, q).ravel(), np.outer(q, p).ravel())


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


Law = tuple[int, int, int, int]
Truth = Callable[[np.ndarray, np.ndarray], float]
ESTIMATES: dict[str, tuple[str, dict[str, Any], Truth, float]] = {
    "kldo": ("kldo", {}, kl, 1e-3),
    "kldo-skew": ("kldo", {"skew": 0.5}, lambda p, q: kl(p, (p + q) / 2), 1e-3),
    "kldo-skew-small": ("kldo", {"skew": 0.125}, lambda p, q: kl(p, p / 8 + q * 7 / 8), 1e-3),
    "bco": ("bco", {"delta": "fixed"}, lambda p, q: 2 * js(p, q), 1e-3),
    "kto": ("kto", {}, total_variation, 1e-2),
    "kto-lambdas": (
        "kto",
        {"lambda_aligned": 2.0, "lambda_unaligned": 0.5},
        lambda p, q: float(np.abs(2 * p - q / 2).sum() / 2),
        1e-2,
    ),
    "nca": ("nca", {}, lambda p, q: 2 * js(p, (p + q) / 2), 1e-3),
    "dpo": ("dpo", {}, js_of_pairs, 1e-3),
}


def optimise(name: str, options: Mapping[str, Any], p: Law, q: Law, rate: float = 0.3) -> tuple[float, float]:
    """The last and the largest estimate while one reward per outcome is free; laws in sixteenths, beta 1."""
    outcomes = torch.tensor([*np.repeat(range(4), p), *np.repeat(range(4), q)])
    aligned = [True] * 16 + [False] * 16
    pairs = list(itertools.product(range(16), range(16, 32))) if OBJECTIVES[name].data == "paired" else NONE
    table = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([table], lr=rate)
    cooling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 250)
    estimates = []
    for _ in range(250):
        adam.zero_grad()
        batch = make_batch(table[outcomes], aligned, pairs)
        value = OBJECTIVES[name].function(batch, OBJECTIVES[name].state, beta=1.0, **options)
        value.loss.backward()  # type: ignore[no-untyped-call]
        estimates.append(divergence(value))
        adam.step()
        cooling.step()
    return estimates[-1], max(estimates)


@pytest.mark.parametrize(("p", "q"), [((8, 4, 3, 1), (2, 2, 4, 8)), ((5, 5, 3, 3), (3, 5, 5, 3))])
@pytest.mark.parametrize("case", ESTIMATES)
def test_optimum_is_the_divergence(case: str, p: Law, q: Law) -> None:
    name, options, truth, tolerance = ESTIMATES[case]
    expected = truth(np.array(p) / 16, np.array(q) / 16)
    reached, largest = optimise(name, options, p, q)
    assert reached == pytest.approx(expected, abs=tolerance)
    # every reward, not only the best, gives a lower bound
    assert largest <= expected + 1e-9
    limit = ceiling(name, options)
    assert limit is None or largest <= limit


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kldo", {"skew": 0.5}),
        ("bco", {"delta": "fixed"}),
        ("kto", {}),
        ("kto", {"lambda_aligned": 2.0, "lambda_unaligned": 0.5}),
        ("nca", {}),
        ("dpo", {}),
        ("dpo", {"label_smoothing": 0.2}),
    ],
)
def test_disjoint_laws_reach_the_ceiling(name: str, options: dict[str, Any]) -> None:
    limit = ceiling(name, options)
    assert limit is not None
    reached, largest = optimise(name, options, (10, 6, 0, 0), (0, 0, 6, 10), rate=2.0)
    assert reached == pytest.approx(limit, abs=1e-3)
    assert largest <= limit + 1e-9


def test_plain_kldo_and_sft_have_no_ceiling() -> None:
    assert ceiling("kldo", {}) is None
    assert ceiling("sft", {}) is None
    value, _ = evaluate("kldo", make_batch([1e4, -1e4], [True, False]), beta=1.0)
    assert divergence(value) == pytest.approx(2e4)


# -- every objective --------------------------------------------------------------------------------------------------

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
    beta = {**OBJECTIVES[name].defaults, **options}.get("beta", 1.0)
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


@every_variant
@settings(max_examples=15, deadline=None, derandomize=True)
@given(first=examples, second=examples, mismatched=st.lists(rewards, max_size=3))
@example([(LARGEST, -2.0, 5, True)], [(-LARGEST, -2.0, 5, True)], [LARGEST])
@example([(LARGEST, -2.0, 5, False)], [(-LARGEST, -2.0, 5, False)], [-LARGEST])
@example([(LARGEST, 0.0, 1, True), (-LARGEST, 0.0, 1, False)], [(-LARGEST, 0.0, 1, True), (LARGEST, 0.0, 1, False)], [])
@example([(0.0, 0.0, 1, True), (0.0, 0.0, 1, False)], [(0.0, 0.0, 1, True)], [])
def test_always_finite(
    name: str, options: dict[str, Any], first: list[Example], second: list[Example], mismatched: list[float]
) -> None:
    state = OBJECTIVES[name].state
    for drawn in (first, second):
        value, gradient = evaluate(name, batch_of(name, options, drawn, mismatched, torch.float32), state, **options)
        assert math.isfinite(value.loss.item())
        assert np.isfinite(gradient).all()
        assert value.divergence is None or math.isfinite(divergence(value))
        assert set(value.state) == set(state)
        assert all(type(number) is float and math.isfinite(number) for number in value.state.values())
        state = value.state


@every_variant
@settings(max_examples=15, deadline=None, derandomize=True)
@given(drawn=examples, mismatched=st.lists(rewards, max_size=3))
@example([(LARGEST, -2.0, 5, True), (-LARGEST, -2.0, 5, False)], [])
@example([(math.log(2), -2.0, 5, True), (-LARGEST, -2.0, 5, False)], [])
def test_estimate_stays_below_the_ceiling(
    name: str, options: dict[str, Any], drawn: list[Example], mismatched: list[float]
) -> None:
    value, _ = evaluate(name, batch_of(name, options, drawn, mismatched, torch.float64), **options)
    limit = ceiling(name, options)
    if limit is None or value.divergence is None:
        assert limit is None
    else:
        assert divergence(value) <= limit + 1e-9


@every_variant
def test_order_does_not_matter(name: str, options: dict[str, Any]) -> None:
    generator = np.random.default_rng(1)
    state = dict.fromkeys(OBJECTIVES[name].state, 0.3)
    place = generator.permutation(len(RATIOS))
    where = np.argsort(place)
    batch = make_batch(RATIOS, ALIGNED, PAIRS, reference=REFERENCE, tokens=TOKENS.tolist(), mismatched=MISMATCHED)
    shuffled = make_batch(
        RATIOS[place],
        A[place].tolist(),
        [(int(where[better]), int(where[worse])) for better, worse in (PAIRS[2], PAIRS[0], PAIRS[1])],
        reference=REFERENCE[place],
        tokens=TOKENS[place].tolist(),
        mismatched=MISMATCHED[::-1],
    )
    value, gradient = evaluate(name, batch, state, **options)
    other, moved = evaluate(name, shuffled, state, **options)
    assert np.abs(gradient).sum() > 0
    assert other.loss.item() == pytest.approx(value.loss.item(), abs=1e-12)
    np.testing.assert_allclose(moved, gradient[place], atol=1e-12)
    assert other.state == {key: pytest.approx(number, abs=1e-12) for key, number in value.state.items()}


absent_class = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kldo", {}),
        ("kldo", {"skew": 0.4}),
        ("kldo", {"estimator": "ema"}),
        ("bco", {"delta": "running"}),
        ("bco", {"delta": "batch"}),
        ("bco", {"delta": "fixed"}),
        ("kto", {}),
    ],
)


def without_and_with_zero(name: str, present: bool) -> tuple[Batch, Batch, dict[str, float]]:
    """A batch of one class, the same with one example of the other at reward 0, and a state that has moved."""
    alone = make_batch(RATIOS[:3], [present] * 3, mismatched=MISMATCHED)
    both = make_batch([*RATIOS[:3], 0.0], [*[present] * 3, not present], mismatched=MISMATCHED)
    return alone, both, dict.fromkeys(OBJECTIVES[name].state, 0.3)


@pytest.mark.parametrize("present", [True, False])
@absent_class
def test_absent_class_pushes_as_one_example_of_reward_zero(name: str, options: dict[str, Any], present: bool) -> None:
    alone, both, state = without_and_with_zero(name, present)
    value, gradient = evaluate(name, alone, state, **options)
    whole, rest = evaluate(name, both, state, **options)
    np.testing.assert_allclose(gradient, rest[:3], atol=1e-12)
    assert value.state == {key: pytest.approx(number, abs=1e-12) for key, number in whole.state.items()}


@pytest.mark.parametrize("present", [True, False])
@absent_class
def test_absent_class_is_worth_one_example_of_reward_zero(name: str, options: dict[str, Any], present: bool) -> None:
    alone, both, state = without_and_with_zero(name, present)
    value, _ = evaluate(name, alone, state, **options)
    whole, _ = evaluate(name, both, state, **options)
    assert value.loss.item() == pytest.approx(whole.loss.item(), abs=1e-12)


@pytest.mark.parametrize(("name", "start"), [("dpo", math.log(2)), ("nca", math.log(4)), ("sft", 0.0)])
def test_nothing_to_learn_from_moves_nothing(name: str, start: float) -> None:
    value, gradient = evaluate(name, make_batch([5.0, -7.0], [False, False]))
    assert value.loss.item() == pytest.approx(start)
    assert not gradient.any()


@pytest.mark.parametrize("case", ESTIMATES)
def test_estimate_is_zero_before_training(case: str) -> None:
    name, options, _, _ = ESTIMATES[case]
    value, _ = evaluate(name, make_batch(0 * RATIOS, ALIGNED, PAIRS), **options)
    assert divergence(value) == pytest.approx(0, abs=1e-12)


@every_variant
def test_estimate_is_there_unless_declared_none(name: str, options: dict[str, Any]) -> None:
    value, _ = evaluate(name, make_batch(RATIOS, ALIGNED, PAIRS), **options)
    assert (value.divergence is None) == (OBJECTIVES[name].divergence == "none")


# -- TRL --------------------------------------------------------------------------------------------------------------


def trl_dpo(kind: str, batch: Batch, beta: float, **settings: Any) -> tuple[float, np.ndarray]:
    """Loss and gradient of TRL's own ``DPOTrainer._compute_loss``, given our pairs' log-probs in place of a model's."""
    from trl.trainer.dpo_trainer import DPOTrainer

    compute_loss: Any = DPOTrainer._compute_loss
    rows = batch.pairs.T.reshape(-1)  # TRL's batch is all chosen, then all rejected
    logps = batch.logps.detach()[rows].requires_grad_()
    tokens, reference = batch.tokens[rows], batch.reference_logps[rows]
    columns = torch.arange(int(tokens.max()) + 1)
    completion = ((columns >= 1) & (columns <= tokens[:, None])).long()  # one prompt token, then the response
    per_token = completion[:, 1:] * (logps / tokens)[:, None]
    outputs = SimpleNamespace(log_probs=per_token, entropy=per_token, mean_logits=per_token, is_top1=per_token > 0)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=logps.device, gather=lambda x: x, gather_for_metrics=lambda x: x),
        beta=beta,
        loss_types=[kind],
        loss_weights=[1.0],
        label_smoothing=settings.pop("label_smoothing", 0.0),
        args=SimpleNamespace(**settings),
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": reference[: len(batch.pairs)],
        "ref_rejected_logps": reference[len(batch.pairs) :],
    }
    loss = compute_loss(trainer, lambda **_: outputs, inputs, False)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.item(), torch.zeros_like(batch.logps).index_add(0, rows, gradient).detach().numpy()


@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
@pytest.mark.parametrize(("name", "kind"), [("dpo", "sigmoid"), ("nca", "nca_pair")])
def test_agrees_with_trl(name: str, kind: str, scale: float) -> None:
    batch = make_batch(scale * RATIOS, ALIGNED, PAIRS, reference=REFERENCE, tokens=TOKENS.tolist(), dtype=torch.float32)
    loss, gradient = trl_dpo(kind, batch, BETA)
    value, ours = evaluate(name, batch, beta=BETA)
    assert value.loss.item() == pytest.approx(loss, abs=1e-5, rel=1e-5)
    np.testing.assert_allclose(ours, gradient, atol=1e-5)
    assert np.abs(gradient).sum() > 1e-3


# TRL 1.16 ignores label smoothing in its sigmoid loss; sorting changes nothing in aot_unpaired where there is one pair
@pytest.mark.parametrize("pair", PAIRS)
def test_smoothing_agrees_with_trl(pair: tuple[int, int]) -> None:
    batch = make_batch(RATIOS, ALIGNED, [pair], reference=REFERENCE, tokens=TOKENS.tolist(), dtype=torch.float32)
    loss, gradient = trl_dpo("aot_unpaired", batch, BETA, label_smoothing=0.2)
    value, ours = evaluate("dpo", batch, beta=BETA, label_smoothing=0.2)
    assert value.loss.item() == pytest.approx(loss, abs=1e-5)
    np.testing.assert_allclose(ours, gradient, atol=1e-5)


# -- the package ------------------------------------------------------------------------------------------------------


def test_import_and_options_load_no_torch() -> None:
    program = (
        "import sys; from raydiv.losses import OBJECTIVES;"
        "[(o.parameters, o.summary, o.ceiling(o.defaults)) for o in OBJECTIVES.values()];"
        "print(len(OBJECTIVES), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(OBJECTIVES)), "False"]
