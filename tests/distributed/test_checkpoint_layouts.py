"""Any layout resumes from a checkpoint of any other: ZeRO stages, numbers of workers, adapters, precisions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.layouts import CPU, Layout, make_engine, update
from helpers.ranks import run_on_ranks
from raydiv.training.checkpoint.manifest import CheckpointStore, Manifest
from raydiv.training.checkpoint.shards import ShardReader, write_shard
from raydiv.training.zero_state import KINDS, Fragment
from raydiv.utils import distributed as dist
from raydiv.utils.storage import Folder

BEFORE, AFTER = 3, 2
"""Updates before the checkpoint, and after it."""


WHOLE = [
    Layout(0),
    Layout(1),
    Layout(2),
    Layout(2, engine=CPU),
    Layout(3),
    Layout(3, persistent=10**6),
    Layout(3, engine=CPU),
]
ADAPTERS = [Layout(0, lora=True), Layout(3, lora=True)]
HALF = [Layout(1, precision="bf16"), Layout(2, precision="bf16"), Layout(3, precision="bf16")]
LAYOUTS = WHOLE + ADAPTERS + HALF


def save(engine: Any, folder: Folder, step: int) -> Manifest:
    """Write the engine's state as a checkpoint; all ranks."""
    checkpoints = CheckpointStore(folder)
    shard = write_shard(checkpoints.at(step), dist.rank(), engine.partitions.snapshot())
    manifest = Manifest(step, engine.partitions.updates, dist.world_size(), {}, {}, None, dist.all_gather_object(shard))
    if dist.rank() == 0:
        checkpoints.commit(manifest)
    dist.barrier()
    return manifest


def whole_state(folder: Folder, step: int) -> dict[str, np.ndarray]:
    """Every parameter and moment of a checkpoint, whole."""
    manifest = CheckpointStore(folder).manifest(step)
    sizes: dict[str, int] = {}
    for shard in manifest.shards:
        for name, (_, stop) in shard.pieces.items():
            sizes[name] = max(stop, sizes.get(name, 0))
    with ShardReader(CheckpointStore(folder).at(step), manifest.shards) as shards:
        return {
            f"{kind} of {name}": shards.read(Fragment(name, 0, size, size), kind).numpy()
            for name, size in sizes.items()
            for kind in KINDS
        }


def train_and_save(model: Path, layouts: Sequence[Layout], root: Path) -> list[dict[str, np.ndarray]]:
    """Train under each layout, save the state half-way, and return the weights at the end; runs on every rank."""
    ends = []
    for number, layout in enumerate(layouts):
        engine = make_engine(layout, model)
        for step in range(BEFORE):
            update(engine, step)
        save(engine, Folder(str(root / str(number))), BEFORE)
        ends.append(train_to_the_end(engine))
    return ends


def train_to_the_end(engine: Any) -> dict[str, np.ndarray]:
    for step in range(BEFORE, BEFORE + AFTER):
        update(engine, step)
    weights = {
        name: weight.to(torch.float32, copy=True).numpy() for name, weight in engine.weights(trainable_only=True)
    }
    engine.close()
    return weights


def restore_and_train(model: Path, pairs: Sequence[tuple[Layout, Path]], root: Path) -> list[dict[str, np.ndarray]]:
    """Restore each checkpoint under a layout, save it again at once, and return the weights at the end."""
    ends = []
    for number, (layout, source) in enumerate(pairs):
        engine = make_engine(layout, model)
        manifest = CheckpointStore(Folder(str(source))).manifest(BEFORE)
        with ShardReader(CheckpointStore(Folder(str(source))).at(BEFORE), manifest.shards) as shards:
            engine.partitions.restore(shards.read, manifest.updates)
        assert engine.partitions.updates == BEFORE
        save(engine, Folder(str(root / str(number))), BEFORE)
        ends.append(train_to_the_end(engine))
    return ends


def is_same_kind(layout: Layout, other: Layout) -> bool:
    return (layout.lora, layout.precision) == (other.lora, other.precision)


@pytest.mark.long
def test_any_layout_resumes_from_any_other(tiny_model: Path, tmp_path: Path) -> None:
    by_ranks = {
        ranks: run_on_ranks(
            train_and_save, ranks, tmp_path / f"began{ranks}", tiny_model, LAYOUTS, tmp_path / f"kept{ranks}"
        )
        for ranks in (1, 2, 3)
    }
    # each checkpoint under its own layout, and under the next of its kind on another number of ranks
    for ranks, others in ((2, (2, 1, 3)), (1, (2,)), (4, (2,))):
        for before in others:
            pairs, expected, has_own_layout = [], [], []
            for number, layout in enumerate(LAYOUTS):
                source = tmp_path / f"kept{before}" / str(number)
                if before == ranks:
                    pairs.append((layout, source))
                else:
                    same_kind = [other for other in LAYOUTS if is_same_kind(layout, other)]
                    pairs.append((same_kind[(same_kind.index(layout) + 1) % len(same_kind)], source))
                has_own_layout.append(before == ranks)
                expected.append(by_ranks[before][0][number])
            resaved = tmp_path / f"again{before}{ranks}"
            results = run_on_ranks(
                restore_and_train, ranks, tmp_path / f"ran{before}{ranks}", tiny_model, pairs, resaved
            )
            for number, (layout, source) in enumerate(pairs):
                where = (before, ranks, LAYOUTS[number], layout)
                saved_state, resaved_state = (
                    whole_state(Folder(str(source)), BEFORE),
                    whole_state(Folder(str(resaved / str(number))), BEFORE),
                )
                assert saved_state.keys() == resaved_state.keys(), where
                assert len(saved_state) > 10, where
                assert all(np.array_equal(saved_state[name], resaved_state[name]) for name in saved_state), where
                assert any(values.any() for name, values in saved_state.items() if name.startswith("exp_avg_sq")), where
                for name, weight in expected[number].items():
                    if has_own_layout[number]:
                        assert np.array_equal(results[0][number][name], weight), (*where, name)
                    else:
                        tolerance = 3e-2 if layout.precision == "bf16" else 1e-4
                        error = np.abs(results[0][number][name] - weight).max()
                        assert error <= tolerance * np.abs(weight).max(), (*where, name, error)


@pytest.mark.slow
def test_only_adapters_are_saved(tiny_model: Path, tmp_path: Path) -> None:
    run_on_ranks(
        train_and_save, 1, tmp_path / "ranks", tiny_model, [Layout(0, lora=True), Layout(0)], tmp_path / "kept"
    )
    adapters, everything = (
        sum(file.stat().st_size for file in (tmp_path / "kept" / number).rglob("*.safetensors")) for number in "01"
    )
    base = (tiny_model / "model.safetensors").stat().st_size
    assert adapters < 0.8 * base
    assert everything > 2.9 * base
