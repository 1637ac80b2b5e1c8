"""One training worker: it builds engine and step, resumes, runs the loop, and writes the model. All ranks do the same.

Metrics go to the run directory and not to ``ray.train.report``: that waits for all ranks in an actor, and then for the
controller, which takes one result of a worker every 2 seconds (Ray 2.60: ``result_queue`` of size 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raydiv.config import Recipe
from raydiv.model.export import write_model
from raydiv.model.resolve import model_directory
from raydiv.runs.directory import RunDirectory
from raydiv.runs.heartbeat import CONNECT
from raydiv.training.checkpoint.manager import CheckpointManager
from raydiv.training.dataloader import ExampleSet, RankShard, StepLoader, stream_steps
from raydiv.training.depth_probe import DepthMeasurement
from raydiv.training.export_check import make_export_verification, verification_device
from raydiv.training.held_out import HeldOutEvaluation
from raydiv.training.loop import TrainingLoop, Updates
from raydiv.training.metrics import peak_memory, peak_reserved
from raydiv.training.profiler import StepProfiler
from raydiv.training.schedule import epoch_plan, total_steps
from raydiv.training.separation_probe import SeparationMeasurement, SeparationProbe
from raydiv.training.state import TrainState
from raydiv.training.step import Stepper
from raydiv.training.step_timer import StepTimer
from raydiv.training.utilisation import Utilisation
from raydiv.training.watchdog import Watchdog
from raydiv.utils import distributed as dist
from raydiv.utils.storage import write_json
from raydiv.utils.units import size_text

if TYPE_CHECKING:
    from raydiv.model.compatibility import CompatibilityCheck
    from raydiv.model.packing import Packing


@dataclass(frozen=True, slots=True)
class TrainTask:
    """The input of every worker. ``run_directory`` is on storage that the driver sees too.

    ``multiplied_parameters``: how many of the model's weights a token is multiplied by.
    """

    recipe: Recipe
    model_directory: Path
    run_directory: Path
    multiplied_parameters: int
    train: ExampleSet
    eval: ExampleSet | None
    probe: SeparationProbe | None = None


def worker_entry(config: dict[str, Any]) -> None:
    """The function that Ray Train calls in each worker."""
    import ray

    torch.set_num_threads(int(config["threads"]))
    run_worker(ray.get(config["task"]), config["task"])


def run_worker(task: TrainTask, task_ref: Any) -> None:
    """Train, log and save, in Ray Train's process group. ``task_ref``: the Ray object that holds
    ``task``; loaders in other processes get it in place of the arrays.
    """
    run, timer = RunDirectory(task.run_directory), StepTimer()
    if dist.rank() == 0:
        run.heartbeats.clear()
    # before the first collective, which hangs where the network between nodes is not set up
    with Watchdog(run, timer, task.recipe.cluster.timeout_s):
        timer.enter(CONNECT)
        dist.barrier()
        timer.enter("start")
        local = model_directory(str(task.model_directory))
        try:
            _run(replace(task, model_directory=local), task_ref, run, timer)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(_out_of_memory(task.recipe, timer)) from error


def _out_of_memory(recipe: Recipe, timer: StepTimer) -> str:
    return (
        f"out of GPU memory in {timer.phase} of step {timer.step}, with {size_text(peak_memory())} allocated and "
        f"{size_text(peak_reserved())} reserved at the peak; set batch.tokens_per_microbatch below "
        f"{recipe.batch.tokens_per_microbatch}, or engine.activation_checkpointing: true (raydiv plan has the forecast)"
    )


def _run(task: TrainTask, task_ref: Any, run: RunDirectory, timer: StepTimer) -> None:
    recipe = task.recipe
    stepper, utilisation = _build_stepper(task, run, timer)
    plan = epoch_plan(recipe, task.train.examples)
    steps = total_steps(recipe, plan.steps_in)
    checkpoints = CheckpointManager(run, recipe, stepper.engine.partitions)
    held_out = HeldOutEvaluation(recipe, run, stepper, task.eval)
    depth = DepthMeasurement.of(
        run, stepper, None if task.eval is None else task.eval.examples, recipe.evaluate.depth_every
    )
    behind, state = _resume(checkpoints, stepper, run)
    if not behind:
        held_out.before_training()
        depth.before_training()
    if state.end_reason is None:
        shard = RankShard(stepper.layout, dist.rank(), trains=True, scores=task.train.reference_logps is None)
        loader, make_loader = StepLoader(task.train, plan, shard), partial(_make_loader, task_ref, shard)
        loop = TrainingLoop(
            Updates(recipe, run, stepper, state, task.train.examples, steps, utilisation),
            state,
            StepProfiler(recipe.engine.profiled_steps, run.profile),
            SeparationMeasurement(run, stepper, task.probe, recipe.separation.every),
            depth,
            held_out,
            checkpoints,
        )
        if loop.train(timer.timed_steps(stream_steps(loader, make_loader, behind, steps), behind)):
            return
    timer.enter("export")
    if recipe.checkpoint.final == "best" and (best := checkpoints.best()) is not None:
        checkpoints.restore(best)
    _save(stepper, task, run)
    if dist.rank() == 0:
        run.stage.training_ended(str(state.end_reason))


def _build_stepper(task: TrainTask, run: RunDirectory, timer: StepTimer) -> tuple[Stepper, Utilisation | None]:
    """The engine with the policy and its step; on GPUs, also the peak that utilisation is measured against."""
    from raydiv.model.compatibility import CompatibilityCheck
    from raydiv.model.head import LogProbHead
    from raydiv.model.load import DTYPES, build_policy
    from raydiv.model.silence import silence_libraries
    from raydiv.training.engine import DeepSpeedEngine

    recipe = task.recipe
    silence_libraries()
    torch.manual_seed(recipe.seed)
    dtype = DTYPES[recipe.engine.precision]
    engine = DeepSpeedEngine(recipe, lambda: build_policy(task.model_directory, recipe.model, dtype))
    _log_bandwidth(run, engine.device)
    utilisation = (
        Utilisation.measured(task.multiplied_parameters, engine.device, dtype) if recipe.cluster.use_gpu else None
    )
    head = LogProbHead(engine.model)
    packing = _choose_packing(recipe, CompatibilityCheck(head, engine.model, engine, engine.device), run)
    tokens = recipe.batch.tokens_per_microbatch
    assert tokens != "auto", "batch.tokens_per_microbatch is resolved before workers start (raydiv.commands.plan)"
    position = recipe.loss.position.rule
    return Stepper(engine, head, recipe.loss.terms, tokens, packing, position, recipe.seed, timer=timer), utilisation


def _log_bandwidth(run: RunDirectory, device: torch.device) -> None:
    """Log the bandwidth between nodes, which every step depends on."""
    import ray

    nodes = len(set(dist.all_gather_object(ray.get_runtime_context().get_node_id()))) if ray.is_initialized() else 1
    if nodes > 1:
        speed = dist.bandwidth(device)
        if dist.rank() == 0:
            run.events.log(f"{dist.world_size()} workers on {nodes} nodes; all-reduce bandwidth {speed / 1e9:.2f} GB/s")


def _choose_packing(recipe: Recipe, check: CompatibilityCheck, run: RunDirectory) -> Packing:
    """How examples are laid out in a micro-batch; layout.json gets it, with the reason where they are not packed."""
    packing: Packing
    if recipe.batch.packing == "never":
        check.require_supported_logits()
        packing, why = "none", "batch.packing: never"
    else:
        packing, why = check.packing(recipe.batch.max_length)
    if dist.rank() == 0:
        write_json(run.layout, {"packing": packing, "why_not_packed": why or None})
    return packing


def _make_loader(task_ref: Any, shard: RankShard) -> StepLoader:
    """A rank's loader of training steps in another process, from the Ray object that holds the TrainTask."""
    import ray

    task: TrainTask = ray.get(task_ref)
    return StepLoader(task.train, epoch_plan(task.recipe, task.train.examples), shard)


def _resume(checkpoints: CheckpointManager, stepper: Stepper, run: RunDirectory) -> tuple[int, TrainState]:
    """Restore the newest checkpoint, if there is one; returns how many steps it has behind it, and the loop's state."""
    manifest = checkpoints.find()
    if manifest is None:
        logged, behind, state = run.stage.read().metrics_bytes_at_start, 0, TrainState()
    else:
        checkpoints.restore(manifest)
        stepper.states = [dict(running) for running in manifest.loop["states"]]
        logged, behind, state = manifest.loop["logged"], manifest.step, TrainState.from_json(manifest.loop)
    if dist.rank() == 0:
        # the steps after the checkpoint are about to be logged again
        run.metrics.truncate(logged or 0)
        if behind:
            run.events.log(f"training resumes after step {behind}")
    return behind, state


def _save(stepper: Stepper, task: TrainTask, run: RunDirectory) -> None:
    """Gather the trained weights, and write them as a Hugging Face directory: the whole model, or the adapters."""
    verification = make_export_verification(stepper, task.train.examples)
    stepper.head.remove()
    weights: dict[str, torch.Tensor] = {}
    for name, weight in stepper.engine.weights(trainable_only=task.recipe.model.lora is not None):
        if dist.rank() == 0:
            weights[name] = weight.to("cpu", copy=True)
    if dist.rank() == 0:
        model = stepper.engine.model
        check = verification.check(task.recipe, verification_device(model))
        write_model(model, weights, task.model_directory, task.recipe, run.model, check)
    dist.barrier()
