"""The timed workload: the steps of a real run, and the same steps for baseline scripts in separate processes."""

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
from raydiv.runs.metrics_log import Metrics
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.resources import threads_per_worker
from raydiv.runtime.session import ray_session, worker_environment
from raydiv.training.dataloader import ExampleSet
from raydiv.training.schedule import epoch_plan


def without_evaluation(recipe: Recipe, steps: int) -> Recipe:
    """The recipe of a run that makes ``steps`` updates, without evaluation, separation and checkpoints."""
    changes: dict[str, Any] = {
        "optim": recipe.optim.model_copy(
            update={"steps": steps, "epochs": None, "target_margin": None, "early_stop": None}
        ),
        "checkpoint": CheckpointConfig(every=None),
        "data": recipe.data.model_copy(update={"eval": None}),
        "evaluate": recipe.evaluate.model_copy(update={"every": None, "depth_every": None, "prompts": None}),
        "separation": recipe.separation.model_copy(update={"prompts": None}),
    }
    return recipe.model_copy(update=changes)


def with_output_in(recipe: Recipe, folder: str) -> Recipe:
    """The recipe with its output directory and MLflow database in ``folder``."""
    track = recipe.track.model_copy(update={"uri": f"sqlite:///{folder}/mlflow.db"})
    return recipe.model_copy(update={"output_dir": folder, "track": track})


def run_module(name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a module of raydiv in a subprocess; returns its standard output. Raises RuntimeError if it fails."""
    run = subprocess.run(  # noqa: S603 - a module of raydiv
        [sys.executable, "-m", name, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | dict(environment),
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["killed, possibly out of memory"])[-1]
        raise RuntimeError(f"{name.rpartition('.')[2]}: status {run.returncode}: {last[:300]}")
    return run.stdout


def run_script(name: str, settings: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run ``raydiv.commands.bench.NAME`` on a JSON file of ``settings``; returns the JSON object on its last line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.json"
        path.write_text(json.dumps(settings))
        printed = run_module(f"raydiv.commands.bench.{name}", [str(path)], environment)
    answer: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return answer


def timed_run(recipe: Recipe) -> tuple[Result, list[Metrics]]:
    """Train in a temporary directory; returns the result and the metrics of each step."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(with_output_in(recipe, folder), ProgressDisplay(quiet=True))
        return result, [record for record in result.run.metrics.read() if "step_seconds" in record]


@dataclass(frozen=True, slots=True)
class Workload:
    """The steps of a run in the format of ``script``, and the environment variables of its process."""

    settings: dict[str, Any]
    environment: dict[str, str]

    @classmethod
    def from_examples(
        cls, recipe: Recipe, directory: Path, example_set: ExampleSet, steps: int, threads: int
    ) -> Workload:
        """The first ``steps`` steps of a run on ``example_set``, with the model in ``directory``."""
        plan = epoch_plan(recipe, example_set.examples)
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
            "steps": [_step(example_set, plan.step(number)) for number in range(steps)],
        }
        return cls(settings, _environment(recipe))

    @property
    def sizes(self) -> list[int]:
        """Examples of each step."""
        return [len(step["examples"]) for step in self.settings["steps"]]

    @property
    def tokens(self) -> list[int]:
        """Tokens of each step without padding; every example counts once, prompt included."""
        return [
            sum(len(example["prompt_ids"]) + len(example["response_ids"]) for example in step["examples"])
            for step in self.settings["steps"]
        ]

    def script(self, name: str, **settings: Any) -> dict[str, Any]:
        """Run ``raydiv.commands.bench.NAME`` on the workload; returns the JSON object on its last line.

        The script's argument is a JSON file: the model's directory (``model``, with ``attention``,
        ``trust_remote_code`` and ``precision``), the recipe's sections ``lora`` (or null) and ``loss``, AdamW's ``lr,
        betas, eps, weight_decay``, ``clip``, ``max_length``, ``activation_checkpointing``, ``use_gpu``, ``seed``,
        ``threads`` for torch, and ``steps``. Each step has its ``examples`` with ``prompt_ids, response_ids, aligned,
        pair`` (-1 if unpaired) and ``reference_logp``, and its ``mismatched`` examples. The script prints ``seconds``
        and ``tokens`` of each step, and ``peak_bytes``.

        Raises RuntimeError if the script fails.
        """
        return run_script(name, self.settings | settings, self.environment)


def make_workload(recipe: Recipe, steps: int, display: ProgressDisplay) -> Workload:
    """The first ``steps`` steps of the recipe's run, with reference log-probs from the store."""
    model = recipe.model.model_copy(update={"reference": "store"})
    recipe = recipe.model_copy(update={"model": model})
    inputs = load_inputs(recipe, display)
    with ray_session(recipe.cluster):
        prepared = prepare_data(recipe, inputs, display)
        threads = threads_per_worker(recipe.cluster) * recipe.cluster.num_workers
    return Workload.from_examples(recipe, prepared.model_directory, prepared.train, steps, threads)


def _environment(recipe: Recipe) -> dict[str, str]:
    """A worker's environment variables, with a single visible GPU: the scripts are single processes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    single = {"CUDA_VISIBLE_DEVICES": visible} if recipe.cluster.use_gpu else {}
    return single | worker_environment(recipe.cluster)


def _step(example_set: ExampleSet, plan: StepPlan) -> dict[str, Any]:
    examples = _examples(example_set.examples, plan.rows, plan.pair, example_set.reference_logps)
    mismatched: list[dict[str, Any]] = []
    if example_set.mismatched is not None:
        unpaired = np.full(len(plan.rows), -1)
        mismatched = _examples(example_set.mismatched, plan.rows, unpaired, example_set.mismatched_reference_logps)
    return {"examples": examples, "mismatched": mismatched}


def _examples(
    stored: StoredExamples, rows: np.ndarray, pair: np.ndarray, logps: np.ndarray | None
) -> list[dict[str, Any]]:
    assert logps is not None, "make_workload sets model.reference to the store"
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
