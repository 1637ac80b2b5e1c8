"""The report of one model's answers: files, metrics and the cells of a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raydiv.data.prompt_sets import last_user_text
from raydiv.evaluation.attacks import DIRECT, Attempt
from raydiv.evaluation.capability import Capability
from raydiv.evaluation.coherence import PerplexityThreshold
from raydiv.evaluation.drift import KlEstimate
from raydiv.evaluation.generate import GeneratedAnswer
from raydiv.evaluation.judges.harm_judge import HarmJudge
from raydiv.evaluation.judges.verdicts import RATED_VERDICTS
from raydiv.evaluation.labels.answers import COUNT, JudgedAnswer
from raydiv.evaluation.labels.calibrate import calibrate
from raydiv.evaluation.labels.store import read_labels
from raydiv.evaluation.outputs import ModelOutput, format_outputs
from raydiv.evaluation.summary import GradedAnswer, agreements, rates_of
from raydiv.evaluation.win_rate import WinRate
from raydiv.model.chat import ChatPrompt, as_messages
from raydiv.model.template import Messages
from raydiv.runs.measurements import AnswersFile, MeasuredValue
from raydiv.runs.metric_registry import spec_of


@dataclass(frozen=True, slots=True)
class AnswersReport:
    """Verdicts on one model's answers.

    ``logp_per_token`` is the mean log-prob of direct answers under the reference model, ``perplexity`` the model's own
    on held-out helpful answers. ``kl`` is None where it was not measured, as between models of different tokens.
    """

    model: str
    judges: Sequence[HarmJudge]
    attempts: Sequence[Attempt]
    graded: Sequence[GradedAnswer]
    answers: Sequence[GeneratedAnswer]
    logp_per_token: float
    threshold: PerplexityThreshold
    perplexity: float
    kl: KlEstimate | None
    notes: list[str] = field(default_factory=list)
    win_rate: WinRate | None = None
    capability: Capability | None = None

    def values(self) -> Mapping[str, MeasuredValue]:
        """Every value by metric name, as it is read back from the file."""
        return AnswersFile.of(self.as_json()).values

    def metrics(self) -> dict[str, float]:
        values = {name: measured.value for name, measured in self.values().items()}
        return values | ({} if self.win_rate is None else self.win_rate.metrics())

    def harmless(self) -> tuple[list[str], list[str]]:
        """Harmless prompts as text, and the direct answers to them, by which utility is judged."""
        pairs = [
            (last_user_text(graded.prompt), answer.text or "")
            for graded, answer in zip(self.graded, self.answers, strict=True)
            if not graded.prompt.harmful and graded.attack == DIRECT
        ]
        return [instruction for instruction, _ in pairs], [text for _, text in pairs]

    def as_json(self) -> dict[str, Any]:
        """For files and ``--json``."""
        rates = {
            name: {"share": rate.share, "count": rate.count, "of": rate.of, "interval": rate.interval}
            for name, rate in rates_of(self.graded).items()
        }
        return {
            "model": self.model,
            "judges": [{"name": judge.name, "errors": judge.errors} for judge in self.judges],
            "rates": rates,
            "agreement": {judge: agreement.as_json() for judge, agreement in agreements(self.graded).items()},
            "calibrated": self._calibrated(),
            "logp_per_token": self.logp_per_token,
            "coherence": self.threshold.as_json(),
            "perplexity": self.perplexity,
            "kl": None if self.kl is None else asdict(self.kl),
            **({} if self.win_rate is None else {"win_rate": self.win_rate.as_json()}),
            **({} if self.capability is None else self.capability.as_json()),
            "notes": self.notes,
        }

    def _calibrated(self) -> dict[str, Any]:
        """Rates corrected by the labels of the quickstart, where these answers are among the labelled ones."""
        labels = read_labels()
        if not labels:
            return {}
        rows = zip(self.attempts, self.graded, self.answers, strict=True)
        judged = [
            JudgedAnswer.of(self._line(*row, show_text=True), self.model)
            for row in rows
            if row[1].verdict in RATED_VERDICTS
        ]
        if not any(one.key in labels for one in judged):
            return {}
        return calibrate(judged, labels, frozenset(), COUNT, whole=True).of_side(self.model)

    def cells(self) -> dict[str, str]:
        """Every value with its interval as a table shows it, by metric name."""
        cells = {}
        for name, measured in self.values().items():
            spec = spec_of(name)
            interval = spec.range_text(measured.interval, "-")
            cells[name] = spec.text(measured.value) + (f" ({interval})" if interval else "")
        if self.win_rate is not None and self.win_rate.rate is None:
            cells["evaluate/win_rate"] = "unparsable"
        return cells

    def files(self, name: str, show_text: bool) -> dict[str, str]:
        """Files by name: the rates, and a line per answer (prompt, attack, verdict; with ``show_text`` the texts)."""
        rows = zip(self.attempts, self.graded, self.answers, strict=True)
        lines = [self._line(*row, show_text) for row in rows]
        files = {
            f"{name}.json": json.dumps(self.as_json(), indent=1) + "\n",
            f"{name}.answers.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        }
        if show_text:
            pairs = zip(*self.harmless(), strict=True)
            outputs = [ModelOutput(instruction, text, self.model) for instruction, text in pairs]
            files[f"{name}.outputs.json"] = format_outputs(outputs)
        return files

    @staticmethod
    def _line(attempt: Attempt, graded: GradedAnswer, answer: GeneratedAnswer, show_text: bool) -> dict[str, Any]:
        prompt = graded.prompt
        line: dict[str, Any] = {
            "id": prompt.id,
            "set": prompt.set,
            "kind": prompt.kind,
            "category": prompt.category,
            "harmful": prompt.harmful,
        }
        prompts = {"prompt": _without_options(prompt.text), "asked": _without_options(attempt.request.prompt)}
        thought = {} if answer.thought is None else {"thought": answer.thought}
        texts = {**prompts, **thought, "answer": answer.text} if show_text else {}
        if graded.thought_verdict is not None:
            line["thought_verdict"] = graded.thought_verdict
        if answer.error is not None:
            line["error"] = answer.error
        toxicity = {} if graded.toxic is None else {"toxic": graded.toxic}
        others = {"other_verdicts": dict(graded.other_verdicts)} if graded.other_verdicts else {}
        scores = {"harm_scores": dict(graded.harm_scores)} if graded.harm_scores else {}
        return {**line, "attack": graded.attack, "verdict": graded.verdict, **others, **scores, **toxicity, **texts}

    def write(self, folder: Path, name: str, show_text: bool) -> None:
        """Write ``files`` into a folder."""
        folder.mkdir(exist_ok=True)
        for file, content in self.files(name, show_text).items():
            (folder / file).write_text(content)


def _without_options(prompt: ChatPrompt) -> str | Messages:
    """A prompt without its record's tools and template options."""
    return prompt if isinstance(prompt, str) else as_messages(prompt)
