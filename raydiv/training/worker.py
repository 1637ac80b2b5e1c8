"""The training loop of one worker: it reads as prose, and everything in it happens alike on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raydiv.config import Recipe
from raydiv.data.batching import SequentialPlan, StepPlan
from raydiv.model.export import write_model
from raydiv.model.resolve import model_directory
from raydiv.runs.directory import RunDirectory
from raydiv.runs.metrics_log import Metrics
from raydiv.training.checkpoint.manager import CheckpointManager
from raydiv.training.coefficients import NotFiniteError, evaluate_objective
from raydiv.training.dataloader import ExampleSet, RankShard, StepLoader, parts, stream_steps
from raydiv.training.export_check import ExportVerification, make_export_verification
from raydiv.training.metrics import estimate_facts, rewards, step_record
from raydiv.training.order import epochs_of, total_steps
from raydiv.training.profiler import StepProfiler
from raydiv.training.schedule import learning_rate
from raydiv.training.separation_probe import SeparationProbe, policy_separation
from raydiv.training.state import TrainState
from raydiv.training.step import StepExamples, Stepper, joined
from raydiv.training.step_timer import StepTimer
from raydiv.training.utilisation import Utilisation
from raydiv.training.watchdog import Watchdog
from raydiv.utils import distributed as dist
from raydiv.utils.storage import write_json

if TYPE_CHECKING:
    from raydiv.model.compatibility import CompatibilityCheck
    from raydiv.model.packing import Packing
    from raydiv.training.engine import DeepSpeedEngine


EVALUATED_TOGETHER = 256
"""Held-out examples that are read and scored at a time."""

NAMED = 10
"""Examples of a refused step that are named."""


@dataclass(frozen=True, slots=True)
class TrainTask:
    """All that a worker is given; ``run_directory`` is on storage that the driver sees too.

    ``weights``: how many of the model a token is multiplied with.
    """

    recipe: Recipe
    model_directory: Path
    run_directory: Path
    weights: int
    train: ExampleSet
    eval: ExampleSet | None
    anchors: SeparationProbe | None = None


def _load_steps(reference: Any, share: RankShard) -> StepLoader:
    """A rank's training steps, from the Ray object that holds the WorkerInput: wherever this runs, the same ones."""
    import ray

    given: TrainTask = ray.get(reference)
    return StepLoader(given.train, epochs_of(given.recipe, given.train.examples), share)


def run_worker(given: TrainTask, reference: Any) -> None:
    """Train, log and save. Runs in every Ray Train worker, in the process group that Ray Train made.

    ``reference`` is the Ray object that holds ``given``.
    """
    recipe, run = given.recipe, RunDirectory(given.run_directory)
    if dist.rank() == 0:
        run.heartbeats.clear()
    dist.barrier()
    phases = StepTimer()
    with Watchdog(run, phases, recipe.cluster.timeout_s):
        here = model_directory(str(given.model_directory))
        _work(replace(given, model_directory=here), reference, run, phases)


def _work(given: TrainTask, reference: Any, run: RunDirectory, phases: StepTimer) -> None:
    from raydiv.model.compatibility import CompatibilityCheck
    from raydiv.model.head import LogProbHead
    from raydiv.model.load import DTYPES, build_policy
    from raydiv.model.silence import silence_libraries
    from raydiv.training.engine import DeepSpeedEngine

    recipe = given.recipe
    silence_libraries()
    torch.manual_seed(recipe.seed)
    dtype = DTYPES[recipe.engine.precision]
    engine = DeepSpeedEngine(recipe, lambda: build_policy(given.model_directory, recipe.model, dtype))
    _say_bandwidth(run, engine.device)
    utilisation = Utilisation.measured(given.weights, engine.device, dtype) if recipe.cluster.use_gpu else None
    head = LogProbHead(engine.model)
    packing = _packing(recipe, CompatibilityCheck(head, engine.model, engine, engine.device), run)
    tokens = recipe.batch.tokens_per_microbatch
    assert tokens != "auto", "micro-batches are settled before workers start (raydiv.commands.plan)"
    stepper = Stepper(engine, head, recipe.loss.terms, tokens, packing, recipe.seed, phases=phases)
    share = RankShard(stepper.layout, dist.rank(), trains=True, scores=given.train.reference_logps is None)
    epochs = epochs_of(recipe, given.train.examples)
    steps = total_steps(recipe, epochs.steps_per_epoch)
    saver = CheckpointManager(run, recipe, engine)
    behind, carried = _resume(saver, stepper, run)
    if not behind:
        _log(run, _held_out(stepper, given, run, step=0))
    stopped = False
    if carried.ended is None:
        feed, again = StepLoader(given.train, epochs, share), partial(_load_steps, reference, share)
        stream = phases.timed_steps(stream_steps(feed, again, behind, steps), behind)
        stopped = _train(stepper, saver, given, run, carried, stream, steps, utilisation)
    if stopped:
        return
    phases.enter("export")
    if recipe.checkpoint.final == "best" and (best := saver.best()) is not None:
        saver.restore(best)
    expected = make_export_verification(stepper, given.train)
    head.remove()
    _save(engine, given, run, expected)
    if dist.rank() == 0:
        run.stage.training_ended(str(carried.ended))


def _say_bandwidth(run: RunDirectory, device: torch.device) -> None:
    """Between nodes, how fast the network is that every step goes over."""
    import ray

    nodes = len(set(dist.all_gather_object(ray.get_runtime_context().get_node_id()))) if ray.is_initialized() else 1
    if nodes > 1:
        speed = dist.bandwidth(device)
        if dist.rank() == 0:
            run.events.log(
                f"{dist.world_size()} workers on {nodes} nodes; an all-reduce of theirs takes {speed / 1e9:.2f} GB/s"
            )


def _resume(saver: CheckpointManager, stepper: Stepper, run: RunDirectory) -> tuple[int, TrainState]:
    """Take up the newest checkpoint, if there is one: how many steps are behind it, and what it carries on."""
    manifest = saver.find()
    if manifest is None:
        logged, behind, carried = run.stage.read().began, 0, TrainState()
    else:
        saver.restore(manifest)
        stepper.states = [dict(state) for state in manifest.loop["states"]]
        logged, behind, carried = manifest.loop["logged"], manifest.step, TrainState.from_json(manifest.loop)
    if dist.rank() == 0:
        # what was logged after it is about to be logged again
        run.metrics.truncate(logged or 0)
        if behind:
            run.events.log(f"training goes on after step {behind}")
    return behind, carried


def _train(
    stepper: Stepper,
    saver: CheckpointManager,
    given: TrainTask,
    run: RunDirectory,
    carried: TrainState,
    stream: Iterator[tuple[StepPlan, StepExamples]],
    steps: int,
    utilisation: Utilisation | None,
) -> bool:
    """Steps until training is over, which is noted in ``carried``, or the run is asked to stop: then returns True."""
    recipe, facts = given.recipe, estimate_facts(given.recipe.loss.terms[0])
    phases, profiled = stepper.phases, StepProfiler(recipe.engine.profiled, run.profile)
    for plan, chosen in stream:
        profiled.before(plan.step + 1)
        lr, done = learning_rate(recipe.optim, plan.step, steps), plan.step + 1
        metrics = _step(stepper, chosen, lr, plan, given, run, carried, last=done == steps)
        metrics |= carried.means.update(metrics) | facts
        phases.enter("log")
        _log(run, step_record(plan, chosen.examples, metrics, lr, phases, utilisation))
        if done == steps:
            carried.ended = "all steps are done"
        elif reached(recipe.optim.target_margin, metrics):
            carried.ended = "the margin is at optim.target_margin"
        profiled.after(done, last=carried.ended is not None)
        if given.anchors is not None and _due(recipe.separation.every, done) and not carried.ended:
            phases.enter("separation")
            metrics |= (apart := policy_separation(stepper, given.anchors))
            _log(run, {"step": done, **apart})
        if carried.ended or _due(recipe.evaluate.every, done):
            metrics |= (held_out := _held_out(stepper, given, run, step=done))
            _log(run, held_out)
            early = recipe.optim.early_stop
            if early is not None and carried.early_stopping.update(early, metrics[early.metric]) and not carried.ended:
                carried.ended = f"{early.metric} was no better in {early.patience} evaluations (optim.early_stop)"
        phases.enter("checkpoint")
        if saver.after_step(
            done, lambda: carried.as_json(stepper.states, run.metrics.size), metrics, last=carried.ended is not None
        ):
            return True
        if carried.ended is not None:
            break
    return False


def _step(
    stepper: Stepper,
    chosen: StepExamples,
    lr: float,
    plan: StepPlan,
    given: TrainTask,
    run: RunDirectory,
    carried: TrainState,
    last: bool,
) -> dict[str, float]:
    """A step's metrics. One that is not finite is left out and counted, up to ``optim.max_refused`` of them.

    After the ``last`` one none would show that the model is still sound: that one ends the run too.
    """
    counted = {"refused_steps": float(carried.refused)} if carried.refused else {}
    try:
        return stepper.step(chosen, lr) | counted
    except NotFiniteError as error:
        carried.refused += 1
        if dist.rank() == 0:
            run.events.log(
                f"step {plan.step + 1}: {error}", given.train.examples.places(plan.rows[error.positions[:NAMED]])
            )
        most = given.recipe.optim.max_refused
        if last or carried.refused > most:
            why = f"it is one more than optim.max_refused: {most}" if carried.refused > most else "it is the last one"
            raise FloatingPointError(f"step {plan.step + 1}: {error}; {why}") from None
        return {"refused_steps": float(carried.refused)}


def _packing(recipe: Recipe, probe: CompatibilityCheck, run: RunDirectory) -> Packing:
    """How examples are laid out in a micro-batch; where not packed, why is noted in the run's layout."""
    packing: Packing
    if recipe.batch.packing == "never":
        probe.require_known_logits()
        packing, why = "none", "batch.packing: never"
    else:
        packing, why = probe.packing(recipe.batch.max_length)
    if dist.rank() == 0:
        write_json(run.layout, {"packing": packing, "why_not_packed": why or None})
    return packing


def reached(target_margin: float | None, metrics: dict[str, float]) -> bool:
    """Whether the running reward margin is where the recipe wants training to stop."""
    return target_margin is not None and metrics.get("reward/margin/ema", 0.0) >= target_margin


def _due(every: int | None, done: int) -> bool:
    return every is not None and done % every == 0


def _log(run: RunDirectory, record: Metrics) -> None:
    """Metrics are the same on every rank; one writes them."""
    if dist.rank() == 0:
        run.metrics.append(record)


def _held_out(stepper: Stepper, given: TrainTask, run: RunDirectory, step: int) -> dict[str, float]:
    """Loss, divergence and rewards on the held-out examples, as ``eval/*``; empty without any. Changes no state.

    Each example's reward is left in the run, if there is a reference to count it from.
    """
    if given.eval is None:
        return {}
    stepper.phases.enter("evaluate")
    share = RankShard(stepper.layout, dist.rank(), trains=False, scores=True)
    order = SequentialPlan(given.eval.examples.lengths, EVALUATED_TOGETHER)
    scored = [stepper.score(chosen) for chosen in parts(StepLoader(given.eval, order, share), order.parts)]
    batch = joined(scored, order.order, given.eval.examples.units)
    metrics = evaluate_objective(stepper.terms, stepper.states, batch).metrics
    if dist.rank() == 0 and given.recipe.loss.needs_reference:
        reward = rewards(batch, stepper.terms[0].reward_scale)
        classes = {"aligned": batch.aligned, "unaligned": ~batch.aligned}
        write_json(run.rewards, {name: reward[members].tolist() for name, members in classes.items()})
    # the held-out set is judged as one more step would be, and the state after it thrown away
    return {"step": step} | {f"eval/{name}": number for name, number in metrics.items()}


def _save(engine: DeepSpeedEngine, given: TrainTask, run: RunDirectory, expected: ExportVerification) -> None:
    """Gather the trained weights and write them as a Hugging Face directory: the whole model, or the adapters."""
    adapters = given.recipe.model.lora is not None
    state: dict[str, torch.Tensor] = {}
    for name, weight in engine.weights(trainable_only=adapters):
        if dist.rank() == 0:
            state[name] = weight
    if dist.rank() == 0:
        check = expected.check(given.recipe)
        write_model(engine.model, state, given.model_directory, given.recipe, run.model, check)
    dist.barrier()


def worker_entry(config: dict[str, Any]) -> None:
    """What Ray Train calls in each worker."""
    import ray

    torch.set_num_threads(int(config["threads"]))
    run_worker(ray.get(config["given"]), config["given"])
