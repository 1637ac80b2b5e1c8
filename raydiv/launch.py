"""From a recipe to a finished run: measure, start Ray Train's workers, follow their metrics, write down what came out."""

from __future__ import annotations

import json
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from raydiv.config import Recipe, save_recipe
from raydiv.errors import UserError
from raydiv.measure import measure_answers, measure_separation
from raydiv.prepare import Prepared, fill, read
from raydiv.progress import Display, step_note
from raydiv.session import cpus_per_worker, ray_session, threads_per_worker
from raydiv.track import Tracker
from raydiv.train.worker import MetricsLog, WorkerInput, worker_entry

VERSIONED = ("raydiv", "ray", "torch", "deepspeed", "transformers", "peft", "mlflow")


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: its directory, last metrics, and the content of result.json."""

    directory: Path
    metrics: dict[str, float]
    report: dict[str, Any]


def run_directory(recipe: Recipe) -> Path:
    return Path(recipe.output_dir).expanduser().resolve() / recipe.name


def train(recipe: Recipe, display: Display | None = None, show_text: bool = False) -> Result:
    """One run: prepares what is missing, measures the model, trains, measures again, and leaves a complete run directory.

    ``show_text`` writes prompts and answers into evaluation/; without it there are ids and verdicts only.

    Raises UserError for what the user must change (a run that is already there included), RuntimeError when training fails.
    """
    display = display or Display()
    run = run_directory(recipe)
    _require_no_run(run)
    directory, raw = read(recipe, display)
    _claim(run)
    with ray_session(recipe.cluster):
        prepared = fill(recipe, directory, raw, display)
        save_recipe(recipe, run / "recipe.yaml")
        tracker = Tracker(recipe, _tags(prepared), display.say)
        try:
            with _following(run / "metrics.jsonl", tracker.metrics):
                _measure(recipe, prepared, run, "before", display, show_text)
                _fit(recipe, prepared, run, display)
                _measure(recipe, prepared, run, "after", display, show_text)
            return _conclude(recipe, prepared, run, tracker)
        except BaseException:
            tracker.finish("FAILED")
            raise


def _measure(recipe: Recipe, prepared: Prepared, run: Path, when: str, display: Display, show_text: bool) -> None:
    """Separation and answers, as the recipe asks, of the model ``before`` or ``after`` training."""
    directory = prepared.directory if when == "before" else run / "model"
    common: dict[str, Any] = {
        "cluster": recipe.cluster,
        "display": display,
        "template": recipe.data.template,
        "label": when,
    }
    metrics: dict[str, float] = {}
    if recipe.separation.prompts:
        apart = measure_separation(directory, recipe.separation.prompts, **common)
        apart.write(run / "separation", when)
        metrics |= apart.metrics()
    if recipe.evaluate.prompts:
        answers = measure_answers(
            directory, prepared.directory, recipe.evaluate.prompts, recipe.evaluate.max_new_tokens, **common
        )
        answers.write(run / "evaluation", when, show_text)
        metrics |= answers.metrics()
    step = 0 if when == "before" else prepared.steps(recipe)
    MetricsLog(run / "metrics.jsonl").write({"step": step, **metrics} if metrics else {})


def _require_no_run(run: Path) -> None:
    if (run / "recipe.yaml").exists():
        raise UserError(
            f"{run}: holds a run already; give this one another name=... or another output_dir=..., or remove the directory"
        )


def _claim(run: Path) -> None:
    """Make the run directory, empty of what an earlier attempt that never got to train may have left."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "metrics.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {run} cannot be made: {error.strerror}") from None


def _fit(recipe: Recipe, prepared: Prepared, run: Path, display: Display) -> None:
    """Run the workers to the end, with their metrics on the bar."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    given = WorkerInput(recipe, prepared.directory, run, prepared.train, prepared.eval)
    trainer = TorchTrainer(
        worker_entry,
        train_loop_config={"given": ray.put(given), "threads": threads_per_worker(recipe.cluster)},
        torch_config=TorchConfig(
            backend="nccl" if recipe.cluster.use_gpu else "gloo", timeout_s=recipe.cluster.timeout_s
        ),
        scaling_config=ScalingConfig(
            num_workers=recipe.cluster.num_workers,
            use_gpu=recipe.cluster.use_gpu,
            resources_per_worker={
                "CPU": cpus_per_worker(recipe.cluster),
                **({"GPU": 1} if recipe.cluster.use_gpu else {}),
            },
        ),
        run_config=RunConfig(name=recipe.name, storage_path=str(run / "ray")),
    )
    with display.phase("train") as update:

        def show(record: dict[str, float]) -> None:
            if "loss" in record:
                update(int(record["step"]), prepared.steps(recipe), step_note(record))

        with _following(run / "metrics.jsonl", show):
            _report_failure(trainer.fit)


def _report_failure(fit: Callable[[], Any]) -> None:
    """Run ``fit``; of a worker's failure, keep the user's part of it and not Ray's layers around it."""
    from ray.train import TrainingFailedError

    try:
        fit()
    except TrainingFailedError as error:
        failures = dict(getattr(error, "worker_failures", {}))
        for rank, failure in failures.items():
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
            raise RuntimeError(f"training worker {rank}: {type(cause).__name__}: {cause}") from error
        raise RuntimeError(f"training: {error}") from error


@contextmanager
def _following(path: Path, handle: Callable[[dict[str, float]], None]) -> Iterator[None]:
    """Call ``handle`` with each line that appears in ``path`` while the block runs, and with the last ones after it."""
    stop = threading.Event()

    def tail() -> None:
        offset = 0
        while True:
            last = stop.is_set()
            if path.exists():
                with path.open("rb") as lines:
                    lines.seek(offset)
                    for line in lines:
                        if not line.endswith(b"\n"):
                            break
                        offset += len(line)
                        handle(json.loads(line))
            if last:
                return
            time.sleep(0.3)

    follower = threading.Thread(target=tail, name="metrics", daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behaviour a result depends on."""
    found = {name: metadata.version(name) for name in VERSIONED}
    return {"python": platform.python_version(), **found}


def _tags(prepared: Prepared) -> dict[str, str]:
    summary = prepared.summary()
    fingerprints = {"data.fingerprint": summary["fingerprint"], "model.fingerprint": summary["model_fingerprint"]}
    return fingerprints | {f"version.{name}": version for name, version in versions().items()}


def last_metrics(run: Path) -> dict[str, float]:
    """The latest value of every metric in metrics.jsonl."""
    latest: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        latest.update(json.loads(line))
    return latest


def _conclude(recipe: Recipe, prepared: Prepared, run: Path, tracker: Tracker) -> Result:
    from raydiv.report import write_report

    metrics = last_metrics(run)
    report: dict[str, Any] = {
        "name": recipe.name,
        "metrics": metrics,
        "data": prepared.summary(),
        "versions": versions(),
        "paths": {
            "model": str(run / "model"),
            "report": str(run / "report.html"),
            "metrics": str(run / "metrics.jsonl"),
        },
        "mlflow": {"uri": tracker.uri, "run_id": tracker.run_id},
    }
    (run / "result.json").write_text(json.dumps(report, indent=2) + "\n")
    write_report(run)
    for name in ("recipe.yaml", "result.json", "report.html", "separation/pca.png"):
        if (run / name).exists():
            tracker.artifact(run / name)
    if not tracker.finish():
        report["mlflow"]["unsent"] = True
    return Result(run, metrics, report)
