"""Drift of a model from its reference: KL(model || reference), estimated from answers that the model samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raydiv.data.prompt_sets import Prompt
from raydiv.evaluation.generate import Request
from raydiv.evaluation.intervals import normal_interval


def sampled_requests(prompts: Sequence[Prompt], count: int) -> list[Request]:
    """Requests for sampled answers to ``count`` of the prompts, drawn with a fixed seed."""
    chosen = np.random.default_rng(0).permutation(len(prompts))[:count]
    return [Request(prompts[number].text, seed=int(number)) for number in sorted(chosen.tolist())]


@dataclass(frozen=True, slots=True)
class KlEstimate:
    """KL(model || reference): mean of sampled answers in nats per answer, its 95% interval, and nats per token."""

    value: float
    interval: tuple[float, float] | None
    per_token: float
    answers: int

    @classmethod
    def from_logps(cls, model: Sequence[float], reference: Sequence[float], tokens: int) -> KlEstimate:
        """From the log-probs [n] of both models for answers that ``model`` sampled, of ``tokens`` tokens in all."""
        differences = np.array(model) - np.array(reference)
        mean, count = float(differences.mean()), len(differences)
        interval = normal_interval(mean, float(differences.std(ddof=1)) / count**0.5) if count > 1 else None
        return cls(mean, interval, float(differences.sum()) / max(1, tokens), count)
