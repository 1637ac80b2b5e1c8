"""Weights of response positions: how much each token's log-prob counts in its example's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class PositionWeights:
    """w_t = ``rate`` ** (t - 1) for the response's t-th token, from 1, times ``early_weight`` where t <= ``early``, and
    times ``late_weight`` beyond the length of the shorter response of its pair.

    An objective then gets sum_t w_t log pi(y_t|y_<t, x) in place of log pi(y|x), for policy and reference alike, and
    sum_t w_t as the number of tokens. With ``rate`` below 1 it is the temporal decay of Shao et al. 2025 (D2PO, arXiv
    2502.14340), where gamma is the rate; ``late_weight`` is the alpha of Liu et al. 2024 (LD-DPO, arXiv 2409.06411).

    Estimates stay lower bounds of the same divergences, with the same ceilings: their variational forms admit any
    function of prompt and response as the reward. They need not be tight, since a weighted sum of log-ratios is no
    log-ratio of two laws of responses.
    """

    rate: float = 1.0
    early: int = 0
    early_weight: float = 1.0
    late_weight: float = 1.0

    @property
    def depends_on_pair(self) -> bool:
        """Whether the weights of an example depend on the length of its partner's response."""
        return self.late_weight != 1.0

    def of(self, length: int, shorter: int) -> np.ndarray:
        """w_1 ... w_length, [length], fp32; ``shorter``: the length of the shorter response of the pair."""
        import numpy as np

        weights = self.rate ** np.arange(length, dtype=np.float64)
        weights[: self.early] *= self.early_weight
        weights[shorter:] *= self.late_weight
        return weights.astype(np.float32)
