"""The work that is timed: a real run's steps, and the same steps for scripts that run in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.commands.prepare import load_inputs, prepare_data
from raydiv.commands.train import Result, train
from raydiv.config import Recipe
from raydiv.config.checkpoint import CheckpointConfig
from raydiv.data.batching import StepPlan
from raydiv.data.tokens import StoredExamples
from raydiv.runs.directory import Metrics
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.resources import threads_per_worker
from raydiv.runtime.session import ray_session, worker_environment
from raydiv.training.dataloader import ExampleSet
from raydiv.training.order import epochs_of


def steps_alone(recipe: Recipe, steps: int) -> Recipe:
    """The recipe of a run of ``steps`` updates and nothing else: no evaluation, no separation."""
    changes: dict[str, Any] = {
        "optim": recipe.optim.model_copy(
            update={"steps": steps, "epochs": None, "target_margin": None, "early_stop": None}
        ),
        "checkpoint": CheckpointConfig(every=None),
        "data": recipe.data.model_copy(update={"eval": None}),
        "evaluate": recipe.evaluate.model_copy(update={"every": None, "prompts": None}),
        "separation": recipe.separation.model_copy(update={"prompts": None}),
    }
    return recipe.model_copy(update=changes)


def inside(recipe: Recipe, folder: str) -> Recipe:
    """The recipe with everything that a run of it leaves in ``folder``."""
    track = recipe.track.model_copy(update={"uri": f"sqlite:///{folder}/mlflow.db"})
    return recipe.model_copy(update={"output_dir": folder, "track": track})


def run_module(name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a module of ours in a process of its own, to its end; what it prints. Raises RuntimeError when it fails."""
    run = subprocess.run(  # noqa: S603 - our own module
        [sys.executable, "-m", name, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | dict(environment),
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["killed, as for want of memory"])[-1]
        raise RuntimeError(f"{name.rpartition('.')[2]}: status {run.returncode}: {last[:300]}")
    return run.stdout


def run_script(name: str, settings: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run ``raydiv.commands.bench.NAME`` on a JSON file of ``settings``; the JSON object that it prints last."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.json"
        path.write_text(json.dumps(settings))
        printed = run_module(f"raydiv.commands.bench.{name}", [str(path)], environment)
    answer: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return answer


def real_run(recipe: Recipe) -> tuple[Result, list[Metrics]]:
    """A run that leaves nothing behind, and the metrics of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(inside(recipe, folder), ProgressDisplay(quiet=True))
        return result, [record for record in result.run.read_metrics() if "step_seconds" in record]


@dataclass(frozen=True, slots=True)
class Workload:
    """The steps of a run as ``script`` wants them, and the environment of its process."""

    settings: dict[str, Any]
    environment: dict[str, str]

    @classmethod
    def of(cls, recipe: Recipe, directory: Path, given: ExampleSet, steps: int, threads: int) -> Workload:
        """The first steps of a run on the model in ``directory`` and the examples ``given``."""
        plan = epochs_of(recipe, given.examples)
        settings = {
            "model": str(directory),
            **recipe.model.model_dump(mode="json", include={"attention", "trust_remote_code", "lora"}),
            **recipe.engine.model_dump(mode="json", include={"precision", "activation_checkpointing"}),
            "loss": recipe.loss.model_dump(mode="json", by_alias=True),
            **recipe.optim.model_dump(mode="json", include={"lr", "betas", "eps", "weight_decay", "clip"}),
            "max_length": recipe.batch.max_length,
            "use_gpu": recipe.cluster.use_gpu,
            "seed": recipe.seed,
            "threads": threads,
            "steps": [_step(given, plan.step(number)) for number in range(steps)],
        }
        return cls(settings, _environment(recipe))

    @property
    def sizes(self) -> list[int]:
        """Examples of each step."""
        return [len(step["examples"]) for step in self.settings["steps"]]

    @property
    def tokens(self) -> list[int]:
        """Real tokens of each step: every example once, with its prompt."""
        return [
            sum(len(one["prompt_ids"]) + len(one["response_ids"]) for one in step["examples"])
            for step in self.settings["steps"]
        ]

    def script(self, name: str, **settings: Any) -> dict[str, Any]:
        """Run ``raydiv.commands.bench.NAME`` on the work; returns the JSON object that it prints last.

        Its one argument is a JSON file: the model's directory (``model``, with ``attention``, ``trust_remote_code`` and
        ``precision``), the recipe's sections ``lora`` (or null) and ``loss``, AdamW's ``lr, betas, eps, weight_decay`` and
        ``clip``, ``max_length``, ``activation_checkpointing``, ``use_gpu`` and ``seed``, ``threads`` for torch, and ``steps``,
        in order: the ``examples`` of each, with ``prompt_ids, response_ids, aligned, pair`` (-1 without) and
        ``reference_logp``, and its ``mismatched`` ones. It prints ``seconds`` and ``tokens`` of each step, and ``peak_bytes``.

        Raises RuntimeError when it fails.
        """
        return run_script(name, self.settings | settings, self.environment)


def workload_of(recipe: Recipe, steps: int, display: ProgressDisplay) -> Workload:
    """The first ``steps`` steps that a run of the recipe makes, prepared as it would; reference log-probs from the store."""
    model = recipe.model.model_copy(update={"reference": "store"})
    recipe = recipe.model_copy(update={"model": model})
    opened = load_inputs(recipe, display)
    with ray_session(recipe.cluster):
        prepared = prepare_data(recipe, opened, display)
        threads = threads_per_worker(recipe.cluster) * recipe.cluster.num_workers
    return Workload.of(recipe, prepared.directory, prepared.train, steps, threads)


def _environment(recipe: Recipe) -> dict[str, str]:
    """What a worker would have, and of several GPUs one: the scripts are single processes."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    one = {"CUDA_VISIBLE_DEVICES": shown} if recipe.cluster.use_gpu else {}
    return one | worker_environment(recipe.cluster)


def _step(given: ExampleSet, plan: StepPlan) -> dict[str, Any]:
    own = _examples(given.examples, plan.rows, plan.pair, given.reference_logps)
    others: list[dict[str, Any]] = []
    if given.mismatched is not None:
        alone = np.full(len(plan.rows), -1)
        others = _examples(given.mismatched, plan.rows, alone, given.mismatched_reference_logps)
    return {"examples": own, "mismatched": others}


def _examples(
    stored: StoredExamples, rows: np.ndarray, pair: np.ndarray, logps: np.ndarray | None
) -> list[dict[str, Any]]:
    assert logps is not None, "the reference store was asked for"
    labels = zip(stored.aligned[rows].tolist(), pair.tolist(), logps[rows].tolist(), strict=True)
    return [
        {
            "prompt_ids": prompt.tolist(),
            "response_ids": response.tolist(),
            "aligned": aligned,
            "pair": number,
            "reference_logp": logp,
        }
        for (prompt, response), (aligned, number, logp) in zip(stored.ids(rows), labels, strict=True)
    ]
