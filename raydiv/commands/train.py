"""``raydiv train``: prepare the data, evaluate the base model, train, evaluate again, write the results."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raydiv.commands.plan.architecture import architecture_of
from raydiv.commands.plan.layout import choose_layout, largest_budget, with_layout
from raydiv.commands.preflight import require_ready
from raydiv.commands.prepare import LoadedInputs, PreparedData, load_inputs, local_files, prepare_data
from raydiv.config import Recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.evaluation.before_after import BeforeAfterEvaluation
from raydiv.model.load import ModelSource
from raydiv.runs.directory import RunDirectory
from raydiv.runs.heartbeat import diagnose_hang
from raydiv.runs.metrics_log import Metrics, last_values
from raydiv.runs.progress import ProgressDisplay, step_note
from raydiv.runs.prometheus import PrometheusMetrics
from raydiv.runs.report.live import live_report
from raydiv.runs.report.page import write_report
from raydiv.runs.resume import recipe_to_resume, require_same_content
from raydiv.runs.tracker import MlflowTracker
from raydiv.runtime.model_pool import end_pool
from raydiv.runtime.resources import threads_per_worker, worker_memory, worker_resources
from raydiv.runtime.session import ray_session, training_environment
from raydiv.runtime.wait_for_nodes import report_waiting
from raydiv.training.metrics import estimate_facts
from raydiv.training.schedule import epoch_plan
from raydiv.training.separation_probe import SeparationProbe
from raydiv.training.worker import TrainTask, worker_entry
from raydiv.utils.claim import claim
from raydiv.utils.compat import ignore_sigint_of_trainer
from raydiv.utils.errors import find_user_error
from raydiv.utils.signals import Terminated, on_sigterm
from raydiv.utils.storage import read_json, write_json
from raydiv.utils.versions import versions

if TYPE_CHECKING:
    from ray.train import ScalingConfig

UNBOUNDED = (
    "loss.type {type} is unbounded below on a finite data set, and nothing in this recipe bounds it: watch "
    'log_ratio/rms; see "Holding an unbounded objective" in raydiv/losses/README.md'
)
RESIZE_INTERVAL_S = 60.0
"""Seconds between checks for new nodes, with ``cluster.min_workers``."""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: its directory, the last value of every metric, and the content of result.json."""

    run: RunDirectory
    metrics: Metrics
    report: dict[str, Any]


def train(
    recipe: Recipe,
    display: ProgressDisplay | None = None,
    show_text: bool = False,
    *,
    resume: bool = False,
    open_report: bool = False,
    watch: Callable[[Metrics], None] | None = None,
) -> Result:
    """Prepare, evaluate the base model, train, and evaluate the trained model; returns the finished run.

    ``show_text`` writes prompts and answers into evaluation/, which otherwise has IDs and verdicts only. ``resume``
    continues an existing run from its newest checkpoint; for a finished run it sends to MLflow what could not be sent.
    ``open_report`` opens report.html in a browser, and renews it while the run goes on. ``watch`` is called with each
    new line of metrics.jsonl.

    Raises UserError for what the user must change, also for an existing run without ``resume`` and for one that another
    process trains; RuntimeError when training fails; Terminated after SIGTERM.
    """
    display = display or ProgressDisplay()
    run = RunDirectory.of(recipe)
    # a trial waits for that of an earlier attempt, which ends with its sweep
    with claim(run.path, display.print, wait=0 if watch is None else TRIAL_WAIT_S):
        return _train(recipe, run, display, show_text, resume, open_report, watch)


TRIAL_WAIT_S = 30
"""Seconds that a trial waits for another process that writes into its directory."""


def _train(
    recipe: Recipe,
    run: RunDirectory,
    display: ProgressDisplay,
    show_text: bool,
    resume: bool,
    open_report: bool,
    watch: Callable[[Metrics], None] | None,
) -> Result:
    resume = run.has_started(resume=resume)
    if resume:
        recipe = recipe_to_resume(run, recipe)
        if run.result.exists():
            return _resume_finished(recipe, run, display)
    inputs = load_inputs(recipe, display)
    recipe = _with_template_date(recipe, inputs)
    evaluation = BeforeAfterEvaluation(recipe, inputs.prompts, display, show_text)
    if not recipe.loss.is_bounded and recipe.optim.target_margin is None:
        display.print(UNBOUNDED.format(type=recipe.loss.type))
    with ray_session(recipe.cluster):
        require_ready(recipe, run.path, local_files(inputs), new=not resume)
        prepared = prepare_data(recipe, inputs, display)
        recipe, has_spare_memory = resolve_layout(recipe, prepared)
        if recipe.cluster.use_gpu:
            display.print(
                f"layout: ZeRO stage {recipe.engine.zero_stage}, micro-batches of up to "
                f"{recipe.batch.tokens_per_microbatch} tokens, in {recipe.engine.precision} (engine.precision)"
            )
        if resume:
            require_same_content(run, prepared.fingerprints)
            run.start_attempt(recipe)
        else:
            run.create(recipe, prepared.fingerprints)
        run.write_row_notes((prepared.data.bad + prepared.data.truncated).as_json())
        tags = _tags(recipe, prepared)
        tracker = MlflowTracker(recipe, tags, display.print, state_file=run.mlflow)
        with tracker.end_on_error():
            with (
                run.metrics.follow(tracker.log_metrics, tracker.lines_sent),
                run.metrics.follow(PrometheusMetrics(recipe.name).show),
                run.metrics.follow(watch) if watch else nullcontext(),
                live_report(run, display.print) if open_report else nullcontext(),
            ):
                if run.stage.read().metrics_bytes_at_start is None:
                    run.metrics.truncate(0)
                    evaluation.run(run, "before", prepared.model_directory)
                    run.stage.training_started(prepared.steps(recipe))
                else:
                    evaluation.restore_baseline(prepared.model_directory)
                if run.stage.read().metrics_bytes_at_end is None:
                    environment = training_environment(recipe, has_spare_memory)
                    _fit(recipe, inputs, prepared, run, display, environment)
                    _report_padding(run, display)
                run.metrics.truncate(run.stage.read().metrics_bytes_at_end or 0)
                held_out = None if prepared.eval is None else prepared.eval.examples
                evaluation.run(run, "after", prepared.model_directory, held_out)
            return _conclude(recipe, prepared, run, tracker, tags)


def _with_template_date(recipe: Recipe, inputs: LoadedInputs) -> Recipe:
    """The recipe with the date that its chat template prints, so that a run of another day has the same tokens."""
    data = recipe.data.model_copy(update={"template_date": inputs.chat.template.date})
    return recipe.model_copy(update={"data": data})


def _resume_finished(recipe: Recipe, run: RunDirectory, display: ProgressDisplay) -> Result:
    """Send to MLflow what a finished run could not send, and write a missing report."""
    report: dict[str, Any] = read_json(run.result)
    if not run.report.exists():
        write_report(run)
    display.print(f"{run.path}: this run is finished already")
    if not report["mlflow"]["sent"]:
        tracker = MlflowTracker(recipe, report["tags"], display.print, state_file=run.mlflow)
        with run.metrics.follow(tracker.log_metrics, tracker.lines_sent):
            pass
        _send(run, tracker, report)
    return Result(run, report["metrics"], report)


def resolve_layout(recipe: Recipe, prepared: PreparedData) -> tuple[Recipe, bool]:
    """The recipe with a layout that fits the memory of its workers, and whether twice the memory it needs is available.

    Needs a Ray session. Raises UserError where no layout fits.
    """
    if recipe.cluster.use_gpu:
        end_pool()  # the free memory of a GPU is read
    epochs = epoch_plan(recipe, prepared.train.examples)
    budget = largest_budget(
        epochs, prepared.steps(recipe), prepared.train.examples.lengths, recipe.cluster.least_workers
    )
    architecture, memory = architecture_of(recipe), worker_memory(recipe.cluster)
    layout = choose_layout(architecture, recipe, budget, memory)
    return with_layout(recipe, layout), 2 * layout.memory.total <= memory


def _fit(
    recipe: Recipe,
    inputs: LoadedInputs,
    prepared: PreparedData,
    run: RunDirectory,
    display: ProgressDisplay,
    environment: dict[str, str],
) -> None:
    """Run the workers, from the newest checkpoint if there is one, and show their metrics and events.

    Raises Terminated when SIGTERM stopped them, after a checkpoint.
    """
    import ray
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    probe = SeparationProbe.of(recipe, inputs.chat, inputs.prompts.separation)
    weights = architecture_of(recipe).multiplied_parameters
    task = TrainTask(recipe, prepared.model_directory, run.path, weights, prepared.train, prepared.eval, probe)
    trainer = TorchTrainer(
        worker_entry,
        train_loop_config={"task": ray.put(task), "threads": threads_per_worker(recipe.cluster)},
        torch_config=TorchConfig(
            backend="nccl" if recipe.cluster.use_gpu else "gloo", timeout_s=recipe.cluster.collective_timeout_s
        ),
        scaling_config=_scaling_config(recipe.cluster),
        run_config=RunConfig(
            name=recipe.name,
            storage_path=str(run.ray),
            worker_runtime_env={"env_vars": environment},
            failure_config=FailureConfig(max_failures=recipe.cluster.max_failures),
        ),
    )
    ignore_sigint_of_trainer(trainer)
    end_pool()

    def stop() -> None:
        display.print("SIGTERM: the run writes a checkpoint after this step and stops")
        run.request_stop()

    with display.phase("train") as update:

        def show(record: Metrics) -> None:
            if "loss" in record:
                update(int(record["step"]), prepared.steps(recipe), step_note(record))

        waiting = report_waiting(run.heartbeats.seconds_since_last, recipe.cluster, display.print)
        with run.metrics.follow(show), run.events.follow(display.print, inputs.locate), waiting, on_sigterm(stop):
            _fit_or_explain(trainer.fit, run, recipe.cluster.timeout_s)
    if run.stage.read().metrics_bytes_at_end is None:
        raise Terminated(f"stopped after step {run.metrics.steps_taken()}; the same command with --resume continues")


def _scaling_config(cluster: ClusterConfig) -> ScalingConfig:
    """The number of workers, and the resources of each."""
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=cluster.num_workers if cluster.min_workers is None else (cluster.min_workers, cluster.num_workers),
        elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        use_gpu=cluster.use_gpu,
        resources_per_worker=worker_resources(cluster),
        accelerator_type=cluster.train.accelerator,
        placement_strategy=cluster.train.placement,
    )


def _report_padding(run: RunDirectory, display: ProgressDisplay) -> None:
    reason = read_json(run.layout)["why_not_packed"]
    if reason:
        display.print(f"micro-batches were padded, not packed: {reason}")


def _fit_or_explain(fit: Callable[[], Any], run: RunDirectory, timeout: float) -> None:
    """Run ``fit``, and raise the cause of a worker's failure without Ray's exceptions around it.

    Raises UserError where a worker did; RuntimeError with the diagnosis of a hang where no worker made progress for
    ``timeout`` seconds, since each then fails with another error; RuntimeError with the first worker's error otherwise.
    """
    from ray.train import TrainingFailedError

    try:
        fit()
    except TrainingFailedError as error:
        failures = dict(getattr(error, "worker_failures", {}))
        for failure in failures.values():
            user_error = find_user_error(failure)
            if user_error is not None:
                raise user_error from None
        hang = diagnose_hang(run.heartbeats.read(), timeout)
        if hang is not None:
            raise RuntimeError(hang) from error
        for rank, failure in failures.items():
            cause = getattr(failure, "cause", failure)
            raise RuntimeError(f"training worker {rank}: {type(cause).__name__}: {cause}") from error
        raise RuntimeError(f"training: {error}") from error


def _tags(recipe: Recipe, prepared: PreparedData) -> dict[str, str]:
    fingerprints = {f"{kind}.fingerprint": value for kind, value in prepared.fingerprints.items()}
    estimate = {key.replace("/", "."): str(fact) for key, fact in estimate_facts(recipe.loss).items()}
    return fingerprints | estimate | {f"version.{name}": version for name, version in versions().items()}


def _conclude(
    recipe: Recipe, prepared: PreparedData, run: RunDirectory, tracker: MlflowTracker, tags: dict[str, str]
) -> Result:
    """Write result.json and the report, and send both to MLflow."""
    metrics = last_values(run.metrics.read())
    report: dict[str, Any] = {
        "name": recipe.name,
        "steps": {
            "planned": prepared.steps(recipe),
            "taken": run.metrics.steps_taken(),
            "ended": run.stage.read().end_reason,
        },
        "metrics": metrics,
        "data": prepared.summary(),
        "base_dtype": ModelSource.from_recipe(recipe, prepared.model_directory).stored_dtype(),
        "versions": versions(),
        "layout": {
            "zero_stage": recipe.engine.zero_stage,
            "tokens_per_microbatch": recipe.batch.tokens_per_microbatch,
            **read_json(run.layout),
        },
        "paths": {
            "run": str(run.path),
            "model": str(run.model),
            "report": str(run.report),
            "pictures": str(run.pictures),
        },
        "tags": tags,
        "mlflow": {"uri": tracker.uri, "run_id": tracker.run_id, "sent": False},
    }
    write_json(run.result, report, indent=2)
    write_report(run)
    _send(run, tracker, report)
    return Result(run, metrics, report)


def _send(run: RunDirectory, tracker: MlflowTracker, report: dict[str, Any]) -> None:
    """Send the files of a finished run to MLflow, and note in result.json whether everything arrived."""
    report["mlflow"] = {"uri": tracker.uri, "run_id": tracker.run_id, "sent": True}
    write_json(run.result, report, indent=2)
    for path in (run.recipe, run.result, run.metrics.path, run.report, *sorted(run.pictures.glob("*.png")), run.rows):
        if path.exists():
            tracker.log_artifact(path)
    if not tracker.finish():
        report["mlflow"]["sent"] = False
        write_json(run.result, report, indent=2)
