"""Agreement of two judges: Cohen's kappa (1960) with an interval over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two judges' verdicts, unsafe or not, on the same answers.

    ``unsafe``: how many each calls unsafe; ``agree``: on how many they agree, of ``of``. ``kappa`` is None where each
    gives a single verdict, so that chance alone would agree as often. ``interval``: 95%, by a bootstrap over prompts;
    None where they agree on every answer.
    """

    kappa: float | None
    interval: tuple[float, float] | None
    agree: int
    unsafe: tuple[int, int]
    of: int

    @classmethod
    def of_verdicts(cls, first: Sequence[bool], second: Sequence[bool], prompts: Sequence[int]) -> Agreement | None:
        """From verdicts [n] and the prompt of each answer [n]; None without answers.

        The bootstrap draws prompts, since the answers to one prompt under several attacks are not independent.
        """
        if not len(first):
            return None
        a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
        _, clusters = np.unique(np.asarray(prompts), return_inverse=True)
        tables = np.zeros((int(clusters.max()) + 1, 4))
        np.add.at(tables, (clusters, 2 * a.astype(int) + b), 1)
        whole = tables.sum(0)
        kappa = float(_kappa(whole[None])[0])
        interval = None
        if np.isfinite(kappa) and kappa < 1:
            counts = len(tables)
            draws = np.random.default_rng(0).multinomial(counts, np.full(counts, 1 / counts), size=RESAMPLES)
            low, high = np.nanquantile(_kappa(draws @ tables), [0.025, 0.975])
            interval = float(low), float(high)
        return cls(
            kappa if np.isfinite(kappa) else None,
            interval,
            int(whole[0] + whole[3]),
            (int(a.sum()), int(b.sum())),
            len(a),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _kappa(tables: np.ndarray) -> np.ndarray:
    """Kappa [n] of tables [n, 4] of counts: neither, the second alone, the first alone, both; NaN where undefined."""
    shares = tables / tables.sum(1, keepdims=True)
    neither, second, first, both = shares.T
    observed = neither + both
    expected = (neither + second) * (neither + first) + (first + both) * (second + both)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)
