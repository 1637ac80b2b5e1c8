"""What each token of a response adds to its example's log-prob: weights by position or by a model, or a bound on its
log-ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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

    by_token: ClassVar[bool] = False
    """Whether it takes the reference's log-prob of each token."""

    @property
    def store_key(self) -> str:
        """What tells the reference store's entries apart."""
        return str(self)

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


STORED_TERMS = "by token"
"""The store's key of log-probs token by token, which no option of a rule changes."""

SMALLEST_BETA = 1e-3
"""Of a token constraint: with smaller ones, rounding in fp32 is more than 1e-4 nats a token."""


@dataclass(frozen=True, slots=True)
class TokenConstraint:
    """The token-wise constraint of Qi et al. 2024 (arXiv 2406.05946, section 4), for any objective.

    A token with log-ratio d = log pi(y_t|...) - log pi_ref(y_t|...) adds phi_t(d) = 2/b_t (log s(b_t d) + log 2) to its
    example's log-ratio in place of d, where b_t is the t-th of ``betas``, whose last one is that of all later tokens.
    phi(0) = 0; the slope 2 s(-b d) is 1 at d = 0, falls to 0 where the policy has raised the token, and rises to 2
    where it has lowered it. So a token gains at most 2/b log 2 nats. With ``sft`` it is the paper's objective, up to a
    constant; its own values are 0.5 for the first token, 2 for the next four and 0.1 for the others.

    What PositionWeights says of estimates holds here too.
    """

    betas: tuple[float, ...]

    by_token: ClassVar[bool] = True
    store_key: ClassVar[str] = STORED_TERMS
    depends_on_pair: ClassVar[bool] = False

    def of(self, length: int) -> np.ndarray:
        """b_1 ... b_length, [length], fp32."""
        import numpy as np

        return np.array([*self.betas[:length], *[self.betas[-1]] * (length - len(self.betas))], np.float32)


@dataclass(frozen=True, slots=True)
class RewardWeights:
    """w_t = exp(-r_t / ``temperature``) for the tokens of aligned responses, 1 for those of unaligned ones.

    r_t = log pi_m(y_t|...) - log pi_ref(y_t|...) is the token's reward by another ``model`` m, such as one that DPO
    trained. A positive temperature gives the tokens that m has not learned to raise more weight, as in the published
    code of W-DOOR (Zhao et al. 2025, arXiv 2503.03710: ``exp_weights``); a negative one those that m raised, the sign
    of TIS-DPO (Liu et al. 2024, arXiv 2410.04350).

    The reward of an example then depends on its class. So what the objective's formula estimates is no lower bound of a
    divergence, and has no name in a run's metrics.
    """

    model: str
    temperature: float

    by_token: ClassVar[bool] = True
    store_key: ClassVar[str] = STORED_TERMS
    depends_on_pair: ClassVar[bool] = False

    def of(self, logps: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """w_t from the log-probs [t] of the model and of the reference, fp32; inf beyond fp32's largest number."""
        import numpy as np

        with np.errstate(over="ignore"):
            weights: np.ndarray = np.exp((reference - logps) / self.temperature).astype(np.float32)
        return weights


PositionRule = PositionWeights | TokenConstraint | RewardWeights
