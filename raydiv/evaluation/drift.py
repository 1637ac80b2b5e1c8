"""Drift of a model from its reference: KL(model || reference), estimated from answers that the model samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raydiv.data.prompt_sets import Prompt
from raydiv.evaluation.depth import DepthCurve
from raydiv.evaluation.generate import Request
from raydiv.evaluation.intervals import normal_interval


def sampled_requests(prompts: Sequence[Prompt], count: int) -> list[Request]:
    """Requests for sampled answers to ``count`` of the prompts, drawn with a fixed seed."""
    chosen = np.random.default_rng(0).permutation(len(prompts))[:count]
    return [Request(prompts[number].text, seed=int(number)) for number in sorted(chosen.tolist())]


@dataclass(frozen=True, slots=True)
class KlEstimate:
    """KL(model || reference): mean of sampled answers in nats per answer, its 95% interval, and nats per token.

    ``depth``: the same up to each token.
    """

    value: float
    interval: tuple[float, float] | None
    per_token: float
    answers: int
    depth: DepthCurve

    @classmethod
    def from_logps(cls, model: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> KlEstimate:
        """From the log-probs of both models for the tokens of each answer that ``model`` sampled."""
        by_token = [ours - theirs for ours, theirs in zip(model, reference, strict=True)]
        differences = np.array([values.sum() for values in by_token])
        mean, count = float(differences.mean()), len(differences)
        interval = normal_interval(mean, float(differences.std(ddof=1)) / count**0.5) if count > 1 else None
        per_token = float(differences.sum()) / max(1, sum(map(len, by_token)))
        return cls(mean, interval, per_token, count, DepthCurve.of(by_token))
