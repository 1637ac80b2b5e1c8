"""The objectives computed by hand: values, gradients, running states, and steps without one of the classes."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import pytest
import torch

from helpers.loss_cases import (
    ALIGNED,
    BETA,
    MINUS,
    MISMATCHED,
    PLUS,
    RATIOS,
    REFERENCE,
    TOKENS,
    A,
    U,
    ceiling,
    divergence,
    evaluate,
    known_batch,
    make_batch,
    variants,
)
from raydiv.losses import OBJECTIVES
from raydiv.losses.numerics import MAX_EXPONENT, bounded_exp, bounded_expm1


# -- values and gradients by hand ------------------------------------------------------------------
def sigmoid(x: np.ndarray | float) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.asarray(x))))


def log_sigmoid(x: np.ndarray | float) -> np.ndarray:
    return np.asarray(-np.log1p(np.exp(-np.asarray(x))))


def mixture(r: np.ndarray, skew: float) -> float:
    return float(skew * np.exp(r[A]).mean() + (1 - skew) * np.exp(r[U]).mean())


def kldo(r: np.ndarray, skew: float) -> float:
    return float(np.log(mixture(r, skew)) - r[A].mean())


def kldo_ema(r: np.ndarray, skew: float, rate: float, log_mean: float) -> float:
    """Its derivative is MINE's: the running mean stands still where RATIOS put it."""
    start = mixture(BETA * RATIOS, skew)
    mean = (1 - rate) * math.exp(log_mean) + rate * start
    return float(np.log(mean) + (mixture(r, skew) - start) / mean - r[A].mean())


def lagged(r: np.ndarray, skew: float, log_mean: float, largest: float = math.inf) -> float:
    x = r - log_mean
    weights = np.where(np.exp(x) < largest, np.exp(x), largest * (1 + x - np.log(largest)) if largest < math.inf else 0)
    return float(-r[A].mean() + log_mean + skew * weights[A].mean() + (1 - skew) * weights[U].mean() - 1)


def classifier(r: np.ndarray, delta: float, aligned: float = 1.0, unaligned: float = 1.0) -> float:
    return float(-aligned * log_sigmoid(r[A] - delta).mean() - unaligned * log_sigmoid(delta - r[U]).mean())


def classifier_of_pairs(r: np.ndarray, delta: float) -> float:
    return float((-log_sigmoid(r[PLUS] - delta) - log_sigmoid(delta - r[MINUS])).mean())


def utility(r: np.ndarray, z0: float, aligned: float = 1.0, unaligned: float = 1.0) -> float:
    return float(aligned * (1 - sigmoid(r[A] - z0)).mean() + unaligned * (1 - sigmoid(z0 - r[U])).mean())


def variational(r: np.ndarray, link: Callable[..., Any], conjugate: Callable[..., Any]) -> float:
    return float(-link(r[A]).mean() + conjugate(r[U]).mean())


def logistic(x: np.ndarray, smoothing: float = 0.0) -> float:
    return float((-(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)).mean())


def exo(d: np.ndarray, e: float) -> float:
    terms = sigmoid(d) * np.log(sigmoid(d) / (1 - e)) + sigmoid(-d) * np.log(sigmoid(-d) / e)
    return float(terms.mean())


def discopop(d: np.ndarray, tau: float) -> float:
    m = sigmoid(d / tau)
    return float((-(1 - m) * log_sigmoid(d) + m * np.exp(-d)).mean())


def odds(a: np.ndarray) -> np.ndarray:
    probability = np.exp((REFERENCE + a) / TOKENS)
    return np.asarray(np.log(probability / (1 - probability)))


def nll(a: np.ndarray) -> float:
    return float(-(REFERENCE + a)[A].sum() / TOKENS[A].sum())


def difference(x: np.ndarray) -> np.ndarray:
    return np.asarray(x[PLUS] - x[MINUS])


def sorted_pairs(a: np.ndarray) -> np.ndarray:
    return np.asarray(np.sort(difference(REFERENCE + a)) - np.sort(difference(REFERENCE)))


def matched_quantiles(a: np.ndarray) -> np.ndarray:
    """Three against four: both quantile functions on a grid of twelfths."""
    return np.asarray(np.repeat(np.sort(a[A]), 4) - np.repeat(np.sort(a[U]), 3))


# what the objectives detach is computed here from RATIOS, which the finite differences leave alone
MIDPOINT = float(BETA * (RATIOS[A].mean() + RATIOS[U].mean()) / 2)
PAIRS_MIDPOINT = float(BETA * (RATIOS[PLUS] + RATIOS[MINUS]).mean() / 2)
Z0 = BETA * 0.8  # (0.8 - 0.3 + 1.9) / 3 = 0.8
TARGET = 1 / (2 * BETA)


class Case(NamedTuple):
    name: str
    formula: Callable[[np.ndarray], float]
    """Of the log-ratios."""
    options: Mapping[str, Any] = MappingProxyType({})
    state: Mapping[str, float] = MappingProxyType({})
    mismatched: Sequence[float] = ()


def alpha_case(alpha: float) -> Case:
    def formula(a: np.ndarray) -> float:
        return variational(
            BETA * a,
            lambda r: (np.exp((alpha - 1) * r) - 1) / (alpha - 1),
            lambda r: (np.exp(alpha * r) - 1) / alpha,
        )

    return Case("fdo", formula, {"divergence": "alpha", "alpha": alpha})


def fdo_case(name: str, link: Callable[..., Any], conjugate: Callable[..., Any], **options: Any) -> Case:
    return Case("fdo", lambda a: variational(BETA * a, link, conjugate), {"divergence": name, **options})


BY_HAND: dict[str, Case] = {
    "kldo": Case("kldo", lambda a: kldo(BETA * a, 0.0)),
    "kldo-skew": Case("kldo", lambda a: kldo(BETA * a, 0.2), {"skew": 0.2}),
    "kldo-ema": Case("kldo", lambda a: kldo_ema(BETA * a, 0.0, 0.1, 0.7), {"estimator": "ema"}, {"log_mean": 0.7}),
    "kldo-ema-skew": Case(
        "kldo",
        lambda a: kldo_ema(BETA * a, 0.2, 0.4, -0.7),
        {"estimator": "ema", "skew": 0.2, "ema_rate": 0.4},
        {"log_mean": -0.7},
    ),
    "kldo-lagged": Case("kldo", lambda a: lagged(BETA * a, 0.0, 0.7), {"estimator": "lagged"}, {"log_mean": 0.7}),
    "kldo-lagged-skew": Case(
        "kldo", lambda a: lagged(BETA * a, 0.2, 0.7), {"estimator": "lagged", "skew": 0.2}, {"log_mean": 0.7}
    ),
    # weights of both classes above the largest, which is 1 / ema_rate here and 2 / skew there
    "kldo-lagged-limited": Case(
        "kldo", lambda a: lagged(BETA * a, 0.3, -2.0, 10.0), {"estimator": "lagged", "skew": 0.3}, {"log_mean": -2.0}
    ),
    "kldo-lagged-limited-by-skew": Case(
        "kldo",
        lambda a: lagged(BETA * a, 0.5, -2.0, 4.0),
        {"estimator": "lagged", "skew": 0.5, "ema_rate": 0.9},
        {"log_mean": -2.0},
    ),
    "bco-fixed": Case("bco", lambda a: classifier(BETA * a, 0.0), {"delta": "fixed"}),
    "bco-batch": Case("bco", lambda a: classifier(BETA * a, MIDPOINT), {"delta": "batch"}, {"delta": 9.0}),
    # of the steps before: neither this step's midpoint nor the rate is in it
    "bco-running": Case("bco", lambda a: classifier(BETA * a, 0.6), {"delta_rate": 0.25}, {"delta": 0.6}),
    "bco-lambdas": Case(
        "bco",
        lambda a: classifier(BETA * a, 0.6, 1.5, 0.4),
        {"lambda_aligned": 1.5, "lambda_unaligned": 0.4},
        {"delta": 0.6},
    ),
    "bco-pair-fixed": Case("bco-pair", lambda a: classifier_of_pairs(BETA * a, 0.0), {"delta": "fixed"}),
    "bco-pair-batch": Case("bco-pair", lambda a: classifier_of_pairs(BETA * a, PAIRS_MIDPOINT), {"delta": "batch"}),
    "bco-pair-running": Case(
        "bco-pair", lambda a: classifier_of_pairs(BETA * a, 0.6), {"delta_rate": 0.25}, {"delta": 0.6}
    ),
    "nca": Case("nca", lambda a: classifier_of_pairs(BETA * a, 0.0) / 2 + logistic(BETA * a[PLUS], 0.5)),
    "kto": Case("kto", lambda a: utility(BETA * a, Z0), mismatched=MISMATCHED),
    "kto-clamped": Case("kto", lambda a: utility(BETA * a, 0.0), mismatched=[-0.8, 0.3]),
    "kto-alone": Case("kto", lambda a: utility(BETA * a, 0.0)),
    "kto-lambdas": Case(
        "kto",
        lambda a: utility(BETA * a, Z0, 1.5, 0.4),
        {"lambda_aligned": 1.5, "lambda_unaligned": 0.4},
        mismatched=MISMATCHED,
    ),
    # no z0: mismatched examples are not needed and have no effect
    "apo-zero-unpaired": Case("apo-zero-unpaired", lambda a: utility(BETA * a, 0.0), mismatched=MISMATCHED),
    "apo-zero": Case("apo-zero", lambda a: float((1 - sigmoid(BETA * a[PLUS]) + sigmoid(BETA * a[MINUS])).mean())),
    "apo-down": Case("apo-down", lambda a: float((sigmoid(BETA * a[PLUS]) + 1 - sigmoid(BETA * difference(a))).mean())),
    "npo": Case("npo", lambda a: float(2 / BETA * np.log1p(np.exp(BETA * a[U])).mean())),
    "fdo-kl": fdo_case("kl", lambda r: 1 + r, np.exp),
    "fdo-reverse-kl": fdo_case("reverse-kl", lambda r: -np.exp(-r), lambda r: r - 1),
    "fdo-pearson": fdo_case("pearson", lambda r: 2 * (np.exp(r) - 1), lambda r: np.exp(2 * r) - 1),
    "fdo-squared-hellinger": fdo_case("squared-hellinger", lambda r: 1 - np.exp(-r / 2), lambda r: np.exp(r / 2) - 1),
    "fdo-jensen-shannon": fdo_case(
        "jensen-shannon", lambda r: np.log(2 * sigmoid(r)), lambda r: -np.log(2 * sigmoid(-r))
    ),
    "fdo-total-variation": fdo_case("total-variation", sigmoid, sigmoid),
    "fdo-alpha-0": fdo_case("alpha", lambda r: -np.exp(-r), lambda r: r - 1, alpha=0.0),
    "fdo-alpha-1": fdo_case("alpha", lambda r: 1 + r, np.exp, alpha=1.0),
    **{f"fdo-alpha-{alpha}": alpha_case(alpha) for alpha in (-1.0, 0.3, 0.5, 2.0)},
    "dpo": Case("dpo", lambda a: logistic(BETA * difference(a))),
    "dpo-smoothed": Case("dpo", lambda a: logistic(BETA * difference(a), 0.15), {"label_smoothing": 0.15}),
    "rdpo": Case(
        "rdpo",
        lambda a: (0.85 * logistic(BETA * difference(a)) - 0.15 * logistic(-BETA * difference(a))) / 0.7,
        {"label_smoothing": 0.15},
    ),
    "slic": Case("slic", lambda a: float(np.maximum(0, 1 - BETA * difference(a)).mean())),
    "exo": Case("exo", lambda a: exo(BETA * difference(a), 1e-3)),
    "exo-smoothed": Case("exo", lambda a: exo(BETA * difference(a), 0.15), {"label_smoothing": 0.15}),
    "discopop": Case("discopop", lambda a: discopop(BETA * difference(a), 0.05)),
    "discopop-tau": Case("discopop", lambda a: discopop(BETA * difference(a), 0.6), {"tau": 0.6}),
    "sigmoid-norm": Case("sigmoid-norm", lambda a: logistic(BETA * difference(a / TOKENS))),
    "ipo": Case("ipo", lambda a: float(((difference(a / TOKENS) - TARGET) ** 2).mean())),
    "ipo-summed": Case("ipo", lambda a: float(((difference(a) - TARGET) ** 2).mean()), {"length_normalize": False}),
    "sppo": Case("sppo", lambda a: float(((a[PLUS] - TARGET) ** 2 + (a[MINUS] + TARGET) ** 2).mean())),
    "aot": Case("aot", lambda a: logistic(BETA * sorted_pairs(a))),
    "aot-smoothed": Case("aot", lambda a: logistic(BETA * sorted_pairs(a), 0.15), {"label_smoothing": 0.15}),
    "aot-unpaired": Case("aot-unpaired", lambda a: logistic(BETA * matched_quantiles(a))),
    "aot-unpaired-smoothed": Case(
        "aot-unpaired", lambda a: logistic(BETA * matched_quantiles(a), 0.15), {"label_smoothing": 0.15}
    ),
    "sft": Case("sft", nll),
    "cpo": Case("cpo", lambda a: logistic(BETA * difference(REFERENCE + a)) + nll(a)),
    "cpo-alpha": Case("cpo", lambda a: logistic(BETA * difference(REFERENCE + a)) + 0.4 * nll(a), {"cpo_alpha": 0.4}),
    "simpo": Case("simpo", lambda a: logistic(BETA * difference((REFERENCE + a) / TOKENS) - 0.5)),
    "simpo-gamma": Case("simpo", lambda a: logistic(BETA * difference((REFERENCE + a) / TOKENS) - 1.5), {"gamma": 1.5}),
    "orpo": Case("orpo", lambda a: nll(a) + 0.1 * logistic(difference(odds(a)))),
    "orpo-weight": Case("orpo", lambda a: nll(a) + 0.7 * logistic(difference(odds(a))), {"odds_weight": 0.7}),
    "log-ratio-l2": Case("log-ratio-l2", lambda a: float((a[A] ** 2).mean() + (a[U] ** 2).mean())),
    "log-ratio-l2-aligned": Case("log-ratio-l2", lambda a: float((a[A] ** 2).mean()), {"members": "aligned"}),
    "log-ratio-l2-unaligned": Case(
        "log-ratio-l2",
        lambda a: float(((a / TOKENS)[U] ** 2).mean()),
        {"members": "unaligned", "length_normalize": True},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", BY_HAND)
def test_value_and_gradient_by_hand(case: str, dtype: torch.dtype) -> None:
    name, formula, options, state, mismatched = BY_HAND[case]
    beta = {"beta": BETA} if "beta" in OBJECTIVES[name].parameters else {}
    batch = known_batch(mismatched=mismatched, dtype=dtype)
    value, gradient = evaluate(name, batch, {**OBJECTIVES[name].state, **state}, **beta, **options)
    exact = dtype == torch.float64
    assert value.loss.item() == pytest.approx(formula(RATIOS), abs=1e-12 if exact else 1e-5)
    steps = 1e-5 * np.eye(len(RATIOS))
    differences = [(formula(RATIOS + step) - formula(RATIOS - step)) / 2e-5 for step in steps]
    # discopop's third derivative is about 1 / tau^3
    np.testing.assert_allclose(gradient, differences, atol=1e-5 if not exact else 1e-8 if name == "discopop" else 1e-9)


def test_every_objective_and_option_is_in_the_table() -> None:
    cases = BY_HAND.values()
    assert {case.name for case in cases} == set(OBJECTIVES)
    for name, objective in OBJECTIVES.items():
        for option, (annotation, default) in objective.parameters.items():
            tried = {case.options.get(option, default) for case in cases if case.name == name}
            if get_origin(annotation) is Literal:
                assert tried == set(get_args(annotation)), (name, option)
            elif option != "beta":  # at BETA throughout, and that is no default
                assert tried - {default}, (name, option)


def test_values_computed_by_hand() -> None:
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
    value, _ = evaluate("rdpo", pair, beta=1.0, label_smoothing=0.25)
    assert value.loss.item() == pytest.approx(1.5 * math.log(4 / 3) - 0.5 * math.log(4))
    value, _ = evaluate("exo", pair, beta=1.0, label_smoothing=0.25)
    assert value.loss.item() == pytest.approx(0)
    # s(log 2) = 2/3
    value, _ = evaluate("nca", make_batch([math.log(2), -math.log(3)], [True, False], [(0, 1)]), beta=1.0)
    assert value.loss.item() == pytest.approx(math.log(1.5) + math.log(3) / 2 + math.log(4 / 3) / 2)
    # z0 = log 2, so s(r - z0) = s(log 3) = 3/4 and s(z0 - r) = s(log 2) = 2/3
    shifted = make_batch([math.log(6), 0.0], [True, False], mismatched=[0.0, 2 * math.log(2)])
    value, _ = evaluate("kto", shifted, beta=1.0, lambda_unaligned=3.0)
    assert value.loss.item() == pytest.approx(1 / 4 + 3 * 1 / 3)
    # per-token probabilities 3/4 and 1/4: odds of 3 and 1/3, and s(log 9) = 9/10
    logps = [2 * math.log(3 / 4), 4 * math.log(1 / 4)]
    likely = make_batch(logps, [True, False], [(0, 1)], reference=[0, 0], tokens=[2, 4])
    value, _ = evaluate("orpo", likely, odds_weight=0.5)
    assert value.loss.item() == pytest.approx(math.log(4 / 3) + 0.5 * math.log(10 / 9))
    assert divergence(value) == pytest.approx(math.log(2) - math.log(10 / 9))


# -- kldo ------------------------------------------------------------------------------------------
def mine_gradient(r: np.ndarray, skew: float, mean: float, largest: float) -> np.ndarray:
    """MINE's gradient: the batch's gradient of the denominator, divided by a given mean."""
    weights = np.where(A, skew / A.sum(), (1 - skew) / U.sum()) * np.minimum(np.exp(r) / mean, largest)
    return np.asarray(BETA * (weights - A / A.sum()))


@pytest.mark.parametrize("skew", [0.0, 0.4])
@pytest.mark.parametrize("estimator", ["ema", "lagged"])
def test_moving_denominator_over_steps(estimator: str, skew: float) -> None:
    rate, mean, state = 0.25, 1.0, OBJECTIVES["kldo"].state
    largest = math.inf if estimator == "ema" else 5.0 if skew else 4.0  # max(1 / rate, 2 / skew)
    options: dict[str, Any] = {"beta": BETA, "skew": skew, "estimator": estimator, "ema_rate": rate}
    for shift in (0.0, 2.5, -1.0):
        r, before = BETA * (RATIOS + shift), mean
        mean = (1 - rate) * mean + rate * mixture(r, skew)
        value, gradient = evaluate("kldo", known_batch(RATIOS + shift), state, **options)
        if estimator == "ema":
            assert value.loss.item() == pytest.approx(math.log(mean) - r[A].mean(), abs=1e-12)
        else:
            assert value.loss.item() == pytest.approx(lagged(r, skew, math.log(before), largest), abs=1e-12)
        used = mean if estimator == "ema" else before
        np.testing.assert_allclose(gradient, mine_gradient(r, skew, used, largest), atol=1e-12)
        # the step's own, by whatever the gradient is divided
        assert divergence(value) == pytest.approx(-kldo(r, skew), abs=1e-12)
        state = value.state
        assert state == {"log_mean": pytest.approx(math.log(mean), abs=1e-12)}


def test_batch_estimator_stores_its_own_log_mean() -> None:
    value, _ = evaluate("kldo", known_batch(), {"log_mean": 5.0}, beta=BETA, skew=0.4)
    assert value.state == {"log_mean": pytest.approx(math.log(mixture(BETA * RATIOS, 0.4)))}


def test_moving_denominator_at_rate_one_is_the_batch() -> None:
    moved, gradient = evaluate("kldo", known_batch(), {"log_mean": 5.0}, estimator="ema", ema_rate=1.0)
    exact, expected = evaluate("kldo", known_batch())
    assert moved.loss.item() == pytest.approx(exact.loss.item(), abs=1e-12)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("skew", [0.0, 0.4])
def test_lagged_at_the_batch_mean_is_the_batch(skew: float) -> None:
    exact, expected = evaluate("kldo", known_batch(), skew=skew)
    value, gradient = evaluate("kldo", known_batch(), exact.state, skew=skew, estimator="lagged")
    assert value.loss.item() == pytest.approx(exact.loss.item(), abs=1e-12)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("reward", [-1e4, 0.0, 1e4])
def test_weights_of_the_running_denominator_are_bounded(reward: float) -> None:
    batch = make_batch([0.0, reward, reward - 1], [True, False, False])
    _, gradient = evaluate("kldo", batch, {"log_mean": -5.0}, beta=1.0, estimator="ema", ema_rate=0.1)
    assert 0 <= gradient[1:].sum() <= 10 + 1e-9


@pytest.mark.parametrize(
    ("skew", "rate", "largest"), [(0.0, 0.1, 10), (0.0, 0.9, 1 / 0.9), (0.5, 0.1, 10), (0.1, 0.1, 20), (0.5, 1.0, 4)]
)
def test_lagged_weights_are_limited(skew: float, rate: float, largest: float) -> None:
    options: dict[str, Any] = {"beta": 1.0, "skew": skew, "estimator": "lagged", "ema_rate": rate}
    shares = np.array([skew, (1 - skew) / 2, (1 - skew) / 2])
    for reward in (math.log(largest) - 5.01, math.log(largest) - 4.99, 1e4):
        batch = make_batch([reward, reward, -7.0], [True, False, False])
        _, gradient = evaluate("kldo", batch, {"log_mean": -5.0}, **options)
        weights = [min(math.exp(min(r + 5, 50)), largest) for r in (reward, reward, -7.0)]
        np.testing.assert_allclose(gradient, shares * weights - [1, 0, 0], rtol=1e-12)


SCALES = [1e-2, 1.0, 1e2, 1e4]


@pytest.mark.parametrize("skew", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("scale", SCALES)
def test_lagged_surrogate_is_never_below_the_exact_objective(scale: float, skew: float) -> None:
    generator = np.random.default_rng(2)
    for log_mean in (-scale, -1.0, 0.0, 1.0, scale):
        r = scale * generator.uniform(-1, 1, len(RATIOS))
        value, _ = evaluate(
            "kldo", make_batch(r, ALIGNED), {"log_mean": log_mean}, beta=1.0, skew=skew, estimator="lagged"
        )
        # no class here has more than 1 / ema_rate examples, so that limited weights still outweigh the logarithm
        assert value.loss.item() >= -divergence(value) - 1e-9 * scale


def is_within_bound(skew: float, scale: float, dtype: torch.dtype, allowed: float = 0.0, **options: Any) -> None:
    slack, generator = 8 * scale * torch.finfo(dtype).eps + 1e-6, np.random.default_rng(0)
    for signs in (A * 2.0 - 1, 1 - A * 2.0, generator.uniform(-1, 1, len(A)), generator.uniform(-1, 1, len(A))):
        for log_mean in (-scale, 0.0, scale):
            batch = make_batch(scale * signs, ALIGNED, dtype=dtype)
            value, _ = evaluate("kldo", batch, {"log_mean": log_mean}, beta=1.0, skew=skew, **options)
            assert value.loss.item() >= -math.log(1 / skew) - allowed - slack
            assert divergence(value) <= math.log(1 / skew) + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skew", [0.5, 0.1, 0.001])
@pytest.mark.parametrize("scale", SCALES)
def test_skewed_kldo_is_bounded(skew: float, scale: float, dtype: torch.dtype) -> None:
    is_within_bound(skew, scale, dtype)
    is_within_bound(skew, scale, dtype, estimator="lagged")
    is_within_bound(skew, scale, dtype, estimator="lagged", ema_rate=0.9)
    # a running mean is at least ema_rate of the step's own
    is_within_bound(skew, scale, dtype, allowed=math.log(1 / 0.2), estimator="ema", ema_rate=0.2)


@pytest.mark.parametrize("skew", [0.5, 0.1, 0.001])
def test_skewed_kldo_reaches_its_bound(skew: float) -> None:
    # aligned far above unaligned: E-[exp r] / E+[exp r] = 0
    value, _ = evaluate("kldo", make_batch(1e4 * A, ALIGNED, dtype=torch.float32), beta=1.0, skew=skew)
    assert value.loss.item() == pytest.approx(-math.log(1 / skew), abs=1e-2)
    # the surrogate touches the bound where r - log_mean = log(1 / skew), below the limit of 2 / skew
    saturating = np.where(A, math.log(1 / skew), -1e4)
    value, gradient = evaluate("kldo", make_batch(saturating, ALIGNED), beta=1.0, skew=skew, estimator="lagged")
    assert value.loss.item() == pytest.approx(-math.log(1 / skew), abs=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


@pytest.mark.parametrize("skew", [0.0, 0.3])
def test_kldo_is_invariant_to_a_constant_reward(skew: float) -> None:
    value, gradient = evaluate("kldo", make_batch(RATIOS, ALIGNED), skew=skew)
    moved, same = evaluate("kldo", make_batch(RATIOS + 700, ALIGNED), skew=skew)
    assert moved.loss.item() == pytest.approx(value.loss.item(), abs=1e-9)
    np.testing.assert_allclose(same, gradient, atol=1e-12)


@pytest.mark.parametrize("reward", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_kldo_has_a_gradient_at_any_reward(reward: float) -> None:
    batch = make_batch([0.0, reward, reward], [True, False, False], dtype=torch.float32)
    _, gradient = evaluate("kldo", batch, beta=1.0)
    # fp32 numbers near 1e4 lie 1e-3 apart, and so does the exponent of each weight
    np.testing.assert_allclose(gradient, [-1, 0.5, 0.5], rtol=1e-3)


UNBOUNDED: list[tuple[str, dict[str, Any]]] = [
    ("kldo", {}),
    ("sft", {}),
    ("rdpo", {}),
    *(("fdo", {"divergence": kind}) for kind in ("kl", "reverse-kl", "pearson")),
    *(("fdo", {"divergence": "alpha", "alpha": alpha}) for alpha in (-1, 0, 1, 2)),
]


def test_unbounded_estimates_have_no_ceiling() -> None:
    assert all(ceiling(name, options) is None for name, options in UNBOUNDED)
    value, _ = evaluate("kldo", make_batch([1e4, -1e4], [True, False]), beta=1.0)
    assert divergence(value) == pytest.approx(2e4)


# -- bco -------------------------------------------------------------------------------------------
# the mean of the two class means, not the mean over all seven examples; of pairs, those six in pairs
@pytest.mark.parametrize(("name", "midpoint"), [("bco", MIDPOINT), ("bco-pair", PAIRS_MIDPOINT)])
def test_delta_is_a_running_mean_over_steps(name: str, midpoint: float) -> None:
    loss = classifier if name == "bco" else classifier_of_pairs
    delta, state = 0.0, OBJECTIVES[name].state
    for shift in (0.0, 4.0, -1.0):
        value, _ = evaluate(name, known_batch(RATIOS + shift), state, beta=BETA)
        assert value.loss.item() == pytest.approx(loss(BETA * (RATIOS + shift), delta), abs=1e-12)
        delta = 0.9 * delta + 0.1 * (midpoint + BETA * shift)
        state = value.state
        assert state == {"delta": pytest.approx(delta, abs=1e-12)}
    value, _ = evaluate(name, known_batch(), state, beta=BETA, delta="batch")
    assert value.state == {"delta": pytest.approx(midpoint)}
    value, _ = evaluate(name, known_batch(), state, beta=BETA, delta="fixed")
    assert value.state == {"delta": 0.0}


# -- fdo -------------------------------------------------------------------------------------------
def test_fdo_continues_as_a_tangent_above_thirty() -> None:
    batch = make_batch([-40.0, 40.0], [True, False])
    value, gradient = evaluate("fdo", batch, beta=1.0, divergence="kl")
    assert value.loss.item() == pytest.approx(math.exp(30) * 11 + 39, rel=1e-12)  # exp 40 - 1 becomes e^30 (1 + 10) - 1
    np.testing.assert_allclose(gradient, [-1, math.exp(30)], rtol=1e-12)
    value, gradient = evaluate("fdo", batch, beta=1.0, divergence="reverse-kl")
    assert value.loss.item() == pytest.approx(math.exp(30) * 11 + 39, rel=1e-12)
    np.testing.assert_allclose(gradient, [-math.exp(30), 1], rtol=1e-12)


# -- paired ----------------------------------------------------------------------------------------
def test_discopop_lowers_the_difference_at_zero_and_small_tau() -> None:
    pair = make_batch([0.0, 0.0], [True, False], [(0, 1)])
    _, gradient = evaluate("discopop", pair, beta=1.0)
    # d/dD [(1 - m) log(1 + exp -D) + m exp(-D)] = -3/4 + (1 - log 2) / (4 tau)
    assert gradient[0] == pytest.approx(-0.75 + (1 - math.log(2)) / (4 * 0.05))
    assert gradient[0] > 0
    _, gradient = evaluate("discopop", pair, beta=1.0, tau=0.5)
    assert gradient[0] < 0


@pytest.mark.parametrize("tau", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("reward", [-1e4, -100.0, 100.0, 1e4])
def test_discopop_at_large_differences(reward: float, tau: float) -> None:
    pair = make_batch([reward, 0.0], [True, False], [(0, 1)], dtype=torch.float32)
    value, gradient = evaluate("discopop", pair, beta=1.0, tau=tau)
    # m = 0 or 1: the logistic loss on the left, exp(-D) on the right; what is left of m exp(-D) is exp(D / tau - D)
    left = math.exp(reward / tau - reward) if reward < 0 else 0.0
    assert value.loss.item() == pytest.approx(max(-reward, 0) + left, rel=1e-5)
    np.testing.assert_allclose(gradient, [-1, 1] if reward < 0 else [0, 0], atol=1e-2)


def test_orpo_of_a_certain_response() -> None:
    certain = make_batch([0.0, 0.0], [True, False], [(0, 1)], reference=[0, -4], tokens=[2, 2], dtype=torch.float32)
    value, gradient = evaluate("orpo", certain, odds_weight=1.0)
    # odds of 1e6, and no log-prob above -1e-6 per token moves them
    odds_ratio = 1e6 * (1 - math.exp(-2)) / math.exp(-2)
    assert value.loss.item() == pytest.approx(math.log1p(1 / odds_ratio), abs=1e-6)
    assert gradient[0] == pytest.approx(-1 / 2)


def test_apo_down_raises_no_aligned_reward_at_zero() -> None:
    _, gradient = evaluate("apo-down", make_batch([0.0, 0.0], [True, False], [(0, 1)]), beta=1.0)
    np.testing.assert_allclose(gradient, [0, 1 / 4], atol=1e-12)


# -- optimal transport -----------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (2, 3), (4, 6), (7, 7), (9, 4), (8, 1)])
def test_unequal_classes_are_matched_by_quantile(n: int, m: int) -> None:
    generator = np.random.default_rng(n + 10 * m)
    a, b = generator.normal(0, 3, n), generator.normal(0, 3, m)
    middles = (np.arange(n * m) + 0.5) / (n * m)  # both quantile functions are constant around each
    quantiles = [np.quantile(x, middles, method="inverted_cdf") for x in (a, b)]
    for smoothing in (0.0, 0.2):
        batch = make_batch([*a, *b], [True] * n + [False] * m)
        value, gradient = evaluate("aot-unpaired", batch, beta=BETA, label_smoothing=smoothing)
        assert value.loss.item() == pytest.approx(logistic(BETA * (quantiles[0] - quantiles[1]), smoothing), abs=1e-12)
        assert gradient[:n].sum() == pytest.approx(-gradient[n:].sum())


@pytest.mark.parametrize(("size", "dtype"), [(40, torch.bfloat16), (4099, torch.float32), (40, torch.float64)])
def test_equal_classes_are_matched_by_rank_in_any_precision(size: int, dtype: torch.dtype) -> None:
    # rewards are whole numbers, far enough from their neighbours in every precision: aligned k against unaligned k - 1
    ranks = np.arange(size) * (1.0 if size < 100 else 2.0**-10)
    batch = make_batch(
        [*ranks, *(ranks - 1)], [True] * size + [False] * size, reference=np.zeros(2 * size), dtype=dtype
    )
    value, gradient = evaluate("aot-unpaired", batch, beta=1.0)
    assert value.loss.item() == pytest.approx(float(-log_sigmoid(1.0)), rel=2e-2 if dtype == torch.bfloat16 else 1e-5)
    push = float(sigmoid(-1.0)) / size
    np.testing.assert_allclose(gradient, [-push] * size + [push] * size, rtol=2e-2)


# -- steps without one of the classes --------------------------------------------------------------
def uses_running_state(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a running state takes part in the step."""
    chosen = {**OBJECTIVES[name].defaults, **options}
    return chosen.get("estimator", "batch") != "batch" or chosen.get("delta", "fixed") != "fixed"


def variants_of(data: str) -> Any:
    # sft sees one class alone; where there is a running baseline it stands in for the class
    fit = [case for case in variants() if case.values[0] != "sft" and not uses_running_state(*case.values)]
    return pytest.mark.parametrize(
        ("name", "options"), [case for case in fit if OBJECTIVES[case.values[0]].data == data]
    )


@pytest.mark.parametrize("present", [True, False])
@variants_of("unpaired")
def test_absent_class_is_one_example_of_reward_zero(name: str, options: dict[str, Any], present: bool) -> None:
    state = dict.fromkeys(OBJECTIVES[name].state, 0.0)
    alone = make_batch(RATIOS[:3], [present] * 3, mismatched=MISMATCHED)
    both = make_batch([*RATIOS[:3], 0.0], [*[present] * 3, not present], mismatched=MISMATCHED)
    value, gradient = evaluate(name, alone, state, **options)
    whole, rest = evaluate(name, both, state, **options)
    assert value.loss.item() == pytest.approx(whole.loss.item(), abs=1e-12)
    np.testing.assert_allclose(gradient, rest[:3], atol=1e-12)
    assert value.state == {key: pytest.approx(number, abs=1e-12) for key, number in whole.state.items()}
    assert value.divergence is None or divergence(value) == pytest.approx(divergence(whole), abs=1e-12)


@pytest.mark.parametrize("skew", [0.0, 0.5])
@pytest.mark.parametrize("estimator", ["ema", "lagged"])
@pytest.mark.parametrize("present", [True, False])
def test_absent_class_counts_at_the_running_mean(estimator: str, skew: float, present: bool) -> None:
    """A step without a class must not pull the running mean back to its initial value."""
    state = {"log_mean": -12.0}
    alone = make_batch(RATIOS[:3] - 12, [present] * 3)
    both = make_batch([*(RATIOS[:3] - 12), -12.0], [*[present] * 3, not present])
    options = {"beta": 1.0, "skew": skew, "estimator": estimator}
    value, gradient = evaluate("kldo", alone, state, **options)
    whole, rest = evaluate("kldo", both, state, **options)
    np.testing.assert_allclose(gradient, rest[:3], atol=1e-12)
    assert value.state == {"log_mean": pytest.approx(whole.state["log_mean"], abs=1e-12)}
    if present and not skew:
        assert value.state == pytest.approx(state)


@pytest.mark.parametrize("name", ["bco", "bco-pair"])
@pytest.mark.parametrize("delta", ["running", "batch"])
def test_delta_stays_without_one_of_the_classes(name: str, delta: str) -> None:
    state = {"delta": -8.0}
    value, gradient = evaluate(name, make_batch([2.0, 3.0], [True, True]), state, beta=1.0, delta=delta)
    assert value.state == state
    # log s(r - delta), at the delta that stays; without a pair there is nothing to learn
    expected = -sigmoid(-(np.array([2.0, 3.0]) + 8)) / 2 if name == "bco" else np.zeros(2)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)


@variants_of("paired")
def test_no_pairs_are_one_pair_of_reward_zero(name: str, options: dict[str, Any]) -> None:
    state = OBJECTIVES[name].state
    # of no aligned example, so that there is no NLL either
    value, gradient = evaluate(name, make_batch([0.0, 0.0], [False, False]), state, **options)
    whole, _ = evaluate(name, make_batch([0.0, 0.0], [False, False], [(0, 1)]), state, **options)
    assert value.loss.item() == pytest.approx(whole.loss.item(), abs=1e-12)
    assert not gradient.any()
    assert value.state == whole.state
    assert value.divergence is None or divergence(value) == pytest.approx(divergence(whole), abs=1e-12)


def test_likelihood_without_pairs_is_that_of_the_aligned() -> None:
    alone = known_batch(pairs=())
    loss = nll(RATIOS)
    for name, preference in [("sft", 0.0), ("cpo", math.log(2)), ("orpo", 0.1 * math.log(2))]:
        value, gradient = evaluate(name, alone)
        assert value.loss.item() == pytest.approx(loss + preference)
        np.testing.assert_allclose(gradient, -1.0 * A / TOKENS[A].sum(), atol=1e-12)
    value, gradient = evaluate("sft", make_batch([5.0, -7.0], [False, False]))
    assert value.loss.item() == 0
    assert not gradient.any()


# -- numerics --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [math.log(10), math.log(2e6), 30.0])
def test_bounded_exponentials_are_exact_up_to_their_bound(bound: float, dtype: torch.dtype) -> None:
    x = torch.tensor([-1e4, -9.0, -1e-3, 0.0, 1e-3, 2.0, bound - 0.01, bound + 1, 1e4], dtype=dtype, requires_grad=True)
    inner = x.detach().double().clamp(max=bound)
    expected = inner.exp() * (1 + x.detach().double() - inner)
    value = bounded_exp(x, bound)
    (slope,) = torch.autograd.grad(value.sum(), x)
    np.testing.assert_allclose(value.detach(), expected, rtol=1e-5)
    np.testing.assert_allclose(slope, inner.exp(), rtol=1e-5)
    if bound == MAX_EXPONENT:
        value = bounded_expm1(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        np.testing.assert_allclose(value.detach(), expected - 1, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(slope, inner.exp(), rtol=1e-5, atol=1e-6)


# -- the package -----------------------------------------------------------------------------------
def test_import_and_facts_load_no_torch() -> None:
    program = (
        "import sys; from raydiv.losses import OBJECTIVES;"
        "[(o.parameters, o.summary, *(f(o.defaults) for f in (o.ceiling, o.divergence, o.scope, o.unused_options)))"
        " for o in OBJECTIVES.values()];"
        "print(len(OBJECTIVES), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(OBJECTIVES)), "False"]


def test_facts_follow_the_options() -> None:
    def fact(name: str, which: str, **options: Any) -> Any:
        return getattr(OBJECTIVES[name], which)(OBJECTIVES[name].defaults | options)

    assert fact("kldo", "divergence") == "KL(D+ || D-)"
    assert fact("kldo", "divergence", skew=0.25) == "KL(D+ || 0.25 D+ + 0.75 D-)"
    assert fact("kldo", "ceiling", skew=0.25, estimator="lagged") == pytest.approx(math.log(4))
    assert fact("fdo", "divergence", divergence="pearson") == "chi^2(D+ || D-)"
    assert fact("fdo", "ceiling", divergence="alpha", alpha=0.2) == pytest.approx(1 / 0.16)
    assert fact("bco", "ceiling") == pytest.approx(math.log(4))
    assert fact("kto", "ceiling", lambda_aligned=2.0) == 1.5
    assert fact("rdpo", "ceiling", label_smoothing=0.0) == pytest.approx(math.log(2))
    assert fact("fdo", "unused_options") == {"alpha": "divergence: alpha"}
    assert fact("kldo", "unused_options", estimator="ema") == {}
