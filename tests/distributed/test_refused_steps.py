"""Steps that are not finite: left out without a trace under every ZeRO stage, counted, named, and too many end the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.layouts import CPU, Layout, built, update
from helpers.ranks import run_on_ranks
from raydiv.config import load_recipe
from raydiv.runs.directory import RunDirectory
from raydiv.training.coefficients import NotFiniteError
from raydiv.training.state import TrainState
from raydiv.training.worker import _step
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
    return {name: weight.float().numpy() for name, weight in engine.weights(trainable_only=True)}


def refused(model: Path, layouts: Sequence[Layout]) -> list[dict[str, Any]]:
    """Two updates, and between them steps that are not made; runs on every rank."""
    found = []
    for layout in layouts:
        ends = []
        for bad in (False, True):
            engine = built(layout, model)
            update(engine, 0)
            before, norm = weights(engine), None
            if bad:
                backward(engine, 1.0)
                engine.discard()
                backward(engine, float("nan"))
                norm = engine.update(0.1)
            between = weights(engine)
            update(engine, 1)
            ends.append(
                {"before": before, "between": between, "after": weights(engine), "norm": norm, "made": engine.updates}
            )
            engine.close()
        found.append({"plain": ends[0], "bad": ends[1]})
    return found


def discarded_by_another_name(model: Path) -> bool:
    """Whether it is found that DeepSpeed made the update, where the method that is hidden from it has another name."""
    engine = built(Layout(3), model)
    update(engine, 0)
    engine._zero3 = False  # hides the method that stage 3 does not call, as a rename in DeepSpeed would
    backward(engine, 1.0)
    try:
        engine.discard()
    except RuntimeError as error:
        return "discarded" in str(error)
    finally:
        engine.close()
    return False


@pytest.mark.slow
def test_a_discarded_step_that_was_applied_is_found(tiny_model: Path, tmp_path: Path) -> None:
    assert run_on_ranks(discarded_by_another_name, 2, tmp_path / "ranks", tiny_model) == [True, True]


@pytest.mark.slow
def test_a_refused_step_leaves_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    for by_layout in run_on_ranks(refused, 2, tmp_path / "ranks", tiny_model, LAYOUTS):
        for layout, found in zip(LAYOUTS, by_layout, strict=True):
            plain, bad = found["plain"], found["bad"]
            assert not np.isfinite(bad["norm"]), layout
            assert plain["made"] == bad["made"] == 2, layout
            for name in plain["after"]:
                assert np.array_equal(bad["before"][name], bad["between"][name]), (layout, name)
                assert np.array_equal(bad["after"][name], plain["after"][name]), (layout, name)
            assert any(not np.array_equal(plain["after"][name], plain["before"][name]) for name in plain["after"])


class Stepper:
    """Refuses every step that it is given."""

    def step(self, chosen: Any, lr: float) -> dict[str, float]:
        raise NotFiniteError("log-probs of examples [1] of the step are not finite", [1])


def test_it_is_counted_and_named_and_one_too_many_ends_the_run(tmp_path: Path) -> None:
    recipe = load_recipe(
        {"model": {"id": "m"}, "loss": {"type": "dpo"}, "optim": {"steps": 9, "max_refused": 2}},
        [f"output_dir={tmp_path}"],
    )
    run, carried = RunDirectory(tmp_path), TrainState()
    examples = SimpleNamespace(places=lambda rows: [(0, 1, int(row)) for row in rows])
    given: Any = SimpleNamespace(recipe=recipe, train=SimpleNamespace(examples=examples))
    plan: Any = SimpleNamespace(step=6, rows=np.array([40, 41, 42]))
    counts = [_step(Stepper(), None, 0.1, plan, given, run, carried, last=False)["refused_steps"] for _ in range(2)]  # type: ignore[arg-type]
    assert counts == [1, 2]
    with pytest.raises(FloatingPointError, match=r"step 7: log-probs .* one more than optim\.max_refused: 2"):
        _step(Stepper(), None, 0.1, plan, given, run, carried, last=False)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="it is the last one"):
        _step(Stepper(), None, 0.1, plan, given, run, TrainState(), last=True)  # type: ignore[arg-type]
    said: list[str] = []
    run.events.path.rename(tmp_path / "written")
    with run.events.follow(said.append, lambda place: f"train.jsonl:{place[2]}"):
        run.events.path.write_bytes((tmp_path / "written").read_bytes())
    assert (
        said
        == [f"step 7: {NotFiniteError('log-probs of examples [1] of the step are not finite')} (train.jsonl:41)"] * 4
    )
