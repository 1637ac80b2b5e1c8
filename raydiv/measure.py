"""Measuring a model: separation of anchor prompts, and what it answers to evaluation prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.config.recipe import Cluster
from raydiv.data.prompts import Prompt, read_prompts
from raydiv.evaluation.generate import Answer, generate
from raydiv.evaluation.judges import JUDGES
from raydiv.evaluation.summary import Rate, rates
from raydiv.hidden.embed import embed
from raydiv.hidden.separation import Separation, as_row, explain, principal_plane, separation_of
from raydiv.model.files import model_directory
from raydiv.model.load import ModelSource
from raydiv.progress import Display
from raydiv.reference import score
from raydiv.run import RunDirectory
from raydiv.session import ray_session

FIGURES = {
    "d_b": "D_B, paper protocol",
    "silhouette": "silhouette, same plane",
    "d_b_full": "D_B, all dimensions, less chance",
    "frechet": "Frechet distance, squared",
    "probe_auc": "AUC of a linear probe, held out",
    "difference_auc": "AUC of the difference of means, held out",
}
"""Labels of raydiv.hidden.separation.Figures."""


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


@dataclass(frozen=True, slots=True)
class SeparationReport:
    """Separation of one model, with the plane [n, 2] it was read off, and of each prompt its kind and whether it is harmful."""

    model: str
    prompts: str
    separation: Separation
    plane: np.ndarray
    kinds: list[str]
    harmful: list[bool]

    def metrics(self) -> dict[str, float]:
        return as_row(self.separation)

    def as_json(self) -> dict[str, Any]:
        """For files and ``--json``."""
        return {
            "model": self.model,
            "prompts": self.prompts,
            "protocol": "paper",
            **asdict(self.separation),
            "notes": explain(self.separation),
        }

    def table(self) -> list[tuple[str, ...]]:
        """A row per figure: its label, and its value of all prompts, of the length-matched ones, and by chance."""
        found = self.separation
        columns = (found.figures, found.matched, found.shuffled)
        rows = [(label, *(_figure(getattr(one, name, None)) for one in columns)) for name, label in FIGURES.items()]
        low_high = found.d_b_interval
        interval = "-" if low_high is None else f"{low_high[0]:.2f} to {low_high[1]:.2f}"
        rows.insert(1, ("  its 95% interval", interval, "", ""))
        rows.insert(2, ("  its permutation p", f"{found.d_b_p:.3f}", "", ""))
        rows.append(
            ("AUC of token length alone", _figure(found.length_auc), _figure(0.5) if found.matched else "-", "")
        )
        return rows

    def write(self, folder: Path, name: str) -> None:
        folder.mkdir(exist_ok=True)
        points = {"plane": self.plane.tolist(), "kinds": self.kinds, "harmful": self.harmful}
        (folder / f"{name}.json").write_text(json.dumps(self.as_json() | points, indent=1) + "\n")


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


def measure_separation(
    model: ModelSource, source: str, cluster: Cluster, display: Display, *, label: str
) -> SeparationReport:
    """Separation of the prompts of ``source`` in a model's hidden states; needs a Ray session."""
    prompts = read_prompts(source)
    with display.phase(f"separation, {label}") as update:
        hidden, lengths = embed(model, prompts, cluster, update)
    harmful = np.array([prompt.harmful for prompt in prompts])
    kinds = [prompt.kind for prompt in prompts]
    found, plane = separation_of(hidden, harmful, lengths), principal_plane(hidden)
    return SeparationReport(label, source, found, plane, kinds, harmful.tolist())


def measure_answers(
    model: ModelSource,
    reference: ModelSource,
    source: str,
    max_new_tokens: int,
    cluster: Cluster,
    display: Display,
    *,
    label: str,
    judge: str = "string",
) -> AnswersReport:
    """What a model answers to the prompts of ``source``, judged, and scored by ``reference``; needs a Ray session."""
    prompts = read_prompts(source)
    with display.phase(f"answers, {label}") as update:
        answers = generate(model, prompts, max_new_tokens, cluster, update)
    with display.phase(f"answers' log-probs, {label}") as update:
        logps = score(reference, [(answer.prompt_ids, answer.ids) for answer in answers], cluster, update)
    tokens = sum(len(answer.ids) for answer in answers)
    verdicts = JUDGES[judge].judge(prompts, [answer.text for answer in answers])
    return AnswersReport(label, prompts, answers, verdicts, judge, sum(logps) / max(1, tokens))


def resolve(model: str) -> Path:
    """A model directory from what a user names: a run directory, a model directory, a bundled model or a hub id."""
    run = RunDirectory(Path(model))
    return model_directory(str(run.model) if run.holds_a_run else model)


def separation(
    models: Sequence[str],
    prompts: str = "bundled:anchors",
    *,
    template: str | None = None,
    cluster: Cluster | None = None,
    display: Display | None = None,
) -> list[SeparationReport]:
    """``raydiv separation``: a report per model."""
    display, cluster = display or Display(), cluster or Cluster()
    sources = [ModelSource(resolve(model), template) for model in models]
    read_prompts(prompts)
    with ray_session(cluster):
        return [
            measure_separation(source, prompts, cluster, display, label=model)
            for model, source in zip(models, sources, strict=True)
        ]


def evaluate(
    models: Sequence[str],
    prompts: str = "bundled:heldout",
    *,
    reference: str | None = None,
    max_new_tokens: int = 48,
    template: str | None = None,
    cluster: Cluster | None = None,
    display: Display | None = None,
) -> list[AnswersReport]:
    """``raydiv evaluate``: a report per model. ``reference`` (by default the first model) scores the answers."""
    display, cluster = display or Display(), cluster or Cluster()
    sources = [ModelSource(resolve(model), template) for model in models]
    scorer = ModelSource(resolve(reference), template) if reference else sources[0]
    read_prompts(prompts)
    with ray_session(cluster):
        return [
            measure_answers(source, scorer, prompts, max_new_tokens, cluster, display, label=model)
            for model, source in zip(models, sources, strict=True)
        ]
