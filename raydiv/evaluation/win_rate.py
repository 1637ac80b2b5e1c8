"""Win rate of one model over another: a judge sees every pair twice, with the answers in both orders."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raydiv.config.cluster import ClusterConfig
from raydiv.evaluation.generate import Request, generate
from raydiv.evaluation.intervals import tango_interval
from raydiv.evaluation.judges.harm_judge import judge_model
from raydiv.model.load import ModelSource
from raydiv.utils.progress import Progress, no_progress

PairwiseJudge = Callable[[Sequence[str]], list[str]]
"""From questions, each about one pair in one order, to the judge's answers."""

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
"""Length of a judge's answer: an identifier and a few words around it."""

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
    """A model against a baseline: a verdict per pair, and the judge's position bias.

    ``chosen`` questions were answered with 1 or 2, not a tie; ``first_chosen`` of them with 1.
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
        """(wins + ties / 2) / pairs with a parsable verdict; None where there are none."""
        return (self.count("win") + self.count("tie") / 2) / self.parsable if self.parsable else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the rate."""
        return tango_interval(self.count("win"), self.count("loss"), self.parsable) if self.parsable else None

    @property
    def position_bias(self) -> float | None:
        """Share of choices of the first output; 1/2 for a judge without position bias."""
        return self.first_chosen / self.chosen if self.chosen else None

    def metrics(self) -> dict[str, float]:
        values = {"evaluate/win_rate": self.rate, "evaluate/position_bias": self.position_bias}
        return {name: value for name, value in values.items() if value is not None}

    def as_json(self) -> dict[str, Any]:
        """For files and ``--json``; ``value`` is None where no verdict is parsable."""
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
    questions = [QUESTION.format(instruction=i, first=output, second=other) for i, output, other in pairs]
    questions += [QUESTION.format(instruction=i, first=other, second=output) for i, output, other in pairs]
    choices = [parse_choice(answer) for answer in judge(questions)]
    verdicts = [_pair_verdict(*orders) for orders in zip(choices[: len(pairs)], choices[len(pairs) :], strict=True)]
    return WinRate(verdicts, choices.count("1"), choices.count("1") + choices.count("2"))


def parse_choice(answer: str) -> str | None:
    """``1``, ``2`` or ``tie``, where the first line is that choice alone ("Output 1 is better"); else None."""
    match = _CHOICE.fullmatch(answer.strip().partition("\n")[0])
    return match[1].lower() if match else None


def make_pairwise_judge(model: ModelSource, cluster: ClusterConfig, progress: Progress = no_progress) -> PairwiseJudge:
    """A judge by greedy answers of a chat model; needs a Ray session."""

    def judge(questions: Sequence[str]) -> list[str]:
        requests = [Request(text) for text in questions]
        return [answer.text or "" for answer in generate(model, requests, CHOICE_TOKENS, cluster, progress)]

    return judge


def pairwise_judge_model(name: str, cluster: ClusterConfig) -> ModelSource:
    """The chat model of a judge's name. Raises UserError for one without a chat template."""
    source = judge_model(name, cluster)
    source.chat()
    return source


def _pair_verdict(first_order: str | None, second_order: str | None) -> PairwiseVerdict:
    """Verdict on one pair. A choice that changes with the order is a tie."""
    if first_order is None or second_order is None:
        return "unparsable"
    if (first_order, second_order) == ("1", "2"):
        return "win"
    return "loss" if (first_order, second_order) == ("2", "1") else "tie"
