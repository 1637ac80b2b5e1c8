"""P-values of two models compared on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

SIGN_DRAWS = 9_999
"""Draws of the sign test, where the differences are unequal."""


def sign_test(differences: Sequence[float]) -> float:
    """P of differences whose signs are exchangeable: exact where all that are not 0 have one size, else by draws."""
    from scipy.stats import binomtest

    values = np.array([difference for difference in differences if difference])
    if not len(values):
        return 1.0
    if np.ptp(np.abs(values)) == 0:
        return float(binomtest(int((values > 0).sum()), len(values)).pvalue)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(SIGN_DRAWS, len(values)))
    # sums that are equal but for rounding count as equal
    as_large = (np.abs(signs @ values) >= abs(values.sum()) - 1e-9).sum()
    return float((1 + as_large) / (1 + SIGN_DRAWS))


def mcnemar(first: Mapping[str, bool], second: Mapping[str, bool]) -> float:
    """P of McNemar's exact test of two outcomes of prompts (1947), over those that both have."""
    return sign_test([int(second[prompt]) - int(first[prompt]) for prompt in first.keys() & second.keys()])
