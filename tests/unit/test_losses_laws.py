"""What the objectives estimate: divergences of two known discrete laws, reached from below by a free reward per
outcome.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.loss_cases import ALIGNED, RATIOS, ceiling, divergence, evaluate, make_batch, with_defaults
from raydiv.losses import OBJECTIVES, Batch
from raydiv.losses.fdo import DIVERGENCES, power

Law = tuple[int, int, int, int]
"""Probabilities of four outcomes, in sixteenths."""

LAWS: list[tuple[Law, Law]] = [((8, 4, 3, 1), (2, 2, 4, 8)), ((5, 5, 3, 3), (3, 5, 5, 3))]
DISJOINT: tuple[Law, Law] = ((10, 6, 0, 0), (0, 0, 6, 10))
LENGTHS = np.array([3, 1, 5, 2])
"""Response tokens of each outcome."""


# -- divergences -----------------------------------------------------------------------------------
Truth = Callable[[np.ndarray, np.ndarray], float]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())


def skewed_kl(skew: float) -> Truth:
    return lambda p, q: kl(p, skew * p + (1 - skew) * q)


def weighted_js(a: float, u: float) -> Truth:
    return lambda p, q: a * kl(p, (a * p + u * q) / (a + u)) + u * kl(q, (a * p + u * q) / (a + u))


two_js = weighted_js(1, 1)


def pairs_of(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Laws of (aligned, unaligned) and of the swapped pair."""
    return np.outer(p, q).ravel(), np.outer(q, p).ravel()


def js_of_pairs(p: np.ndarray, q: np.ndarray) -> float:
    return two_js(*pairs_of(p, q)) / 2


def js_of_flipped_pairs(e: float) -> Truth:
    def truth(p: np.ndarray, q: np.ndarray) -> float:
        right, wrong = pairs_of(p, q)
        return two_js((1 - e) * right + e * wrong, e * right + (1 - e) * wrong) / 2

    return truth


def variation(a: float = 1.0, u: float = 1.0) -> Truth:
    return lambda p, q: float(np.abs(a * p - u * q).sum() / 2)


total_variation = variation()


def triangular(p: np.ndarray, q: np.ndarray) -> float:
    return float(((p - q) ** 2 / (p + q)).sum())


def f_divergence(f: Callable[[np.ndarray], np.ndarray]) -> Truth:
    return lambda p, q: float((q * f(p / q)).sum())


def cressie_read(alpha: float) -> Truth:
    return f_divergence(lambda t: (t**alpha - alpha * t + alpha - 1) / (alpha * (alpha - 1)))


pearson = f_divergence(lambda t: (t - 1) ** 2)
hellinger = f_divergence(lambda t: (np.sqrt(t) - 1) ** 2)


def neyman(p: np.ndarray, q: np.ndarray) -> float:
    return pearson(q, p)


# -- estimates -------------------------------------------------------------------------------------
Reward = Callable[[np.ndarray, np.ndarray], np.ndarray]


def log_density_ratio(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(p / q))


def saturated(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.asarray(60 * np.sign(p - q))


def of_length(reward: Reward) -> Reward:
    return lambda p, q: reward(p, q) * LENGTHS


def regression(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Of sppo's target at beta 1."""
    return np.asarray((p - q) / (p + q) / 2)


def regression_of_differences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return regression(p, q) * 2 / (2 + triangular(p, q))


class Estimate(NamedTuple):
    name: str
    truth: Truth
    best: Reward | None
    """The reward at which the objective is least, at beta 1."""
    options: Mapping[str, Any] = MappingProxyType({})
    mismatched: tuple[float, ...] = ()
    flips: int = 0
    """Of four copies of each pair, so many are swapped."""


def fdo(kind: str, truth: Truth, best: Reward = log_density_ratio, **options: Any) -> Estimate:
    return Estimate("fdo", truth, best, {"divergence": kind, **options})


def alpha(value: float, truth: Truth | None = None) -> Estimate:
    return fdo("alpha", truth or cressie_read(value), alpha=value)


def skewed_ratio(skew: float) -> Reward:
    return lambda p, q: np.asarray(np.log(p / (skew * p + (1 - skew) * q)))


FIXED = {"delta": "fixed"}
REACHED: dict[str, Estimate] = {
    "kldo": Estimate("kldo", kl, log_density_ratio),
    "kldo-skew": Estimate("kldo", skewed_kl(0.5), skewed_ratio(0.5), {"skew": 0.5}),
    "kldo-skew-small": Estimate("kldo", skewed_kl(0.125), skewed_ratio(0.125), {"skew": 0.125}),
    "kldo-ema": Estimate("kldo", kl, log_density_ratio, {"estimator": "ema"}),
    "kldo-ema-skew": Estimate("kldo", skewed_kl(0.5), skewed_ratio(0.5), {"estimator": "ema", "skew": 0.5}),
    # weights are held at 1 / ema_rate = 10 without skew: no density ratio here is above it, and none with skew ever is
    "kldo-lagged": Estimate("kldo", kl, log_density_ratio, {"estimator": "lagged"}),
    "kldo-lagged-skew": Estimate("kldo", skewed_kl(0.125), skewed_ratio(0.125), {"estimator": "lagged", "skew": 0.125}),
    "fdo-kl": fdo("kl", kl),
    "fdo-reverse-kl": fdo("reverse-kl", lambda p, q: kl(q, p)),
    "fdo-pearson": fdo("pearson", pearson),
    "fdo-squared-hellinger": fdo("squared-hellinger", hellinger),
    "fdo-jensen-shannon": fdo("jensen-shannon", two_js),
    "fdo-total-variation": fdo("total-variation", total_variation, saturated),
    "fdo-alpha-1": alpha(1.0, kl),
    "fdo-alpha-0": alpha(0.0, lambda p, q: kl(q, p)),
    "fdo-alpha-half": alpha(0.5, lambda p, q: 2 * hellinger(p, q)),
    "fdo-alpha-2": alpha(2.0, lambda p, q: pearson(p, q) / 2),
    "fdo-alpha-minus-1": alpha(-1.0, lambda p, q: neyman(p, q) / 2),
    **{f"fdo-alpha-{value}": alpha(value) for value in (-1.0, -0.5, 0.3, 0.5, 0.8, 2.0, 3.0)},
    "bco": Estimate("bco", two_js, log_density_ratio, FIXED),
    "bco-lambdas": Estimate(
        "bco",
        weighted_js(2.0, 0.5),
        lambda p, q: np.asarray(np.log(4 * p / q)),
        {"lambda_aligned": 2.0, "lambda_unaligned": 0.5, **FIXED},
    ),
    "bco-pair": Estimate("bco-pair", two_js, log_density_ratio, FIXED),
    "nca": Estimate("nca", lambda p, q: two_js(p, (p + q) / 2), lambda p, q: np.asarray(np.log(2 * p / (p + q)))),
    "kto": Estimate("kto", total_variation, saturated),
    "kto-shifted": Estimate("kto", total_variation, saturated, mismatched=(0.5, 1.5)),
    "kto-lambdas": Estimate(
        "kto",
        variation(2.0, 0.5),
        lambda p, q: saturated(2 * p, q / 2),
        {"lambda_aligned": 2.0, "lambda_unaligned": 0.5},
    ),
    "apo-zero-unpaired": Estimate("apo-zero-unpaired", total_variation, saturated),
    "apo-zero": Estimate("apo-zero", total_variation, saturated),
    "dpo": Estimate("dpo", js_of_pairs, log_density_ratio),
    "rdpo": Estimate("rdpo", js_of_pairs, log_density_ratio, {"label_smoothing": 0.25}, flips=1),
    "sigmoid-norm": Estimate("sigmoid-norm", js_of_pairs, of_length(log_density_ratio)),
    "cpo": Estimate("cpo", js_of_pairs, log_density_ratio, {"cpo_alpha": 0.0}),
    # its log-probs bring the reference's along, -3 each
    "simpo": Estimate("simpo", js_of_pairs, lambda p, q: log_density_ratio(p, q) * LENGTHS + 3, {"gamma": 0.0}),
    # almost the odds term alone; its NLL has no optimum of a divergence
    "orpo": Estimate("orpo", js_of_pairs, None, {"odds_weight": 1e4}),
    "ipo": Estimate("ipo", triangular, of_length(regression_of_differences)),
    "ipo-summed": Estimate("ipo", triangular, regression_of_differences, {"length_normalize": False}),
    "sppo": Estimate("sppo", triangular, regression),
}

# the divergence is a bound, and the optimum lies below it
FROM_BELOW: dict[str, Estimate] = {
    "slic": Estimate("slic", lambda p, q: total_variation(*pairs_of(p, q)), None),
    "simpo-gamma": Estimate("simpo", js_of_pairs, None),
    "cpo-alpha": Estimate("cpo", js_of_pairs, None),
    "orpo-default": Estimate("orpo", js_of_pairs, None),
    # D is a difference of rewards, which the flipped pairs' log density ratio is not
    "dpo-smoothed": Estimate("dpo", js_of_flipped_pairs(0.2), None, {"label_smoothing": 0.2}),
    # whatever delta is, r - delta is a classifier
    "bco-running": Estimate("bco", two_js, None),
    "bco-batch": Estimate("bco", two_js, None, {"delta": "batch"}),
    "bco-pair-running": Estimate("bco-pair", two_js, None),
    "bco-pair-batch": Estimate("bco-pair", two_js, None, {"delta": "batch"}),
}


def batch_of_laws(case: Estimate, log_ratios: Tensor, p: Law, q: Law) -> Batch:
    """Sixteen aligned and sixteen unaligned examples with the log-ratios of their outcomes; all pairs of them."""
    outcomes = torch.tensor([*np.repeat(range(4), p), *np.repeat(range(4), q)])
    pairs = list(itertools.product(range(16), range(16, 32))) if OBJECTIVES[case.name].data == "paired" else []
    if case.flips:
        pairs = pairs * (4 - case.flips) + [(worse, better) for better, worse in pairs] * case.flips
    return make_batch(
        log_ratios[outcomes], [True] * 16 + [False] * 16, pairs, tokens=LENGTHS[outcomes], mismatched=case.mismatched
    )


def options_of(case: Estimate) -> dict[str, Any]:
    return {**({"beta": 1.0} if "beta" in OBJECTIVES[case.name].parameters else {}), **case.options}


def optimise(case: Estimate, p: Law, q: Law, rate: float = 0.3, steps: int = 250) -> np.ndarray:
    """The estimates of every step while one reward per outcome is free."""
    options, state = options_of(case), OBJECTIVES[case.name].state
    table = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([table], lr=rate)
    cooling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    estimates = []
    for _ in range(steps):
        adam.zero_grad()
        # orpo's log-probs per token are those of a coin, whose log-odds are free
        free = table if case.name != "orpo" else 3 + torch.from_numpy(LENGTHS) * table.sigmoid().log()
        value = OBJECTIVES[case.name].function(batch_of_laws(case, free, p, q), state, **options)
        value.loss.backward()
        estimates.append(divergence(value))
        state = value.state
        adam.step()
        cooling.step()
    return np.array(estimates)


def law(weights: Law) -> np.ndarray:
    return np.array(weights) / 16


both_laws = pytest.mark.parametrize(("p", "q"), LAWS)


@both_laws
@pytest.mark.parametrize("key", [key for key, case in REACHED.items() if case.best])
def test_estimate_at_the_best_reward_is_the_divergence(key: str, p: Law, q: Law) -> None:
    case = REACHED[key]
    assert case.best is not None
    rewards = torch.from_numpy(case.best(law(p), law(q))).requires_grad_()
    batch = batch_of_laws(case, rewards, p, q)
    options, state = options_of(case), dict(OBJECTIVES[case.name].state)
    if "log_mean" in state:  # where a running mean has come to rest
        state = dict(evaluate(case.name, batch, state, **options | {"estimator": "batch"})[0].state)
    value = OBJECTIVES[case.name].function(batch, state, **options)
    assert divergence(value) == pytest.approx(case.truth(law(p), law(q)), abs=1e-9)
    (slope,) = torch.autograd.grad(value.loss, rewards)
    np.testing.assert_allclose(slope.numpy(), 0, atol=1e-9)


@both_laws
@pytest.mark.parametrize("key", REACHED)
def test_training_reaches_the_divergence_from_below(key: str, p: Law, q: Law) -> None:
    case = REACHED[key]
    expected = case.truth(law(p), law(q))
    saturates = case.best is not None and np.abs(case.best(law(p), law(q))).max() > 50
    estimates = optimise(case, p, q, rate=2.0 if saturates else 0.3)
    assert estimates[-1] == pytest.approx(expected, abs=1e-3)
    # every reward, not only the best, gives a lower bound
    assert estimates.max() <= expected + 1e-9
    limit = ceiling(case.name, case.options)
    assert limit is None or estimates.max() <= limit


@pytest.mark.parametrize(("p", "q"), [*LAWS, DISJOINT])
@pytest.mark.parametrize("key", FROM_BELOW)
def test_training_stays_below_the_divergence(key: str, p: Law, q: Law) -> None:
    case = FROM_BELOW[key]
    expected = case.truth(law(p), law(q))
    estimates = optimise(case, p, q)
    assert estimates.max() <= expected + 1e-9
    limit = ceiling(case.name, case.options)
    assert limit is not None
    assert estimates.max() <= limit


EXTREME = ([100.0, -100.0, 40.0, 0.0], [-1e4, 1e4, 1e4, 0.5], [18.0, 25.0, 31.0, 300.0], [0.0, 0.0, 0.0, 1e4])


@both_laws
@pytest.mark.parametrize("rewards", EXTREME)
@pytest.mark.parametrize("key", [key for key, case in REACHED.items() if case.name == "fdo"])
def test_fdo_stays_below_the_divergence_at_rewards_beyond_its_tangents(
    key: str, rewards: list[float], p: Law, q: Law
) -> None:
    case = REACHED[key]
    for signed in (rewards, [-reward for reward in rewards]):
        batch = batch_of_laws(case, torch.tensor(signed, dtype=torch.float64), p, q)
        value = OBJECTIVES["fdo"].function(batch, dict(OBJECTIVES["fdo"].state), **options_of(case))
        expected = case.truth(law(p), law(q))
        assert divergence(value) <= expected + 1e-9 * max(1.0, abs(divergence(value)))


def test_ipo_over_several_prompts_stays_below_the_mean_divergence() -> None:
    """Of one prompt the classes are equal (T = 0), of the other they are disjoint (T = 2); each has a free reward."""
    aligned, unaligned = [0, 1, 2, 2], [0, 1, 3, 3]
    pairs = [(a, b) for a in (0, 1) for b in (4, 5)] + [(a, b) for a in (2, 3) for b in (6, 7)]
    table = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([table], lr=0.1)
    for _ in range(400):
        adam.zero_grad()
        outcomes = torch.tensor([*aligned, *unaligned])
        batch = make_batch(table[outcomes], [True] * 4 + [False] * 4, pairs, tokens=[1] * 8)
        value = OBJECTIVES["ipo"].function(batch, {}, beta=1.0)
        value.loss.backward()
        adam.step()
    assert divergence(value) == pytest.approx(2 * (1 - 0.5) / (1 + 0.5), abs=1e-3)
    assert divergence(value) < (0 + 2) / 2


@pytest.mark.parametrize(
    "key", [key for key, case in (REACHED | FROM_BELOW).items() if ceiling(case.name, case.options) is not None]
)
def test_disjoint_laws_reach_the_ceiling(key: str) -> None:
    case = (REACHED | FROM_BELOW)[key]
    limit = ceiling(case.name, case.options)
    assert limit is not None
    estimates = optimise(case, *DISJOINT, rate=5.0)
    assert estimates[-1] == pytest.approx(limit, abs=1e-3)
    assert estimates.max() <= limit + 1e-9


@pytest.mark.parametrize("estimator", ["batch", "ema", "lagged"])
@pytest.mark.parametrize("skew", [0.5, 0.1])
def test_skewed_kldo_of_disjoint_laws_is_the_log_of_the_skew(skew: float, estimator: str) -> None:
    case = Estimate("kldo", skewed_kl(skew), None, {"skew": skew, "estimator": estimator})
    estimates = optimise(case, *DISJOINT, rate=5.0)
    assert estimates[-1] == pytest.approx(math.log(1 / skew), abs=1e-3)
    assert estimates.max() <= math.log(1 / skew) + 1e-9


# -- identities ------------------------------------------------------------------------------------
GRID = torch.linspace(-5, 5, 81, dtype=torch.float64)
CANONICAL = {
    **{name: f for name, f in DIVERGENCES.items() if name != "total-variation"},
    **{f"alpha {value}": power(value) for value in (-2.0, -1.0, 0.0, 1e-7, 0.3, 0.5, 1 - 1e-7, 1.0, 2.0)},
}


@pytest.mark.parametrize("name", CANONICAL)
def test_slope_of_the_conjugate_is_the_density_ratio(name: str) -> None:
    r = GRID.clone().requires_grad_()
    (link,) = torch.autograd.grad(CANONICAL[name].link(r).sum(), r)
    (conjugate,) = torch.autograd.grad(CANONICAL[name].conjugate(r).sum(), r)
    np.testing.assert_allclose(conjugate, GRID.exp() * link, rtol=1e-8)
    assert (link > 0).all()


@pytest.mark.parametrize(
    ("alpha", "kind", "times", "tolerance"),
    [
        (1.0, "kl", 1.0, 1e-12),
        (0.0, "reverse-kl", 1.0, 1e-12),
        (0.5, "squared-hellinger", 2.0, 1e-12),
        (2.0, "pearson", 0.5, 1e-12),
        *((1 + step, "kl", 1.0, 1e-6) for step in (-1e-8, 1e-8)),
        *((step, "reverse-kl", 1.0, 1e-6) for step in (-1e-8, 1e-8)),
    ],
)
def test_alpha_divergences_have_names(alpha: float, kind: str, times: float, tolerance: float) -> None:
    batch = make_batch(RATIOS, ALIGNED)
    value, gradient = evaluate("fdo", batch, divergence="alpha", alpha=alpha)
    named, expected = evaluate("fdo", batch, divergence=kind)
    assert value.loss.item() == pytest.approx(times * named.loss.item(), abs=tolerance)
    np.testing.assert_allclose(gradient, times * expected, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "name", "options", "offset"),
    [("total-variation", "apo-zero-unpaired", {}, 1.0), ("jensen-shannon", "bco", FIXED, math.log(4))],
)
def test_fdo_contains_others(kind: str, name: str, options: dict[str, Any], offset: float) -> None:
    for scale in (0.0, 1.0, 30.0):
        batch = make_batch(scale * RATIOS, ALIGNED)
        value, gradient = evaluate("fdo", batch, beta=0.3, divergence=kind)
        other, expected = evaluate(name, batch, beta=0.3, **options)
        assert value.loss.item() == pytest.approx(other.loss.item() - offset, abs=1e-12)
        np.testing.assert_allclose(gradient, expected, atol=1e-12)
        assert divergence(value) == pytest.approx(divergence(other), abs=1e-12)


@both_laws
@pytest.mark.parametrize("key", ["fdo-total-variation", "kto", "apo-zero-unpaired", "apo-zero"])
def test_variation_at_the_log_density_ratio_is_half_the_triangular(key: str, p: Law, q: Law) -> None:
    case = REACHED[key]
    rewards = torch.from_numpy(log_density_ratio(law(p), law(q)))
    value = OBJECTIVES[case.name].function(batch_of_laws(case, rewards, p, q), {}, **options_of(case))
    assert divergence(value) == pytest.approx(triangular(law(p), law(q)) / 2, abs=1e-12)


def test_every_estimate_has_a_law() -> None:
    tried = {case.name for case in (REACHED | FROM_BELOW).values()}
    assert tried == {name for name, o in OBJECTIVES.items() if o.divergence(with_defaults(name, {})) != "none"}
