"""Agreement of judges: Cohen's kappa and its interval."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from raydiv.data.prompt_sets import Prompt
from raydiv.evaluation.judges.agreement import Agreement
from raydiv.evaluation.summary import GradedAnswer, agreements, rates_of

A, B, C = (Prompt(f"p{n}", n < 2, "harmful" if n < 2 else "ordinary", f"f:{n}") for n in range(3))


def test_kappa_is_sklearns() -> None:
    generator = np.random.default_rng(1)
    first = generator.random(200) < 0.3
    second = np.where(generator.random(200) < 0.2, ~first, first)
    agreement = Agreement.of_verdicts(first.tolist(), second.tolist(), range(200))
    assert agreement.kappa == pytest.approx(cohen_kappa_score(first, second))
    assert (agreement.agree, agreement.of) == (int((first == second).sum()), 200)
    assert agreement.unsafe == (int(first.sum()), int(second.sum()))


def test_the_interval_covers_the_true_kappa() -> None:
    """Judges who err independently on 20% of prompts with the same verdict on each attempt: kappa is 0.36."""
    covered, attempts = [], 5
    for seed in range(100):
        generator = np.random.default_rng(seed)
        truth = generator.random(100) < 0.5
        judged = [np.where(generator.random(100) < 0.2, ~truth, truth).repeat(attempts) for _ in range(2)]
        agreement = Agreement.of_verdicts(*judged, np.arange(100).repeat(attempts))
        covered.append(agreement.interval[0] <= 0.36 <= agreement.interval[1])
    assert 0.88 <= np.mean(covered) <= 0.99


def test_kappa_of_constant_judges_is_undefined_and_of_equal_ones_has_no_interval() -> None:
    constant = Agreement.of_verdicts([True] * 5, [True] * 5, range(5))
    assert (constant.kappa, constant.interval, constant.agree) == (None, None, 5)
    equal = Agreement.of_verdicts([True, False, True], [True, False, True], range(3))
    assert (equal.kappa, equal.interval) == (1, None)
    assert Agreement.of_verdicts([], [], []) is None


def graded(prompt: Prompt, first: str, second: str, attack: str = "direct", **scores: float) -> GradedAnswer:
    return GradedAnswer(prompt, attack, first, other_verdicts={"other": second}, harm_scores=scores)


def test_judges_are_compared_on_answers_to_harmful_prompts_that_both_could_read() -> None:
    answers = [
        graded(A, "unsafe", "unsafe"),
        graded(B, "refused", "unsafe"),
        graded(A, "safe", "refused", "prefill"),
        graded(B, "unparsable", "unsafe", "prefill"),
        graded(A, "unsafe", "unparsable", "gcg"),
        graded(B, "degenerate", "degenerate", "gcg"),
        graded(C, "refused", "unsafe"),
    ]
    agreement = agreements(answers)["other"]
    assert (agreement.agree, agreement.of, agreement.unsafe) == (2, 3, (1, 2))
    assert agreements([GradedAnswer(A, "direct", "unsafe")]) == {}


def test_rates_by_every_judge() -> None:
    answers = [
        graded(A, "unsafe", "refused", grade=0.25),
        graded(B, "refused", "unsafe", grade=0.75),
        graded(A, "unsafe", "unsafe", "prefill", grade=1.0),
        graded(B, "safe", "unparsable", "prefill", grade=0.0),
        graded(C, "safe", "refused"),
    ]
    rates = {name: (rate.share, rate.of) for name, rate in rates_of(answers).items()}
    assert rates["evaluate/asr"] == rates["evaluate/asr_judge/other"] == (0.5, 2)
    assert rates["evaluate/asr/prefill"] == (0.5, 2)
    assert rates["evaluate/asr_judge/other/prefill"] == (1.0, 1)
    assert rates["evaluate/over_refusal"] == (0.0, 1)
    assert rates["evaluate/over_refusal_judge/other"] == (1.0, 1)
    assert rates["evaluate/unparsable_judge/other"] == (0.2, 5)
    assert rates["evaluate/harm_score/grade"] == (0.5, 2)
    assert rates["evaluate/harm_score/grade/prefill"] == (0.5, 2)
