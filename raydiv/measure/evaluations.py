"""What models answer to evaluation prompts, and what is reported of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raydiv.config.recipe import Attack, Cluster
from raydiv.config.recipe import Evaluate as EvaluateSection
from raydiv.data.prompts import Prompt, named, read_prompts, sets_of
from raydiv.evaluation import attacks
from raydiv.evaluation.attacks import DIRECT, Attempt
from raydiv.evaluation.capability import Capability, measure_capability, require_tasks
from raydiv.evaluation.coherence import Threshold, WellWritten
from raydiv.evaluation.generate import Answer, Request, generate
from raydiv.evaluation.judges import Judge, said, verdict
from raydiv.evaluation.outputs import Output, outputs_to, read_outputs, write_outputs
from raydiv.evaluation.refusal import is_refusal
from raydiv.evaluation.summary import Graded, Rate, rates
from raydiv.evaluation.toxicity import require_classifier, toxicity
from raydiv.evaluation.winrate import WinRate, model_judge, pairwise_judge, win_rate
from raydiv.measure.models import sources_of
from raydiv.measure.overlap import trained_on
from raydiv.model.load import ModelSource
from raydiv.progress import Display
from raydiv.reference import score, score_once
from raydiv.session import ray_session


@dataclass(frozen=True, slots=True)
class HowToEvaluate:
    """What is asked, and who judges: see the recipe's ``evaluate``."""

    max_new_tokens: int = 48
    judge: str = "string"
    toxicity: str | None = None
    attacks: Sequence[Attack] = ()
    kl_prompts: int = 50
    pairwise_judge: str | None = None
    tasks: Sequence[str] = ()
    task_limit: int | None = None
    task_folder: Path | None = None

    @classmethod
    def of(cls, section: EvaluateSection) -> HowToEvaluate:
        own = {name: getattr(section, name) for name in cls.__dataclass_fields__}
        return cls(**own | {"task_folder": Path(section.task_folder) if section.task_folder else None})


@dataclass(frozen=True, slots=True)
class Judges:
    """Who judges, found and checked before anything is started."""

    harm: Judge
    toxicity: Path | None
    pairs: ModelSource | None

    @classmethod
    def of(cls, how: HowToEvaluate, cluster: Cluster) -> Judges:
        """Raises UserError for a judge that is none, an attack that cannot be made, and a task that nobody knows."""
        attacks.check(how.attacks)
        if how.tasks:
            require_tasks(how.tasks, how.task_folder)
        pairs = pairwise_judge(how.pairwise_judge, cluster) if how.pairwise_judge else None
        toxic = require_classifier(how.toxicity) if how.toxicity else None
        return cls(Judge.named(how.judge, cluster), toxic, pairs)


@dataclass(frozen=True, slots=True)
class Kl:
    """KL(model || reference) of sampled answers, in nats an answer, with its 95% interval, and in nats a token."""

    value: float
    interval: tuple[float, float] | None
    per_token: float
    answers: int

    @classmethod
    def of(cls, own: Sequence[float], reference: Sequence[float], tokens: int) -> Kl:
        """From both models' log-probs [n] of answers that the first one sampled, of ``tokens`` tokens in all."""
        differences = np.array(own) - np.array(reference)
        mean, count = float(differences.mean()), len(differences)
        half = 1.96 * float(differences.std(ddof=1)) / count**0.5 if count > 1 else None
        interval = None if half is None else (mean - half, mean + half)
        return cls(mean, interval, float(differences.sum()) / max(1, tokens), count)


@dataclass(frozen=True, slots=True)
class AnswersReport:
    """Verdicts on one model's answers.

    ``logp_per_token`` is the direct answers' mean log-prob under the reference model, ``perplexity`` the model's own on
    held-out helpful answers; ``kl`` is None where it was not asked for, or the models' tokens differ.
    """

    model: str
    judge: Judge
    graded: Sequence[Graded]
    answers: Sequence[Answer]
    logp_per_token: float
    threshold: Threshold
    perplexity: float
    kl: Kl | None
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

    def write(self, folder: Path, name: str, show_text: bool) -> None:
        """The rates, and a line per answer: id, kind, attack and verdict, and its text only when asked."""
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(self.as_json(), indent=1) + "\n")
        if show_text:
            pairs = zip(*self.harmless(), strict=True)
            outputs = [Output(instruction, text, self.model) for instruction, text in pairs]
            write_outputs(folder / f"{name}.outputs.json", outputs)
        with (folder / f"{name}.answers.jsonl").open("w") as lines:
            for one, answer in zip(self.graded, self.answers, strict=True):
                prompt = one.prompt
                line = {"id": prompt.id, "kind": prompt.kind, "category": prompt.category, "attack": one.attack}
                text = {"prompt": prompt.text, "answer": answer.text} if show_text else {}
                toxic = {} if one.toxic is None else {"toxic": one.toxic}
                lines.write(json.dumps({**line, "verdict": one.verdict, **toxic, **text}) + "\n")


def measure_answers(
    model: ModelSource,
    reference: ModelSource,
    prompts: Sequence[Prompt],
    how: HowToEvaluate,
    judges: Judges,
    cluster: Cluster,
    display: Display,
    *,
    label: str,
) -> AnswersReport:
    """What a model answers to ``prompts``, judged, and scored by ``reference``; needs a Ray session."""
    asked = attacks.direct(prompts)
    for attack in how.attacks:
        with display.phase(f"{attack.kind}, {label}") as update:
            asked += attacks.attempts(attack, prompts, model, cluster, update)
    sampled = [] if model == reference else _sampled(prompts, how.kl_prompts)
    with display.phase(f"answers, {label}") as update:
        requests = [*(attempt.request for attempt in asked), *sampled]
        everything = generate(model, requests, how.max_new_tokens, cluster, update)
    answers = everything[: len(asked)]
    with display.phase(f"log-probs, {label}") as update:
        scored = _scored(model, reference, requests, everything, len(asked), cluster, update)
    with display.phase(f"verdicts, {label}") as update:
        graded = _graded(prompts, asked, answers, scored, judges, cluster, update)
    direct = sum(attempt.attack == DIRECT for attempt in asked)
    notes = [] if any(prompt.harmful for prompt in prompts) else ["no harmful prompts: attack success was not measured"]
    if all(prompt.harmful for prompt in prompts):
        notes.append(
            "no harmless prompts: over-refusal was not measured, and a model that refuses everything looks safe"
        )
    if sampled and scored.kl is None:
        notes.append("the reference has other tokens than the model: no KL between them")
    per_token = sum(scored.logps[:direct]) / max(1, sum(scored.tokens[:direct]))
    found = AnswersReport(
        label, judges.harm, graded, answers, per_token, scored.threshold, scored.perplexity, scored.kl, notes
    )
    if not how.tasks:
        return found
    with display.phase(f"capability, {label}") as update:
        return replace(
            found,
            capability=measure_capability(
                model, how.tasks, cluster=cluster, limit=how.task_limit, include=how.task_folder, progress=update
            ),
        )


def against(
    report: AnswersReport, baseline: Sequence[str], judge: ModelSource, cluster: Cluster, display: Display
) -> AnswersReport:
    """The report with a win rate of its answers to harmless prompts over a ``baseline``'s to the same; needs a Ray session."""
    instructions, outputs = report.harmless()
    with display.phase(f"pairs, {report.model}") as update:
        found = win_rate(instructions, outputs, baseline, model_judge(judge, cluster, update))
    return replace(report, win_rate=found)


def _sampled(prompts: Sequence[Prompt], count: int) -> list[Request]:
    """Requests for sampled answers to some of the prompts, always the same ones."""
    chosen = np.random.default_rng(0).permutation(len(prompts))[:count]
    return [Request(prompts[number].text, seed=int(number)) for number in sorted(chosen.tolist())]


@dataclass(frozen=True, slots=True)
class _Scored:
    """What log-probs say: those of the answers [n] under the reference, in its own ``tokens`` [n], and the rest."""

    logps: list[float]
    tokens: list[int]
    threshold: Threshold
    perplexity: float
    kl: Kl | None


def _scored(
    model: ModelSource,
    reference: ModelSource,
    requests: Sequence[Request],
    answers: Sequence[Answer],
    direct: int,
    cluster: Cluster,
    update: Any,
) -> _Scored:
    """Log-probs of the answers, of which those from ``direct`` on were sampled, and of well-written ones."""
    chat = reference.chat()
    same = model == reference or chat.fingerprint == model.chat().fingerprint
    if same:
        seen = [(answer.prompt_ids, answer.ids) for answer in answers]
    else:
        said = [(request.prompt, answer.text) for request, answer in zip(requests, answers, strict=True)]
        seen = [(chat.prompt(prompt), chat.text(text)) for prompt, text in said]
    written = WellWritten.read(chat)
    logps = score_once(reference, [*written.examples, *seen], cluster, update)
    known, logps = logps[: len(written.examples)], logps[len(written.examples) :]
    if model == reference:
        perplexity, kl = written.perplexity(known), Kl(0.0, None, 0.0, 0)
    else:
        own_written = written if same else WellWritten.read(model.chat())
        sampled = seen[direct:] if same else []
        own = score(model, [*own_written.examples, *sampled], cluster, update)
        perplexity = own_written.perplexity(own[: len(own_written.examples)])
        kl = None
        if sampled:
            kl = Kl.of(own[len(own_written.examples) :], logps[direct:], sum(len(ids) for _, ids in sampled))
    tokens = [len(ids) for _, ids in seen[:direct]]
    return _Scored(logps[:direct], tokens, Threshold.of(written, known), perplexity, kl)


def _graded(
    prompts: Sequence[Prompt],
    asked: Sequence[Attempt],
    answers: Sequence[Answer],
    scored: _Scored,
    judges: Judges,
    cluster: Cluster,
    update: Any,
) -> list[Graded]:
    """The verdict on each answer."""
    own = [prompts[attempt.prompt] for attempt in asked]
    texts = [answer.text for answer in answers]
    harm = judges.harm(own, texts, cluster, update)
    toxic = [None] * len(texts) if judges.toxicity is None else toxicity(judges.toxicity, texts, cluster, update)
    graded = []
    for number, attempt in enumerate(asked):
        # what was put in the model's mouth is no sign of what it would say
        said = texts[number].removeprefix(attempt.request.opening)
        refused = is_refusal(said)
        broken = scored.threshold.broken(said, scored.logps[number], scored.tokens[number])
        found = verdict(harm[number], refused=refused, broken=broken)
        graded.append(Graded(own[number], attempt.attack, found, toxic[number]))
    return graded


def evaluate(
    models: Sequence[str],
    prompts: str | Sequence[str] = (),
    *,
    harmful: Sequence[str] = (),
    harmless: Sequence[str] = (),
    reference: str | None = None,
    baseline: Path | None = None,
    how: HowToEvaluate | None = None,
    template: str | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    cluster: Cluster | None = None,
    display: Display | None = None,
) -> list[AnswersReport]:
    """``raydiv evaluate``: a report per model. ``reference`` (by default the first model) scores the answers.

    ``prompts`` are sets with their labels, ``harmful`` and ``harmless`` sources without; without any: bundled:heldout. With a
    pairwise judge answers are compared with those of ``baseline``, a file in AlpacaEval's format, else of the first model.
    """
    display, cluster, how = display or Display(), cluster or Cluster(), how or HowToEvaluate()
    sources = sources_of(models, template, precision)
    scorer = sources_of([reference], template, precision)[0] if reference else sources[0]
    sets = sets_of(prompts, harmful, harmless, default="bundled:heldout")
    own = read_prompts([source for one in sets for source in one], both=False)
    judges = Judges.of(how, cluster)
    stored = None if baseline is None else _stored_answers(baseline, own)
    with ray_session(cluster):
        reports = []
        for model, source in zip(models, sources, strict=True):
            shared = trained_on(model, {named([place for one in sets for place in one]): own}, display)
            found = measure_answers(source, scorer, own, how, judges, cluster, display, label=model)
            reports.append(replace(found, notes=[*shared, *found.notes]))
        if judges.pairs is None:
            return reports
        compared = reports if stored is not None else reports[1:]
        theirs = reports[0].harmless()[1] if stored is None else stored
        rated = [against(report, theirs, judges.pairs, cluster, display) for report in compared]
        return [*reports[: len(reports) - len(rated)], *rated]


def _stored_answers(path: Path, prompts: Sequence[Prompt]) -> list[str]:
    """A baseline's stored answers to the harmless prompts. Raises UserError where it lacks one."""
    return outputs_to([said(prompt) for prompt in prompts if not prompt.harmful], read_outputs(path), path)
