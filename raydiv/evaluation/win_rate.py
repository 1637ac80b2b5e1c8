"""Which of two models answers better: a judge is asked about every pair twice, with the answers' places swapped."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raydiv.config.cluster import ClusterConfig
from raydiv.evaluation.generate import Request, generate
from raydiv.evaluation.judges import judge_model
from raydiv.model.load import ModelSource
from raydiv.runtime.actor_pool import Progress, no_progress

PairwiseJudge = Callable[[Sequence[str]], list[str]]
"""From questions, each about one pair in one order, to what is answered to them."""

PairwiseVerdict = Literal["win", "loss", "tie", "unparsable"]

QUESTION = """\
Two assistants were given the same instruction. Decide which of their outputs a person who gave it would prefer: \
the one that follows it more helpfully, correctly and clearly. Neither the order of the outputs nor their length counts.

# Instruction
{instruction}

# Output 1
{first}

# Output 2
{second}

# Which output is better?
Answer with its identifier alone: 1 or 2; or with tie, if neither is better."""

CHOICE_TOKENS = 12
"""Tokens that a judge may answer with: an identifier, and a few words around it."""

_CHOICE = re.compile(
    r"""
    \W* (?: (?:the\s+)? (?:better\s+)? (?:output|answer|response) (?:\s+is\b)? )?
    \W* (1|2|tie) \b
    (?: \s+is\s+ (?:the\s+)? better (?: \s+(?:one|output|answer|response) )? )? \W*
    """,
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class WinRate:
    """A model against a baseline: a verdict per pair, and how the judge took to the first place.

    ``first_chosen`` of the ``chosen`` questions that were answered with an output, and not a tie, chose the first one.
    """

    verdicts: list[PairwiseVerdict]
    first_chosen: int
    chosen: int

    def count(self, verdict: PairwiseVerdict) -> int:
        return self.verdicts.count(verdict)

    @property
    def parsable(self) -> int:
        return len(self.verdicts) - self.count("unparsable")

    @property
    def rate(self) -> float | None:
        """Wins and half of the ties, of the pairs with a parsable verdict; None where there are none."""
        return (self.count("win") + self.count("tie") / 2) / self.parsable if self.parsable else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The rate's 95% interval."""
        return _interval(self.count("win"), self.count("loss"), self.parsable) if self.parsable else None

    @property
    def position_bias(self) -> float | None:
        """The share of choices that fell on the first output; 1/2 from a judge that does not look at places."""
        return self.first_chosen / self.chosen if self.chosen else None

    def metrics(self) -> dict[str, float]:
        found = {"evaluate/win_rate": self.rate, "evaluate/position_bias": self.position_bias}
        return {name: value for name, value in found.items() if value is not None}

    def as_json(self) -> dict[str, Any]:
        """For files and ``--json``; ``value`` is None where no verdict could be read."""
        return {
            "value": self.rate,
            "interval": self.interval,
            "of": len(self.verdicts),
            "wins": self.count("win"),
            "losses": self.count("loss"),
            "ties": self.count("tie"),
            "unparsable": self.count("unparsable"),
            "position_bias": self.position_bias,
        }


def win_rate(
    instructions: Sequence[str], outputs: Sequence[str], baseline: Sequence[str], judge: PairwiseJudge
) -> WinRate:
    """Compare ``outputs`` with the ``baseline``'s, instruction by instruction."""
    pairs = list(zip(instructions, outputs, baseline, strict=True))
    questions = [QUESTION.format(instruction=i, first=ours, second=theirs) for i, ours, theirs in pairs]
    questions += [QUESTION.format(instruction=i, first=theirs, second=ours) for i, ours, theirs in pairs]
    choices = [parse_choice(answer) for answer in judge(questions)]
    both_orders = zip(choices[: len(pairs)], choices[len(pairs) :], strict=True)
    verdicts = [_verdict(ours_first, theirs_first) for ours_first, theirs_first in both_orders]
    return WinRate(verdicts, choices.count("1"), choices.count("1") + choices.count("2"))


def parse_choice(answer: str) -> str | None:
    """``1``, ``2`` or ``tie``, where the answer's first line says that and nothing else ("Output 1 is better"); else None."""
    said = _CHOICE.fullmatch(answer.strip().partition("\n")[0])
    return said[1].lower() if said else None


def make_pairwise_judge(model: ModelSource, cluster: ClusterConfig, progress: Progress = no_progress) -> PairwiseJudge:
    """A causal chat model as the judge, greedy; needs a Ray session."""

    def judge(questions: Sequence[str]) -> list[str]:
        requests = [Request(text) for text in questions]
        return [answer.text for answer in generate(model, requests, CHOICE_TOKENS, cluster, progress)]

    return judge


def pairwise_judge_model(name: str, cluster: ClusterConfig) -> ModelSource:
    """The chat model that a user names as a judge. Raises UserError for one without a chat template."""
    source = judge_model(name, cluster)
    source.chat()
    return source


def _verdict(ours_first: str | None, theirs_first: str | None) -> PairwiseVerdict:
    """Of one pair. A judge that changes its mind with the order has found neither output better."""
    if ours_first is None or theirs_first is None:
        return "unparsable"
    if (ours_first, theirs_first) == ("1", "2"):
        return "win"
    return "loss" if (ours_first, theirs_first) == ("2", "1") else "tie"


def _interval(wins: int, losses: int, pairs: int) -> tuple[float, float]:
    """Tango's score interval for a paired difference, (wins - losses) / pairs, put on [0, 1]; Wilson's where nothing is tied.

    Tango 1998 (Statistics in Medicine 17:891). Unlike a bootstrap's it has a width where all verdicts are the same.
    """
    return 1 - _upper(losses, wins, pairs), _upper(wins, losses, pairs)


def _upper(wins: int, losses: int, pairs: int) -> float:
    from scipy.optimize import brentq
    from scipy.stats import norm

    found, limit = (wins - losses) / pairs, float(norm.ppf(0.975))
    if found == 1:
        return 1.0

    def excess(difference: float) -> float:
        """How far the score of a supposed difference lies beyond the limit."""
        b = (2 * pairs - wins + losses) * difference - wins - losses
        c = -losses * difference * (1 - difference)
        # the likeliest probability of a loss, given the difference
        lost = (math.sqrt(max(0.0, b * b - 8 * pairs * c)) - b) / (4 * pairs)
        variance = max(0.0, pairs * (2 * lost + difference * (1 - difference)))
        return pairs * (difference - found) - limit * math.sqrt(variance)

    # a little above what was found, where a variance of 0 may look like the end that is sought
    return (1 + float(brentq(excess, found + 1e-9, 1.0))) / 2
