"""Steps that are not finite: refused without a trace under every ZeRO stage, counted, named; too many end the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.layouts import CPU, Layout, make_engine, update
from helpers.ranks import run_on_ranks
from raydiv.config import load_recipe
from raydiv.runs.directory import RunDirectory
from raydiv.training.coefficients import NotFiniteError
from raydiv.training.loop import Updates
from raydiv.training.state import TrainState
from raydiv.utils import compat
from raydiv.utils import distributed as dist

LAYOUTS = [
    Layout(0),
    Layout(1),
    Layout(2, engine=CPU),
    Layout(3),
    Layout(1, precision="bf16"),
    Layout(3, precision="bf16"),
]


def backward(engine: Any, factor: float) -> None:
    ids = torch.arange(6, 30)[None]
    logits = engine(input_ids=ids).logits.float()
    engine.backward(logits.square().mean() * factor / dist.world_size(), last=True)


def weights(engine: Any) -> dict[str, np.ndarray]:
    return {name: weight.to(torch.float32, copy=True).numpy() for name, weight in engine.weights(trainable_only=True)}


def train_with_refusals(model: Path, layouts: Sequence[Layout]) -> list[dict[str, Any]]:
    """Two updates, ``plain`` and with two refused steps between them; runs on every rank."""
    results = []
    for layout in layouts:
        by_kind = {}
        for kind in ("plain", "refusing"):
            engine = make_engine(layout, model)
            update(engine, 0)
            before, norm = weights(engine), None
            if kind == "refusing":
                backward(engine, 1.0)
                engine.discard()
                backward(engine, float("nan"))
                norm = engine.update(0.1)
            between = weights(engine)
            update(engine, 1)
            by_kind[kind] = {
                "before": before,
                "between": between,
                "after": weights(engine),
                "norm": norm,
                "updates": engine.partitions.updates,
            }
            engine.close()
        results.append(by_kind)
    return results


def discard_under_another_name(model: Path) -> bool:
    """Whether an update is noticed that DeepSpeed makes because the method of the norm has another name."""
    engine = make_engine(Layout(3), model)
    update(engine, 0)
    names = compat.GRADIENT_NORM
    compat.GRADIENT_NORM = names | {3: "refresh_fp32_params"}
    backward(engine, 1.0)
    try:
        engine.discard()
    except RuntimeError as error:
        return "discarded" in str(error)
    finally:
        compat.GRADIENT_NORM = names
        engine.close()
    return False


@pytest.mark.slow
def test_an_update_in_place_of_a_discarded_step_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    assert run_on_ranks(discard_under_another_name, 2, tmp_path / "ranks", tiny_model) == [True, True]


@pytest.mark.slow
def test_a_refused_step_leaves_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    for results in run_on_ranks(train_with_refusals, 2, tmp_path / "ranks", tiny_model, LAYOUTS):
        for layout, result in zip(LAYOUTS, results, strict=True):
            plain, refusing = result["plain"], result["refusing"]
            assert not np.isfinite(refusing["norm"]), layout
            assert plain["updates"] == refusing["updates"] == 2, layout
            for name in plain["after"]:
                assert np.array_equal(refusing["before"][name], refusing["between"][name]), (layout, name)
                assert np.array_equal(refusing["after"][name], plain["after"][name]), (layout, name)
            assert any(not np.array_equal(plain["after"][name], plain["before"][name]) for name in plain["after"])


class RefusingStepper:
    """Refuses every step."""

    def step(self, step: Any, lr: float) -> dict[str, float]:
        raise NotFiniteError("log-probs of examples [1] of the step are not finite", [1])


def test_a_refused_step_is_counted_and_named_and_one_too_many_ends_the_run(tmp_path: Path) -> None:
    recipe = load_recipe(
        {"model": {"id": "m"}, "loss": {"type": "dpo"}, "optim": {"steps": 9, "max_refused": 2}},
        [f"output_dir={tmp_path}"],
    )
    run, stepper = RunDirectory(tmp_path), RefusingStepper()
    examples = SimpleNamespace(places=lambda rows: [(0, 1, int(row)) for row in rows])
    step: Any = SimpleNamespace(number=6, plan=SimpleNamespace(rows=np.array([40, 41, 42])))
    updates = Updates(recipe, run, stepper, TrainState(), examples, steps=9)  # type: ignore[arg-type]
    assert [updates.attempt(step, 0.1)["refused_steps"] for _ in range(2)] == [1, 2]
    with pytest.raises(FloatingPointError, match=r"step 7: .*log-probs .* optim\.max_refused: 2"):
        updates.attempt(step, 0.1)
    last = Updates(recipe, run, stepper, TrainState(), examples, steps=7)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="last step"):
        last.attempt(step, 0.1)
    messages: list[str] = []
    run.events.path.rename(tmp_path / "written")
    with run.events.follow(messages.append, lambda place: f"train.jsonl:{place[2]}"):
        run.events.path.write_bytes((tmp_path / "written").read_bytes())
    error = NotFiniteError("log-probs of examples [1] of the step are not finite")
    assert messages == [f"step 7: not applied: {error} (train.jsonl:41)"] * 4
