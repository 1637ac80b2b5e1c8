"""What models answer to evaluation prompts, and what is reported of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raydiv.config.recipe import Cluster
from raydiv.data.prompts import Prompt, read_prompts, sets_of
from raydiv.evaluation.generate import Answer, generate
from raydiv.evaluation.judges import JUDGES
from raydiv.evaluation.summary import Rate, rates
from raydiv.measure.models import sources_of
from raydiv.model.load import ModelSource
from raydiv.progress import Display
from raydiv.reference import score
from raydiv.session import ray_session


@dataclass(frozen=True, slots=True)
class AnswersReport:
    """Verdicts on one model's answers; ``logp_per_token`` is their mean log-prob under the reference model, in nats."""

    model: str
    prompts: Sequence[Prompt]
    answers: Sequence[Answer]
    verdicts: list[str]
    judge: str
    logp_per_token: float

    @property
    def rates(self) -> dict[str, Rate]:
        return rates(self.prompts, self.verdicts)

    def metrics(self) -> dict[str, float]:
        return {name: rate.share for name, rate in self.rates.items()} | {
            "evaluate/logp_per_token": self.logp_per_token
        }

    def as_json(self) -> dict[str, Any]:
        found = {
            name: {"share": r.share, "count": r.count, "of": r.of, "interval": r.interval}
            for name, r in self.rates.items()
        }
        return {
            "model": self.model,
            "judge": {"name": self.judge, "errors": JUDGES[self.judge].errors},
            "rates": found,
            "logp_per_token": self.logp_per_token,
        }

    def write(self, folder: Path, name: str, show_text: bool) -> None:
        """The rates, and a line per prompt: id, kind and verdict, and its text only when asked."""
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(self.as_json(), indent=1) + "\n")
        with (folder / f"{name}.answers.jsonl").open("w") as lines:
            for prompt, answer, found in zip(self.prompts, self.answers, self.verdicts, strict=True):
                text = {"prompt": prompt.text, "answer": answer.text} if show_text else {}
                lines.write(json.dumps({"id": prompt.id, "kind": prompt.kind, "verdict": found, **text}) + "\n")


def measure_answers(
    model: ModelSource,
    reference: ModelSource,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    cluster: Cluster,
    display: Display,
    *,
    label: str,
    judge: str = "string",
) -> AnswersReport:
    """What a model answers to ``prompts``, judged, and scored by ``reference``; needs a Ray session."""
    with display.phase(f"answers, {label}") as update:
        answers = generate(model, prompts, max_new_tokens, cluster, update)
    with display.phase(f"answers' log-probs, {label}") as update:
        logps = score(reference, [(answer.prompt_ids, answer.ids) for answer in answers], cluster, update)
    tokens = sum(len(answer.ids) for answer in answers)
    verdicts = JUDGES[judge].judge(prompts, [answer.text for answer in answers])
    return AnswersReport(label, prompts, answers, verdicts, judge, sum(logps) / max(1, tokens))


def evaluate(
    models: Sequence[str],
    prompts: str | Sequence[str] = (),
    *,
    harmful: Sequence[str] = (),
    harmless: Sequence[str] = (),
    reference: str | None = None,
    max_new_tokens: int = 48,
    template: str | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    cluster: Cluster | None = None,
    display: Display | None = None,
) -> list[AnswersReport]:
    """``raydiv evaluate``: a report per model. ``reference`` (by default the first model) scores the answers."""
    display, cluster = display or Display(), cluster or Cluster()
    sources = sources_of(models, template, precision)
    scorer = sources_of([reference], template, precision)[0] if reference else sources[0]
    sets = sets_of(prompts, harmful, harmless, default="bundled:heldout")
    own = read_prompts([source for one in sets for source in one], both=False)
    with ray_session(cluster):
        return [
            measure_answers(source, scorer, own, max_new_tokens, cluster, display, label=model)
            for model, source in zip(models, sources, strict=True)
        ]
