"""The training loop: what follows a step and in which order, and metrics that have no value."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raydiv.config import Recipe, load_recipe
from raydiv.config.data import DataConfig
from raydiv.losses import OBJECTIVES, Batch, Term, Value
from raydiv.runs.directory import RunDirectory
from raydiv.training import held_out as held_out_module
from raydiv.training import separation_probe
from raydiv.training.coefficients import evaluate_objective
from raydiv.training.depth_probe import DepthMeasurement
from raydiv.training.held_out import HeldOutEvaluation
from raydiv.training.loop import TrainingLoop, Updates
from raydiv.training.metric_names import held_out_metrics
from raydiv.training.metrics import RunningMeans, finite, log_metrics
from raydiv.training.schedule import is_due
from raydiv.training.separation_probe import SeparationMeasurement
from raydiv.training.state import TrainState
from raydiv.training.step import select_examples
from raydiv.training.step_timer import StepTimer

ALL_DONE = "all steps are done"


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(
        {"model": {"id": "m"}, "loss": {"type": "dpo"}, "optim": {"steps": 6}, "data": {"eval": 0.1}},
        [f"output_dir={folder}", *overrides],
    )


class Recorder:
    """Stands for everything that follows a step, and records the calls."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.stop_at = stop_at
        self.stepper = SimpleNamespace(timer=StepTimer(), states=[])

    def named(self, name: str) -> Any:
        return SimpleNamespace(
            before_step=lambda step: self.calls.append((name, "before", step)),
            after_step=lambda step, *rest, **options: self._after(name, step, rest, options),
        )

    def _after(self, name: str, step: int, rest: Any, options: Any) -> Any:
        self.calls.append((name, step, options.get("last")))
        if name == "checkpoints":
            self.metrics = dict(rest[1])
            return step == self.stop_at
        return {name: float(step)} if name in ("separation", "depth", "held_out") else None

    def make(self, step: Any) -> dict[str, float]:
        self.calls.append(("update", step.number + 1))
        return {"loss": 0.5}

    def reason_to_end(self, done: int, metrics: Any) -> str | None:
        return ALL_DONE if done == 3 else None


def run_loop(recorder: Recorder, steps: int = 5) -> tuple[bool, TrainState]:
    state = TrainState()
    parts = {name: recorder.named(name) for name in ("profiler", "separation", "depth", "held_out", "checkpoints")}
    loop = TrainingLoop(recorder, state, **parts)  # type: ignore[arg-type]
    return loop.train(SimpleNamespace(number=number) for number in range(steps)), state  # type: ignore[arg-type]


def test_what_follows_a_step_comes_in_a_fixed_order_until_training_ends() -> None:
    recorder = Recorder()
    stopped, state = run_loop(recorder)
    assert (stopped, state.end_reason) == (False, ALL_DONE)
    expected: list[tuple[Any, ...]] = []
    for step in (1, 2, 3):
        last = step == 3
        expected += [
            ("profiler", "before", step),
            ("update", step),
            ("profiler", step, last),
            ("separation", step, None),
            ("depth", step, None),
            ("held_out", step, None),
            ("checkpoints", step, last),
        ]
    assert recorder.calls == expected
    assert recorder.metrics == {"loss": 0.5, "separation": 3.0, "depth": 3.0, "held_out": 3.0}


def test_a_run_that_is_asked_to_stop_leaves_the_loop_after_its_checkpoint() -> None:
    recorder = Recorder(stop_at=2)
    stopped, state = run_loop(recorder)
    assert (stopped, state.end_reason) == (True, None)
    assert recorder.calls[-1] == ("checkpoints", 2, False)


def test_due_every_so_many_steps() -> None:
    assert [step for step in range(1, 8) if is_due(3, step)] == [3, 6]
    assert not any(is_due(None, step) for step in range(1, 8))


class FakeHeldOut(HeldOutEvaluation):
    """Takes its metrics from a list."""

    __slots__ = ()
    results: list[dict[str, float]] = []  # noqa: RUF012 - set by each test

    def evaluate(self, step: int) -> dict[str, float]:
        return {"step": step} | self.results.pop(0)


def test_held_out_examples_are_evaluated_when_due_and_at_the_end(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "evaluate.every=2")
    evaluation = FakeHeldOut(recipe, RunDirectory(tmp_path), SimpleNamespace(), None)  # type: ignore[arg-type]
    FakeHeldOut.results = [{"eval/loss": 1.0}, {"eval/loss": 2.0}]
    assert evaluation.after_step(1, TrainState()) == {}
    assert evaluation.after_step(2, TrainState()) == {"step": 2, "eval/loss": 1.0}
    assert evaluation.after_step(3, TrainState(end_reason=ALL_DONE)) == {"step": 3, "eval/loss": 2.0}


def test_early_stopping_ends_training_and_ignores_an_evaluation_without_its_metric(tmp_path: Path) -> None:
    early = "optim.early_stop={metric: eval/reward/margin, mode: max, patience: 1}"
    recipe, run, state = recipe_of(tmp_path, "evaluate.every=1", early), RunDirectory(tmp_path), TrainState()
    evaluation = FakeHeldOut(recipe, run, SimpleNamespace(), None)  # type: ignore[arg-type]
    FakeHeldOut.results = [{"eval/reward/margin": 1.0}, {"eval/loss": 0.0}, {"eval/reward/margin": 1.0}]
    evaluation.after_step(1, state)
    evaluation.after_step(2, state)
    assert (state.end_reason, state.early_stopping.waited) == (None, 0)
    (event,) = [json.loads(line)["message"] for line in run.events.path.read_text().splitlines()]
    assert "optim.early_stop.metric: eval/reward/margin" in event
    assert "step 2" in event
    evaluation.after_step(3, state)
    assert "optim.early_stop" in str(state.end_reason)


def test_separation_is_measured_when_due_and_not_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"separation/d_b": 0.5}
    monkeypatch.setattr(separation_probe, "policy_separation", lambda stepper, probe: dict(measured))
    run, stepper = RunDirectory(tmp_path), SimpleNamespace(timer=StepTimer())
    measurement = SeparationMeasurement(run, stepper, SimpleNamespace(), every=2)  # type: ignore[arg-type]
    assert measurement.after_step(1, TrainState()) == {}
    assert measurement.after_step(2, TrainState()) == measured
    assert measurement.after_step(4, TrainState(end_reason=ALL_DONE)) == {}
    assert run.metrics.read() == [{"step": 2, **measured}]


class FakeScorer:
    """Stands for a stepper whose policy has these log-probs for each token, and counts the calls."""

    def __init__(self) -> None:
        self.timer, self.logp = StepTimer(), -1.0

    def token_logps(self, examples: Sequence[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
        """Late tokens of the first example, which is aligned, become likelier than the others."""
        factors = [torch.tensor([0.1, 0.1, 1.0]), torch.ones(2)]
        return [self.logp * factors[len(response) == 2] for _, response in examples]


def test_depth_is_measured_when_due_against_what_was_kept_before_training(tmp_path: Path) -> None:
    run, scorer = RunDirectory(tmp_path), FakeScorer()
    examples, aligned = [([1], [2, 3, 4]), ([1], [5, 6])], np.array([True, False])

    def measurement() -> DepthMeasurement:
        return DepthMeasurement(run, scorer, examples, aligned, every=2)  # type: ignore[arg-type]

    measurement().before_training()
    scorer.logp = 1.0
    assert measurement().after_step(1, TrainState()) == {}
    # ratios 0.2, 0.2, 2 less 2, 2: the margin never is positive
    assert measurement().after_step(2, TrainState()) == {}
    scorer.logp = -3.0
    # -0.2, -0.2, -2 less -2, -2: 1.8, 3.6, 1.6 up to each token
    assert measurement().after_step(4, TrainState()) == {"eval/depth/half": 1.0}
    assert measurement().after_step(6, TrainState(end_reason=ALL_DONE)) == {}
    assert run.metrics.read() == [{"step": 4, "eval/depth/half": 1.0}]


def test_depth_of_one_class_is_not_measured_and_an_event_says_so(tmp_path: Path) -> None:
    run, alone = RunDirectory(tmp_path), SimpleNamespace(aligned=np.array([True, True]))
    depth = DepthMeasurement.of(run, FakeScorer(), alone, every=1)  # type: ignore[arg-type]
    depth.before_training()
    assert depth.after_step(1, TrainState()) == {}
    assert not run.depth_reference.exists()
    assert "evaluate.depth_every: nothing is measured: no held-out example is unaligned" in run.events.path.read_text()


# ---- metrics without a value


def batch_of(aligned: list[bool]) -> Batch:
    n = len(aligned)
    return Batch(
        torch.full((n,), -2.0),
        torch.full((n,), -3.0),
        torch.tensor(aligned),
        torch.full((n,), 4),
        torch.zeros((0, 2), dtype=torch.long),
        torch.zeros(0),
    )


def term_without_divergence_value() -> Term:
    """kldo, whose estimate is NaN."""

    def function(batch: Batch, state: Any, **options: Any) -> Value:
        return Value(batch.logps.sum(), divergence=torch.tensor(math.nan))

    kldo = OBJECTIVES["kldo"]
    fields = {name: getattr(kldo, name) for name in kldo.__slots__}
    return Term(type(kldo)(**fields | {"function": function}), 1.0, kldo.defaults)


def test_a_metric_without_a_value_is_left_out_and_changes_no_running_mean() -> None:
    metrics = evaluate_objective([term_without_divergence_value()], [{}], batch_of([True, False])).metrics
    assert "divergence" not in metrics
    assert metrics["loss"] == -4.0
    means = RunningMeans()
    means.update({"divergence": 2.0})
    assert means.update(metrics)["divergence/ema"] == 2.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, float(np.float32("nan"))])
def test_metrics_that_are_not_finite_are_not_written(tmp_path: Path, value: float) -> None:
    run, record = RunDirectory(tmp_path), {"step": 1, "loss": 0.5, "divergence": value, "divergence/name": "KL"}
    assert finite(record) == {"step": 1, "loss": 0.5, "divergence/name": "KL"}
    log_metrics(run, record)
    log_metrics(run, {"step": 2, "loss": 0.25, "divergence": 1.0})
    assert "NaN" not in run.metrics.path.read_text()
    assert "Infinity" not in run.metrics.path.read_text()
    assert run.metrics.trained_values()["divergence"] == 1.0


def held_out_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: Batch) -> HeldOutEvaluation:
    """The evaluation of kldo on ``batch``."""
    kldo = OBJECTIVES["kldo"]
    monkeypatch.setattr(held_out_module, "read_steps", lambda *_: [None])
    monkeypatch.setattr(held_out_module, "concatenate_batches", lambda *_: batch)
    stepper = SimpleNamespace(
        timer=StepTimer(),
        layout=None,
        score=lambda _: None,
        terms=[Term(kldo, 1.0, kldo.defaults)],
        states=[kldo.state],
    )
    examples = SimpleNamespace(examples=SimpleNamespace(lengths=np.ones(3), units=np.zeros((3, 2))))
    return HeldOutEvaluation(recipe_of(tmp_path), RunDirectory(tmp_path), stepper, examples)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "stored"),
    [
        ([], True),
        (["loss.type=sft"], False),
        (["loss.type=sft", "loss.position={kind: constrained, betas: [1]}"], True),
        (["model.lora.r=2", "model.reference=adapter-off"], False),
    ],
)
def test_the_policy_starts_as_its_stored_reference(
    overrides: list[str], stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = held_out_evaluation(tmp_path, monkeypatch, batch_of([True, False, True]))
    scored: list[str] = []
    evaluation.stepper.score = lambda _: scored.append("forward")  # type: ignore[method-assign, assignment, return-value]
    evaluation.stepper.score_at_start = lambda _: scored.append("store")  # type: ignore[method-assign, assignment, return-value]
    recipe = load_recipe(evaluation.recipe.model_dump(mode="json", by_alias=True), overrides)
    replace(evaluation, recipe=recipe).before_training()
    assert scored == ["store" if stored else "forward"]
    assert evaluation.run.metrics.read()[0]["step"] == 0


def test_held_out_log_probs_that_are_not_finite_end_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([True, False, True])
    batch.logps[1] = math.nan
    evaluation = held_out_evaluation(tmp_path, monkeypatch, batch)
    assert evaluation.evaluate(step=2) == {}
    assert not evaluation.run.metrics.path.exists()
    (event,) = [json.loads(line)["message"] for line in evaluation.run.events.path.read_text().splitlines()]
    assert "step 2: no eval/* metrics" in event
    assert "[1]" in event


@pytest.mark.parametrize("aligned", [True, False])
def test_an_evaluation_of_one_class_leaves_the_other_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aligned: bool
) -> None:
    evaluation = held_out_evaluation(tmp_path, monkeypatch, batch_of([aligned] * 3))
    run, metrics = evaluation.run, evaluation.evaluate(step=2)
    absent = "unaligned" if aligned else "aligned"
    assert not {f"eval/reward/{absent}", f"eval/logp/{absent}", "eval/reward/margin"} & metrics.keys()
    assert run.metrics.read() == [metrics]
    assert json.loads(run.rewards.read_text())[absent] == []


def test_each_held_out_source_has_metrics_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([True, False, True, False, True, False])
    batch = replace(batch, logps=torch.arange(6.0) - 9, pairs=torch.tensor([[0, 1], [2, 3], [4, 5]]))
    evaluation = held_out_evaluation(tmp_path, monkeypatch, batch)
    stored = SimpleNamespace(lengths=np.ones(6), units=np.zeros((6, 2)), source=np.array([0, 0, 1, 1, 2, 2], np.int16))
    evaluation.examples.examples = stored  # type: ignore[union-attr, misc]
    sources = [{"path": "a/refusals.jsonl"}, {"path": "prefs.csv"}, {"path": "b/refusals.jsonl"}]
    recipe = evaluation.recipe.model_copy(update={"data": DataConfig.model_validate({"eval": sources})})
    metrics = replace(evaluation, recipe=recipe).evaluate(step=2)
    stepper = evaluation.stepper
    for prefix, rows in (("eval", range(6)), ("eval/prefs", [2, 3]), ("eval/refusals", [0, 1, 4, 5])):
        part = select_examples(batch, np.array(rows))
        expected = evaluate_objective(stepper.terms, stepper.states, part).metrics
        assert {name: metrics[f"{prefix}/{name}"] for name in expected} == expected
    assert held_out_metrics(recipe) == metrics.keys() - {"step"}
    assert len({metrics[f"{prefix}/loss"] for prefix in ("eval", "eval/prefs", "eval/refusals")}) == 3
    stored.source[:] = 0  # a fraction of the prompts left the second source out
    assert not any("prefs" in name for name in replace(evaluation, recipe=recipe).evaluate(step=3))


def test_the_pairs_of_selected_examples_are_those_that_are_complete() -> None:
    batch = replace(batch_of([True, False, True, False]), pairs=torch.tensor([[0, 1], [2, 3]]), logps=torch.arange(4.0))
    part = select_examples(batch, np.array([3, 0, 2]))
    assert part.logps.tolist() == [3, 0, 2]
    assert part.pairs.tolist() == [[2, 0]]
    mismatched = replace(batch, mismatched_log_ratios=torch.arange(4.0) + 10)
    assert select_examples(mismatched, np.array([1, 2])).mismatched_log_ratios.tolist() == [11, 12]


def test_reason_to_end_is_the_last_step_or_the_target_margin(tmp_path: Path) -> None:
    nothing: Any = None
    updates = Updates(recipe_of(tmp_path, "optim.target_margin=2"), nothing, nothing, nothing, nothing, steps=6)
    assert updates.reason_to_end(6, {}) == ALL_DONE
    assert updates.reason_to_end(5, {}) is None
    assert updates.reason_to_end(5, {"reward/margin/ema": 1.9}) is None
    assert "optim.target_margin" in str(updates.reason_to_end(5, {"reward/margin/ema": 2.0}))
    assert (
        Updates(recipe_of(tmp_path), nothing, nothing, nothing, nothing, 6).reason_to_end(5, {"reward/margin/ema": 9.0})
        is None
    )
