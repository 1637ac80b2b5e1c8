"""General capability by tasks of lm-evaluation-harness (extra raydiv[capability]), or by users' tasks in its format."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raydiv.config.cluster import ClusterConfig
from raydiv.evaluation.intervals import normal_interval
from raydiv.model.load import ModelSource
from raydiv.runtime.model_pool import map_rows
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.nearest import nearest
from raydiv.utils.progress import Progress, no_progress

_GENERAL = ["mmlu", "arc_challenge", "hellaswag", "winogrande", "truthfulqa_mc2"]
_MATH = ["gsm8k", "minerva_math500"]

PRESETS = {
    "quick": ["arc_easy", "piqa"],
    "general": _GENERAL,
    "math": _MATH,
    "papers": [*_GENERAL, *_MATH],
}
"""Tasks by preset. quick scores given answers and generates none. papers measures the trade-off of arXiv 2409.07772:
general capability and mathematics, which fell most.
"""

BATCH_SIZE = 8
"""Documents in a batch; changes speed and memory alone."""

BOOTSTRAP_SAMPLES = 1000
"""Bootstrap samples for the standard error of metrics that are not means."""


@dataclass(frozen=True, slots=True)
class CapabilityScore:
    """A metric of a task, by the harness's names of the metric and of its answers' filter (``none``: unfiltered)."""

    metric: str
    filter: str
    value: float
    stderr: float | None

    @property
    def name(self) -> str:
        return self.metric if self.filter == "none" else f"{self.metric}/{self.filter}"

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval from the harness's standard error."""
        return None if self.stderr is None else normal_interval(self.value, self.stderr)


@dataclass(frozen=True, slots=True)
class TaskScores:
    """A model's scores on ``documents`` of a task with ``shots`` examples in the prompt; ``version`` is the task's."""

    task: str
    scores: list[CapabilityScore]
    documents: int
    shots: int | None
    version: str


@dataclass(frozen=True, slots=True)
class Capability:
    """A model's scores, and the settings they depend on."""

    tasks: list[TaskScores]
    harness: str
    limit: int | None
    chat_template: bool

    def as_json(self) -> dict[str, Any]:
        """For files and ``--json``: each score by its metric name, and the settings."""
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
    """Scores on tasks, task groups and ``PRESETS``, by an actor pool with a task per call; needs a Ray session.

    ``limit``: number of documents of each task, from its first. ``include``: a folder of users' tasks (YAML) that every
    node can read. ``chat_template``: render documents as user turns; without it scores compare with published ones of
    base models. Raises UserError for a task that is unknown, or cannot be loaded.
    """
    manager = _task_manager(include)
    names = _task_names(tasks, manager, include)
    arguments = {"model": model, "manager": manager, "limit": limit, "chat_template": chat_template}
    # in actors, because the harness prints and draws progress bars
    rows = map_rows(
        [{"task": name} for name in names], TaskHarness, arguments, cluster=cluster, batch_rows=1, progress=progress
    )
    from lm_eval import __version__

    return Capability([scores for row in rows for scores in row["scores"]], __version__, limit, chat_template)


class TaskHarness:
    """Actor that runs tasks; it loads the model after its first task, because loading the task may fail."""

    def __init__(self, model: ModelSource, manager: Any, limit: int | None, chat_template: bool) -> None:
        # the harness would fork this process, which has threads, for its bootstrap
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        self._source = model
        self._manager = manager
        self._limit = limit
        self._chat_template = chat_template

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``task`` -> ``scores``: of the task or group, or of the tasks of a tag or group without scores."""
        return [{"scores": self._scores(row["task"])} for row in rows]

    @cached_property
    def _model(self) -> Any:
        from lm_eval.models.huggingface import HFLM

        tokenizer = self._source.chat().tokenizer
        # fp32 as everywhere in raydiv: log-probs summed in bf16 are wrong by up to 0.5
        return HFLM(
            pretrained=self._source.load_for_inference(),
            tokenizer=tokenizer,
            batch_size=BATCH_SIZE,
            softmax_dtype="float32",
        )

    def _scores(self, name: str) -> list[TaskScores]:
        from lm_eval import simple_evaluate

        results = simple_evaluate(
            tasks=_load_tasks(self._manager, name),
            model=self._model,
            task_manager=self._manager,
            limit=self._limit,
            apply_chat_template=self._chat_template,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            log_samples=False,
        )
        scored = [scores for entry in results["results"] if (scores := _task_scores(entry, results)).scores]
        return [scores for scores in scored if scores.task == name] or scored


def _load_tasks(manager: Any, name: str) -> list[Any]:
    """The task or group of that name, or the tasks of a tag. Raises UserError when loading fails, or the task runs
    code.
    """
    try:
        loaded = manager.load([name])
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        reason = one_line(error, 300)
        raise UserError(
            f"task {name}: cannot be loaded: {reason} (its data comes from the hub, or from files named in it)"
        ) from None
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {name}: not supported, because it runs code that the model writes")
    group = loaded["groups"].get(name)
    return [group] if group is not None else list(loaded["tasks"].values())


def _task_scores(name: str, results: Mapping[str, Any]) -> TaskScores:
    """An entry of the harness's results, whose keys are ``metric,filter`` and ``metric_stderr,filter``."""
    result = results["results"][name]
    scores = []
    for key, value in result.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = result.get(f"{metric}_stderr,{filter_name}")
            has_stderr = isinstance(stderr, int | float)
            scores.append(CapabilityScore(metric, filter_name, float(value), float(stderr) if has_stderr else None))
    shots, version = results["n-shot"].get(name), results["versions"].get(name)
    return TaskScores(name, scores, int(result.get("sample_len", 0)), shots, str(version))


def require_tasks(tasks: Sequence[str], include: Path | None) -> None:
    """Raises UserError when the harness is not installed, and for an unknown task or preset."""
    _task_names(tasks, _task_manager(include), include)


def _task_manager(include: Path | None) -> Any:
    """The harness's index of tasks and of the folder's. Raises UserError when the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("capability: needs lm-evaluation-harness; run: pip install 'raydiv[capability]'")
    if include is not None and not include.is_dir():
        raise UserError(f"{include}: no such folder; expected a folder of task files (YAML)")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include.resolve()))


def _task_names(tasks: Sequence[str], manager: Any, include: Path | None) -> list[str]:
    """Distinct task names, with presets replaced by their tasks. Raises UserError for an unknown name."""
    names = list(dict.fromkeys(name for task in tasks for name in PRESETS.get(task, [task])))
    for name in names:
        if name not in manager.all_tasks:
            known = [*PRESETS, *manager.all_tasks]
            hint = nearest(name, known, count=3, otherwise=f"presets: {', '.join(PRESETS)}")
            raise UserError(f"unknown task {name!r}{hint}{_folder_hint(manager, include)}")
    return names


def _folder_hint(manager: Any, include: Path | None) -> str:
    """The tasks that were read from the user's folder: the harness skips invalid files without a message."""
    if include is None:
        return ""
    entries = manager.task_index.items()
    tasks = [name for name, entry in entries if entry.yaml_path and entry.yaml_path.is_relative_to(include.resolve())]
    return f"; {include} has {', '.join(tasks) or 'no valid task'}"
