"""How far a model has drifted from its reference: KL(model || reference), from answers that the model samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raydiv.data.prompt_sets import Prompt
from raydiv.evaluation.generate import Request


def sampled_requests(prompts: Sequence[Prompt], count: int) -> list[Request]:
    """Requests for sampled answers to some of the prompts, always the same ones."""
    chosen = np.random.default_rng(0).permutation(len(prompts))[:count]
    return [Request(prompts[number].text, seed=int(number)) for number in sorted(chosen.tolist())]


@dataclass(frozen=True, slots=True)
class KlEstimate:
    """KL(model || reference) of sampled answers, in nats an answer, with its 95% interval, and in nats a token."""

    value: float
    interval: tuple[float, float] | None
    per_token: float
    answers: int

    @classmethod
    def from_logps(cls, own: Sequence[float], reference: Sequence[float], tokens: int) -> KlEstimate:
        """From both models' log-probs [n] of answers that the first one sampled, of ``tokens`` tokens in all."""
        differences = np.array(own) - np.array(reference)
        mean, count = float(differences.mean()), len(differences)
        half = 1.96 * float(differences.std(ddof=1)) / count**0.5 if count > 1 else None
        interval = None if half is None else (mean - half, mean + half)
        return cls(mean, interval, float(differences.sum()) / max(1, tokens), count)
