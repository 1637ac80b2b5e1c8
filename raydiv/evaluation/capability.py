"""What a model can still do: tasks of lm-evaluation-harness (the extra raydiv[capability]), or the user's own in its format."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raydiv.config.cluster import ClusterConfig
from raydiv.model.load import ModelSource
from raydiv.runtime.actor_pool import Progress, map_rows, no_progress
from raydiv.utils.errors import UserError
from raydiv.utils.nearest import nearest

_GENERAL = ["mmlu", "arc_challenge", "hellaswag", "winogrande", "truthfulqa_mc2"]
_MATH = ["gsm8k", "minerva_math500"]

PRESETS = {
    "quick": ["arc_easy", "piqa"],
    "general": _GENERAL,
    "math": _MATH,
    "papers": [*_GENERAL, *_MATH],
}
"""Tasks by the name of a preset. quick scores answers that are given, and generates none; papers is the trade-off of arXiv
2409.07772, general capability and mathematics, which fell most.
"""

BATCH = 8
"""Documents that a model takes at once; changes its speed and memory alone."""

RESAMPLES = 1000
"""Of the bootstrap, for the standard error of metrics that are no means."""


@dataclass(frozen=True, slots=True)
class CapabilityScore:
    """A metric of a task, under the harness's name for it and for the filter that read the answers (none: as they are)."""

    metric: str
    filter: str
    value: float
    stderr: float | None

    @property
    def name(self) -> str:
        return self.metric if self.filter == "none" else f"{self.metric}/{self.filter}"

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%, by the harness's standard error."""
        return None if self.stderr is None else (self.value - 1.96 * self.stderr, self.value + 1.96 * self.stderr)


@dataclass(frozen=True, slots=True)
class TaskScores:
    """What a model scored on ``documents`` of a task, after ``shots`` examples; ``version`` is the task's own."""

    task: str
    scores: list[CapabilityScore]
    documents: int
    shots: int | None
    version: str


@dataclass(frozen=True, slots=True)
class Capability:
    """What a model scored, and what the figures depend on."""

    tasks: list[TaskScores]
    harness: str
    limit: int | None
    chat_template: bool

    def as_json(self) -> dict[str, Any]:
        """For files and ``--json``: each score by its metric name, and what the figures depend on."""
        scores = {
            f"capability/{task.task}/{score.name}": {
                "value": score.value,
                "interval": score.interval,
                "documents": task.documents,
                "shots": task.shots,
                "version": task.version,
            }
            for task in self.tasks
            for score in task.scores
        }
        settings = {"version": self.harness, "limit": self.limit, "chat_template": self.chat_template}
        return {"capability": scores, "harness": settings}


def measure_capability(
    model: ModelSource,
    tasks: Sequence[str],
    *,
    cluster: ClusterConfig,
    limit: int | None = None,
    include: Path | None = None,
    chat_template: bool = False,
    progress: Progress = no_progress,
) -> Capability:
    """Scores on tasks, groups of tasks, and ``PRESETS``, by a Ray Data pool of models, a task each; needs a Ray session.

    ``limit``: documents of each task, the first ones. ``include``: a folder with the user's own tasks (YAML), which every node
    reaches. ``chat_template``: documents become a user's turns; without it the figures compare with published ones of base
    models. Raises UserError for a task that is unknown, or cannot be loaded.
    """
    manager = _task_manager(include)
    names = _task_names(tasks, manager, include)
    arguments = {"model": model, "manager": manager, "limit": limit, "chat_template": chat_template}
    # in workers of their own: the harness prints, and draws bars
    rows = map_rows(
        [{"task": name} for name in names], TaskHarness, arguments, cluster=cluster, batch_rows=1, progress=progress
    )
    from lm_eval import __version__

    return Capability([scores for row in rows for scores in row["scores"]], __version__, limit, chat_template)


class TaskHarness:
    """A model that does tasks; it is loaded after the first of them, which may not be there."""

    def __init__(self, model: ModelSource, manager: Any, limit: int | None, chat_template: bool) -> None:
        # the harness would fork a process that has threads, to resample in
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        self._source = model
        self._manager = manager
        self._limit = limit
        self._chat_template = chat_template

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``task`` -> ``scores``: the task's or group's own, or those of every task of a tag, or group without."""
        return [{"scores": self._scores(row["task"])} for row in rows]

    @cached_property
    def _model(self) -> Any:
        from lm_eval.models.huggingface import HFLM

        tokenizer = self._source.chat().tokenizer
        # log-probs are fp32 as everywhere in raydiv; summed in bf16 they would differ by halves
        return HFLM(
            pretrained=self._source.load_for_inference(), tokenizer=tokenizer, batch_size=BATCH, softmax_dtype="float32"
        )

    def _scores(self, name: str) -> list[TaskScores]:
        from lm_eval import simple_evaluate

        found = simple_evaluate(
            tasks=_loaded(self._manager, name),
            model=self._model,
            task_manager=self._manager,
            limit=self._limit,
            apply_chat_template=self._chat_template,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
        scored = [_task_scores(entry, found) for entry in found["results"]]
        own = [one for one in scored if one.task == name and one.scores]
        return own or [one for one in scored if one.scores]


def _loaded(manager: Any, name: str) -> list[Any]:
    """The task or group by its name, or the tasks of a tag."""
    try:
        loaded = manager.load([name])
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"task {name}: cannot be loaded: {reason} (its data comes from the hub, or from files that it names)"
        ) from None
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {name}: would run code that the model writes, which raydiv does not")
    group = loaded["groups"].get(name)
    return [group] if group is not None else list(loaded["tasks"].values())


def _task_scores(name: str, found: Mapping[str, Any]) -> TaskScores:
    """One entry of the harness's results, whose keys are ``metric,filter`` and ``metric_stderr,filter``."""
    result = found["results"][name]
    scores = []
    for key, value in result.items():
        metric, comma, reading = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = result.get(f"{metric}_stderr,{reading}")
            known = isinstance(stderr, int | float)
            scores.append(CapabilityScore(metric, reading, float(value), float(stderr) if known else None))
    shots, version = found["n-shot"].get(name), found["versions"].get(name)
    return TaskScores(name, scores, int(result.get("sample_len", 0)), shots, str(version))


def require_tasks(tasks: Sequence[str], include: Path | None) -> None:
    """Raises UserError without the harness, and for a task or preset that nobody knows."""
    _task_names(tasks, _task_manager(include), include)


def _task_manager(include: Path | None) -> Any:
    """The harness's index of tasks, with the user's own. Raises UserError without the harness."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("capability: needs lm-evaluation-harness; run: pip install 'raydiv[capability]'")
    if include is not None and not include.is_dir():
        raise UserError(f"{include}: no such folder; tasks of your own are YAML files in a folder")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include.resolve()))


def _task_names(tasks: Sequence[str], manager: Any, include: Path | None) -> list[str]:
    """Names of tasks, presets replaced by theirs, each once. Raises UserError for one that nobody knows."""
    names = list(dict.fromkeys(name for task in tasks for name in PRESETS.get(task, [task])))
    for name in names:
        if name not in manager.all_tasks:
            known = [*PRESETS, *manager.all_tasks]
            hint = nearest(name, known, count=3, otherwise=f"presets: {', '.join(PRESETS)}")
            raise UserError(f"no task {name!r}{hint}{_own(manager, include)}")
    return names


def _own(manager: Any, include: Path | None) -> str:
    """What the user's folder was found to hold: the harness passes over files that it cannot read."""
    if include is None:
        return ""
    entries = manager.task_index.items()
    own = [name for name, entry in entries if entry.yaml_path and entry.yaml_path.is_relative_to(include.resolve())]
    return f"; {include} has {', '.join(own) or 'no task that can be read'}"
