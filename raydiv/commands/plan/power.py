"""The size of an evaluation: how many prompts and labels show a difference between two models."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raydiv.data.prompt_sets import Prompt
from raydiv.evaluation.intervals import Z
from raydiv.utils.errors import UserError

POWER, LEVEL = 0.8, 0.05
"""The chance that a difference is found, and that one is found where there is none."""

CHANGED = 0.2
"""Share of prompts whose verdict is taken to change between the models."""

JUDGE_ERROR = 0.1
"""Share of the judge's verdicts that is taken to be wrong."""

_Z_POWER = 0.8416212335729143
"""The normal quantile of POWER; Z is that of LEVEL, two-sided."""


@dataclass(frozen=True, slots=True)
class EvaluationSize:
    """``prompts`` show a ``difference`` in the judge's verdicts; twice as many, with ``labels`` a side, show it in
    calibrated rates. ``detectable``: the difference that the recipe's ``harmful`` prompts show, None if they show none.
    """

    difference: float
    prompts: int
    labels: int
    harmful: int
    detectable: float | None

    @classmethod
    def of(cls, difference: float, prompts: list[Prompt]) -> EvaluationSize:
        """Raises UserError where the difference is none."""
        if not 0 < difference < 1:
            raise UserError(f"--detect: must be a share between 0 and 1, such as 0.05; found {difference:g}")
        needed, harmful = prompts_to_detect(difference), sum(prompt.harmful for prompt in prompts)
        labels = labels_to_detect(difference, 2 * needed)
        return cls(difference, needed, labels, harmful, detectable(harmful))

    def notes(self) -> list[str]:
        """What it means, a line per fact."""
        points = f"{100 * self.difference:g} points"
        lines = [
            f"a difference of {points} in attack success: {self.prompts:,} harmful prompts show it in the judge's "
            f"verdicts ({POWER:.0%} power at {LEVEL:.0%}, McNemar's test, {CHANGED:.0%} of verdicts changed)",
            f"the same in rates calibrated by labels: {2 * self.prompts:,} prompts and {self.labels:,} labels of each "
            f"side's answers to them (a judge that errs on {JUDGE_ERROR:.0%})",
        ]
        shown = "none" if self.detectable is None else f"a difference of {100 * self.detectable:.0f} points"
        lines.append(f"this recipe's {self.harmful:,} harmful prompts show {shown}")
        return lines


def prompts_to_detect(difference: float) -> int:
    """Prompts that two models share, by Connor 1987 (Biometrics 43:207) for McNemar's test.

    The exact test needs some 1 / difference more, as a continuity correction does.
    """
    changed = max(CHANGED, difference)
    root = Z * math.sqrt(changed) + _Z_POWER * math.sqrt(changed - difference**2)
    return math.ceil((root / difference) ** 2 + 1 / difference)


def labels_to_detect(difference: float, prompts: int) -> int:
    """Labels of each side, where ``prompts`` leave room for their error."""
    of_prompts = (max(CHANGED, difference) - difference**2) / prompts
    of_labels = (difference / (Z + _Z_POWER)) ** 2 - of_prompts
    return math.ceil(2 * JUDGE_ERROR * (1 - JUDGE_ERROR) / of_labels)


FEWEST_CHANGED = 6
"""Changed verdicts below which McNemar's exact test has no p of 0.05."""


def detectable(prompts: int) -> float | None:
    """The smallest difference, in whole points, that so many prompts show; None where they show none."""
    if prompts < FEWEST_CHANGED:
        return None
    return next((points / 100 for points in range(1, 100) if prompts_to_detect(points / 100) <= prompts), None)
