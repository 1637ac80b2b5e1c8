"""The answers of an evaluation, read back with their verdicts, and the sample of them that people label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from raydiv.evaluation.judges.verdicts import RATED_VERDICTS, VERDICTS
from raydiv.runs.measurements import readable_prompt
from raydiv.utils.cache import digest
from raydiv.utils.errors import UserError
from raydiv.utils.jsonl import read_records
from raydiv.utils.storage import intact

ENDING = ".answers.jsonl"

COUNT = 60
"""Answers that are drawn by default."""


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """An answer of a ``side`` (before, after, or a model's number) with the first judge's verdict.

    ``key`` is of the content alone: of what was asked and of the answer. ``prompt`` tells prompts apart.
    """

    key: str
    side: str
    prompt: str
    id: str
    harmful: bool
    attack: str
    verdict: str
    asked: str
    answer: str

    @property
    def cell(self) -> Cell:
        return self.side, self.attack, self.harmful

    @classmethod
    def of(cls, record: Mapping[str, Any], side: str) -> JudgedAnswer:
        """Of a line of an answers file with texts."""
        asked, answer = readable_prompt(record["asked"], between="\n\n"), str(record["answer"] or "")
        return cls(
            key=digest(asked, answer),
            side=side,
            prompt=digest(readable_prompt(record["prompt"], between="\n\n"), record["harmful"]),
            id=str(record["id"]),
            harmful=bool(record["harmful"]),
            attack=str(record["attack"]),
            verdict=record["verdict"],
            asked=asked,
            answer=answer,
        )


Cell = tuple[str, str, bool]
"""Answers that make one rate: a side, an attack, and whether the prompts are harmful."""

Strata = Mapping[tuple[Cell, str], Sequence[JudgedAnswer]]
"""Answers by cell and verdict, in the order in which they are drawn."""


def read_answers(folder: Path) -> list[JudgedAnswer]:
    """The judged answers in all files of an evaluation's folder.

    Raises UserError where there is none, and where the files have no texts.
    """
    files = sorted(folder.glob(f"*{ENDING}"))
    if not files:
        raise UserError(f"{folder}: has no *{ENDING}; name a run, or the folder of raydiv evaluate --output")
    answers = [answer for file in files for answer in _answers_of(file)]
    if not answers:
        raise UserError(f"{folder}: has no answers with a verdict")
    return answers


def _answers_of(file: Path) -> Iterator[JudgedAnswer]:
    with intact(file):
        for record in read_records(file):
            if "answer" not in record:
                raise UserError(f"{file}: has no texts to label; evaluate again with --show-text")
            if "harmful" not in record:
                raise UserError(f"{file}: was written by an earlier version; evaluate again with --show-text")
            if record["verdict"] not in VERDICTS:
                raise ValueError(f"unknown verdict {record['verdict']}")
            if record["verdict"] in RATED_VERDICTS:
                yield JudgedAnswer.of(record, file.name.removesuffix(ENDING))


def stratified(answers: Sequence[JudgedAnswer]) -> Strata:
    """Answers by cell and verdict, in an order that is random and depends on their content alone.

    The first answers of each are therefore a random sample, and a larger sample goes on with the next ones.
    """
    strata: dict[tuple[Cell, str], list[JudgedAnswer]] = defaultdict(list)
    for answer in sorted(answers, key=lambda answer: digest("draw", answer.key, answer.side, answer.prompt)):
        strata[answer.cell, answer.verdict].append(answer)
    return strata


SMALLEST_SAMPLE = 3
"""Answers drawn of each verdict of a cell, where there are as many."""


def sample_sizes(strata: Strata, count: int) -> dict[tuple[Cell, str], int]:
    """How many answers of each stratum are drawn, about ``count`` in all.

    Each cell gets an equal part. Within a cell the parts of the verdicts follow their shares, with which the variance
    of the rate is smallest where the judge errs as often on each.
    """
    totals: dict[Cell, int] = defaultdict(int)
    for (cell, _), answers in strata.items():
        totals[cell] += len(answers)
    return {
        (cell, verdict): min(
            len(answers), max(SMALLEST_SAMPLE, round(count / len(totals) * len(answers) / totals[cell]))
        )
        for (cell, verdict), answers in strata.items()
    }


def drawn(strata: Strata, count: int) -> list[JudgedAnswer]:
    """The answers to label, each content once, in an order that does not tell side or verdict."""
    sizes = sample_sizes(strata, count)
    chosen = [answers[: sizes[key]] for key, answers in strata.items()]
    # round after round, so that whoever stops early has labelled the first answers of every stratum
    rounds = [sorted(filter(None, group), key=lambda answer: answer.key) for group in zip_longest(*chosen)]
    return list({answer.key: answer for group in rounds for answer in group}.values())
