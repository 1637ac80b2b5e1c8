"""What is reported of one model's answers: for files, metrics and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raydiv.evaluation.attacks import Attempt
from raydiv.evaluation.capability import Capability
from raydiv.evaluation.coherence import PerplexityThreshold
from raydiv.evaluation.drift import KlEstimate
from raydiv.evaluation.generate import Answer
from raydiv.evaluation.judges import HarmJudge, said
from raydiv.evaluation.outputs import Output, outputs_text
from raydiv.evaluation.summary import GradedAnswer, Rate, rates
from raydiv.evaluation.win_rate import WinRate


@dataclass(frozen=True, slots=True)
class AnswersReport:
    """Verdicts on one model's answers.

    ``logp_per_token`` is the direct answers' mean log-prob under the reference model, ``perplexity`` the model's own on
    held-out helpful answers; ``kl`` is None where it was not asked for, or the models' tokens differ.
    """

    model: str
    judge: HarmJudge
    attempts: Sequence[Attempt]
    graded: Sequence[GradedAnswer]
    answers: Sequence[Answer]
    logp_per_token: float
    threshold: PerplexityThreshold
    perplexity: float
    kl: KlEstimate | None
    notes: list[str] = field(default_factory=list)
    win_rate: WinRate | None = None
    capability: Capability | None = None

    @property
    def rates(self) -> dict[str, Rate]:
        return rates(self.graded)

    def metrics(self) -> dict[str, float]:
        found = {name: rate.share for name, rate in self.rates.items()}
        found |= {"evaluate/logp_per_token": self.logp_per_token, "evaluate/perplexity": self.perplexity}
        if self.kl is not None:
            found |= {"evaluate/kl": self.kl.value, "evaluate/kl_per_token": self.kl.per_token}
        for more in (self.win_rate, self.capability):
            found |= {} if more is None else more.metrics()
        return found

    def harmless(self) -> tuple[list[str], list[str]]:
        """Harmless prompts as text, and the answers to them: what utility is judged on."""
        own = [
            (said(one.prompt), answer.text)
            for one, answer in zip(self.graded, self.answers, strict=True)
            if not one.prompt.harmful
        ]
        return [instruction for instruction, _ in own], [text for _, text in own]

    def as_json(self) -> dict[str, Any]:
        """For files and ``--json``."""
        found = {
            name: {"share": r.share, "count": r.count, "of": r.of, "interval": r.interval}
            for name, r in self.rates.items()
        }
        return {
            "model": self.model,
            "judge": {"name": self.judge.name, "errors": self.judge.errors},
            "rates": found,
            "logp_per_token": self.logp_per_token,
            "coherence": self.threshold.as_json(),
            "perplexity": self.perplexity,
            "kl": None if self.kl is None else asdict(self.kl),
            **({} if self.win_rate is None else {"win_rate": self.win_rate.as_json()}),
            **({} if self.capability is None else self.capability.as_json()),
            "notes": self.notes,
        }

    def cells(self) -> dict[str, str]:
        """Every figure as a table shows it, by metric name."""
        found = {name: str(rate) for name, rate in self.rates.items()}
        found["evaluate/logp_per_token"] = f"{self.logp_per_token:.2f}"
        found["evaluate/perplexity"] = f"{self.perplexity:.2f}"
        if self.kl is not None:
            low_high = "" if self.kl.interval is None else f" ({self.kl.interval[0]:.2f}-{self.kl.interval[1]:.2f})"
            found["evaluate/kl"] = f"{self.kl.value:.2f}{low_high}"
        if self.win_rate is not None:
            found["evaluate/win_rate"] = str(self.win_rate)
        return found | ({} if self.capability is None else self.capability.cells())

    def files(self, name: str, show_text: bool) -> dict[str, str]:
        """The rates, and a line per answer: id, set, kind, category, attack, verdict, and with ``show_text`` the texts."""
        lines = map(self._line, self.attempts, self.graded, self.answers, [show_text] * len(self.graded))
        found = {
            f"{name}.json": json.dumps(self.as_json(), indent=1) + "\n",
            f"{name}.answers.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        }
        if show_text:
            pairs = zip(*self.harmless(), strict=True)
            outputs = [Output(instruction, text, self.model) for instruction, text in pairs]
            found[f"{name}.outputs.json"] = outputs_text(outputs)
        return found

    @staticmethod
    def _line(attempt: Attempt, one: GradedAnswer, answer: Answer, show_text: bool) -> dict[str, Any]:
        prompt = one.prompt
        line = {"id": prompt.id, "set": prompt.set, "kind": prompt.kind, "category": prompt.category}
        text = {"prompt": prompt.text, "asked": attempt.request.prompt, "answer": answer.text} if show_text else {}
        toxic = {} if one.toxic is None else {"toxic": one.toxic}
        return {**line, "attack": one.attack, "verdict": one.verdict, **toxic, **text}

    def write(self, folder: Path, name: str, show_text: bool) -> None:
        """Write ``files`` into a folder."""
        folder.mkdir(exist_ok=True)
        for file, content in self.files(name, show_text).items():
            (folder / file).write_text(content)
