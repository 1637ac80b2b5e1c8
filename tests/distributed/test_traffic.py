"""What a worker is said to send in a step, beside what DeepSpeed's own logger counts; and steps of very many ranks."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.layouts import Layout, make_engine
from helpers.ranks import run_on_ranks
from helpers.sources import ROOT
from raydiv.commands.bench.scale import RANKS, bench_scale, scale_table, synthetic_step
from raydiv.commands.plan.architecture import architecture_of
from raydiv.commands.plan.forecast import plan
from raydiv.commands.plan.traffic import Traffic, step_traffic
from raydiv.config import load_recipe
from raydiv.data.batching import BatchLayout as Dealt
from raydiv.utils import distributed as dist

LOGGED = {"deepspeed": {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}}}
LAYOUTS = [
    *(Layout(stage, engine=LOGGED) for stage in (0, 1, 2, 3)),
    Layout(2, precision="bf16", engine=LOGGED),
    Layout(3, precision="bf16", engine=LOGGED),
    Layout(0, lora=True, engine=LOGGED),
    Layout(2, lora=True, engine=LOGGED),
    Layout(3, lora=True, engine=LOGGED),
]
MICRO_BATCHES = 2


def exchanged(model: Path, layouts: list[Layout]) -> list[Counter[str]]:
    """Bytes of each collective of a step whose micro-batches are scored first; runs on every rank."""
    from deepspeed.comm import comm

    found, ids = [], torch.arange(6, 30)[None]
    for layout in layouts:
        engine = make_engine(layout, model)
        for _ in range(2):  # at the first one DeepSpeed learns the order of the weights
            comm.comms_logger.comms_dict.clear()
            for _ in range(MICRO_BATCHES):
                with torch.no_grad():
                    engine(input_ids=ids)
            for number in range(MICRO_BATCHES):
                loss = engine(input_ids=ids).logits.float().square().mean()
                engine.backward(loss / dist.world_size(), last=number == MICRO_BATCHES - 1)
            engine.update(0.01)
        sizes: Counter[str] = Counter()
        for name, by_size in comm.comms_logger.comms_dict.items():
            sizes[name] += sum(size * entry[0] for size, entry in by_size.items())
        found.append(sizes)
        engine.close()
    return found


def sent(sizes: Counter[str], ranks: int) -> tuple[float, float]:
    """Bytes that ring algorithms send for gradients and for weights; a gathering is logged by each rank's part."""
    part = (ranks - 1) / ranks
    gradients = part * (2 * sizes["all_reduce"] + sizes["reduce_scatter_tensor"])
    return gradients, part * ranks * sizes["all_gather_into_tensor"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_worker_sends_what_is_said(ranks: int, tiny_model: Path, tmp_path: Path) -> None:
    for layout, sizes in zip(
        LAYOUTS, run_on_ranks(exchanged, ranks, tmp_path / "ranks", tiny_model, LAYOUTS)[0], strict=True
    ):
        recipe = layout.recipe(tiny_model)
        stage: Any = layout.stage
        told = step_traffic(architecture_of(recipe), recipe, stage, ranks, MICRO_BATCHES, two_passes=True)
        gradients, weights = sent(sizes, ranks)
        # norms and the like, and adapters that are too small to be partitioned, are not counted
        assert gradients == pytest.approx(told.gradients, rel=0.03), layout
        assert weights == pytest.approx(told.weights, rel=0.1), layout


def test_one_worker_sends_nothing_and_one_pass_gathers_less(tiny_model: Path) -> None:
    recipe = Layout(3).recipe(tiny_model)
    architecture = architecture_of(recipe)
    assert step_traffic(architecture, recipe, 3, 1, 2, two_passes=True).total == 0
    one, two = (step_traffic(architecture, recipe, 3, 8, 2, two_passes=both) for both in (False, True))
    assert one.weights == pytest.approx(2 / 3 * two.weights)
    assert one.gradients == two.gradients


def test_a_network_that_would_rule_the_step_is_noted() -> None:
    slow = Traffic(gradients=50e9, weights=75e9, micro_batches=4, workers=8)  # 10 s at 12.5 GB/s
    assert slow.network_note(operations=2e15) is None  # 10 s at 200 TFLOP/s
    assert re.search(r"10 s .* 5 s .*: faster links, larger micro-batches", str(slow.network_note(operations=1e15)))
    assert Traffic(0.0, 0.0, 4, 1).network_note(operations=1.0) is None

    def notes(*overrides: str) -> str:
        sizes = ("cluster.worker_memory_gb=23.5", "data.train=s3://none/none", *overrides)
        return "\n".join(plan(load_recipe(ROOT / "configs" / "llama-3-8b-lora.yaml", sizes)).notes())

    # ZeRO 3 gathers 16 GB for each of 29 micro-batches, three times
    assert "network would rule the step" in notes("cluster.num_workers=2")
    assert "network would rule the step" not in notes("cluster.num_workers=1", "model.quantization=nf4")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("scope", ["batch", "pair"])
def test_a_step_of_1024_ranks_is_dealt_whole_and_evenly(packed: bool, scope: Any) -> None:
    lengths, units = synthetic_step(8 * 1024, 1024)
    layout = Dealt(2048, 1024, scope, packed)
    dealt, _ = layout.training(lengths, units)
    assert sorted(position for mine in dealt for batch in mine for position in batch) == list(range(len(lengths)))
    assert len({len(mine) for mine in dealt}) == 1
    loads = [sum(lengths[position] for batch in mine for position in batch) for mine in dealt]
    assert max(loads) / np.mean(loads) < 1.2
    assert layout.largest(dealt, lengths) <= 2048


def test_bench_of_scale_has_every_figure() -> None:
    recipe = load_recipe(
        {"model": {"id": "m"}, "loss": {"type": "kldo"}, "optim": {"steps": 3}, "batch": {"examples": 16}},
        ["cluster.num_workers=2"],
    )
    found = bench_scale(recipe, repeats=1)
    assert [one["examples"] for one in found.values()] == [8 * ranks for ranks in RANKS]
    assert all(1 <= one["balance"] < 1.1 for one in found.values())
    assert len(scale_table(found)[1]) == len(RANKS)
