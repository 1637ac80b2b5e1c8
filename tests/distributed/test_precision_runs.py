"""Whole runs in bf16 and in 4 bits: they resume to the bit, and export a model that passes its check."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from safetensors.torch import load_file

from helpers.models import make_model
from helpers.ranks import run_on_ranks
from helpers.runs import untimed
from helpers.small_run import recipe_of, write_files
from helpers.worker_alone import prepared
from raydiv.model.load import DTYPES, build_policy
from raydiv.runs.directory import RunDirectory
from raydiv.training.engine import DeepSpeedEngine
from raydiv.training.worker import run_worker

LORA = "model.lora={r: 4, dropout: 0.1}"
KINDS: dict[str, tuple[str, ...]] = {
    "everything": (),
    "adapters": (LORA,),
    "adapters on 4 bits": (LORA, "model.quantization=nf4"),
    "everything, offloaded": ("engine.offload_optimizer=cpu",),
}
CASES = [
    *(("everything", stage, "bf16") for stage in (1, 2, 3)),
    *(("adapters", stage, "bf16") for stage in (1, 2, 3)),
    ("adapters on 4 bits", 0, "fp32"),
    ("adapters on 4 bits", 1, "bf16"),
    *(("everything, offloaded", stage, "bf16") for stage in (1, 3)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of 64 weights must fill a row."""
    return make_model(tmp_path_factory.mktemp("model"), hidden=64)


def train_whole_and_in_parts(whole: bytes, in_parts: bytes) -> None:
    """Run both tasks to their end, the second with a stop after its first step; runs on every rank."""
    from raydiv.utils import distributed as dist

    run_worker(cloudpickle.loads(whole), None)
    task = cloudpickle.loads(in_parts)
    run = RunDirectory(task.run_directory)
    if dist.rank() == 0:
        run.request_stop()
    dist.barrier()
    run_worker(task, None)
    dist.barrier()
    assert run.metrics.steps_taken() == 1
    if dist.rank() == 0:
        run.start_attempt(task.recipe)
    dist.barrier()
    run_worker(task, None)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("kind", "stage", "precision"), CASES)
def test_a_run_resumes_and_exports_in_every_precision(
    kind: str, stage: int, precision: str, model: Path, tmp_path: Path
) -> None:
    files = write_files(tmp_path)
    tasks = [
        prepared(
            recipe_of(
                model, files, tmp_path / "runs", name, f"engine.zero_stage={stage}", f"engine.precision={precision}",
                *KINDS[kind],
            )
        )
        for name in ("whole", "in-parts")
    ]  # fmt: skip
    run_on_ranks(train_whole_and_in_parts, 2, tmp_path / "ranks", *map(cloudpickle.dumps, tasks))
    whole, in_parts = (RunDirectory(task.run_directory) for task in tasks)
    expected, resumed = (dict(tensors_of(run)) for run in (whole, in_parts))
    assert expected.keys() == resumed.keys()
    steps = [[line["step"] for line in run.metrics.read() if "loss" in line] for run in (whole, in_parts)]
    assert steps[0] == steps[1] == [1, 2, 3, 4]
    assert untimed(in_parts) == untimed(whole)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert {weight.dtype for weight in expected.values()} == {DTYPES[precision]}
    # lora_B is zero before training
    assert any(weight.abs().max() > 0 for name, weight in expected.items() if "lora_A" not in name)


def tensors_of(run: RunDirectory) -> Iterator[tuple[str, torch.Tensor]]:
    for path in run.model.glob("*.safetensors"):
        yield from load_file(path).items()


def dtypes_of_adapters(model: str, stages: tuple[int, ...]) -> list[set[str]]:
    """The dtypes of the trained parameters under each stage; runs on every rank."""
    found = []
    for stage in stages:
        recipe = recipe_of(
            Path(model), {"train": "", "eval": ""}, Path(), "any", LORA, "engine.precision=bf16",
            f"engine.zero_stage={stage}",
        )  # fmt: skip
        engine: Any = DeepSpeedEngine(recipe, lambda: build_policy(Path(model), recipe.model, torch.bfloat16))  # noqa: B023
        found.append({str(parameter.dtype) for parameter in engine.model.parameters() if parameter.requires_grad})
        engine.close()
    return found


@pytest.mark.slow
def test_adapters_have_the_models_dtype_at_every_stage(model: Path, tmp_path: Path) -> None:
    stages = (1, 2, 3)
    for dtypes in run_on_ranks(dtypes_of_adapters, 2, tmp_path / "ranks", str(model), stages):
        assert dtypes == [{"torch.bfloat16"}] * len(stages)
