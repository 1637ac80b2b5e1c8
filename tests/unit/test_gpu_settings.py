"""What a run on GPUs is given, as far as a machine without one can tell (tests/gpu has the rest)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from helpers.sources import ROOT
from raydiv.commands.plan.forecast import plan
from raydiv.config import Recipe, load_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.model.load import ModelSource, build_policy
from raydiv.runs.directory import RunDirectory
from raydiv.runs.heartbeat import CONNECT, Heartbeat, diagnose_hang
from raydiv.runtime.resources import worker_memory
from raydiv.runtime.session import SHARED_DEVICES, ray_session, worker_environment
from raydiv.training import worker
from raydiv.training.engine import deepspeed_config
from raydiv.utils.errors import UserError


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe({"model": {"id": "m"}, "loss": {"type": "dpo"}, "optim": {"steps": 1}}, overrides)


def test_torch_neither_plans_cudnn_attention_nor_fragments_memory() -> None:
    environment = worker_environment(ClusterConfig(use_gpu=True))
    assert environment["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "1"
    assert "expandable_segments:True" in environment["PYTORCH_ALLOC_CONF"]
    assert "DS_ACCELERATOR" not in environment
    chosen = worker_environment(ClusterConfig(use_gpu=True, env={"PYTORCH_ALLOC_CONF": "backend:native"}))
    assert chosen["PYTORCH_ALLOC_CONF"] == "backend:native"
    assert "PYTORCH_ALLOC_CONF" not in worker_environment(ClusterConfig())


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        ((), "fp32"),
        (("cluster.use_gpu=true",), "bf16"),
        (("cluster.use_gpu=true", "engine.precision=fp32"), "fp32"),
        (("cluster.use_gpu=true", "engine.zero_stage=3"), "bf16"),
        # stage 0 has no fp32 master weights
        (("cluster.use_gpu=true", "engine.zero_stage=0"), "fp32"),
    ],
)
def test_bf16_is_the_default_on_gpus(overrides: tuple[str, ...], precision: str) -> None:
    assert recipe_of(*overrides).engine.precision == precision


def test_memory_is_what_is_free_on_a_gpu_of_the_kind_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[dict[str, Any]] = []

    def remote(**options: Any) -> Any:
        requests.append(options)
        return lambda function: SimpleNamespace(remote=function)

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * 2**30, 80 * 2**30))
    cluster = ClusterConfig(use_gpu=True, train={"custom": {"fast": 1}, "accelerator": "H100"})
    assert worker_memory(cluster) == 70 * 2**30
    assert requests == [{"num_gpus": 1, "resources": {"fast": 1.0}, "accelerator_type": "H100"}]


def test_devices_that_are_not_shared_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED_DEVICES, "0")
    with pytest.raises(UserError, match=SHARED_DEVICES), ray_session(ClusterConfig(use_gpu=True)):
        raise AssertionError("not reached")


@pytest.mark.parametrize("name", ["llama-3-8b-full", "falcon-11b-full"])
def test_auto_takes_no_stage_whose_gradients_are_whole_on_every_gpu(name: str) -> None:
    facts = plan(load_recipe(ROOT / "configs" / f"{name}.yaml")).facts
    assert facts["layout"]["zero_stage"] in (2, 3)
    assert facts["layout"]["fits"]
    assert "engine.precision bf16" in facts["layout"]["settles"]


def test_gradients_are_reduced_during_the_backward_on_gpus() -> None:
    def zero(*overrides: str) -> dict[str, Any]:
        section: dict[str, Any] = deepspeed_config(recipe_of(*overrides))["zero_optimization"]
        return section

    assert zero("cluster.use_gpu=true", "engine.zero_stage=2")["overlap_comm"] is True
    assert "overlap_comm" not in zero("engine.zero_stage=2")


@pytest.mark.parametrize(("zero_3", "device_map"), [(False, {"": "cuda"}), (True, None)])
def test_weights_stream_to_the_gpu_unless_they_are_partitioned(
    zero_3: bool, device_map: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from transformers import integrations

    requests: list[dict[str, Any]] = []

    def pretrained(directory: str, **options: Any) -> Any:
        requests.append(options)
        raise OSError("only its arguments matter here")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", pretrained)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(integrations, "is_deepspeed_zero3_enabled", lambda: zero_3)
    with pytest.raises(UserError):
        build_policy(tiny_model, recipe_of().model, torch.bfloat16)
    with pytest.raises(UserError):
        ModelSource(tiny_model).load_for_inference()
    assert [options.get("device_map") for options in requests] == [device_map, {"": "cuda"}]


def test_a_run_out_of_gpu_memory_names_phase_sizes_and_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("batch.tokens_per_microbatch=512", f"output_dir={tmp_path}")
    task = worker.TrainTask(recipe, tmp_path, RunDirectory.of(recipe).path, 0, None, None)  # type: ignore[arg-type]

    def run_out(task: Any, task_ref: Any, run: Any, timer: Any) -> None:
        timer.step = 3
        timer.enter("push")
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "_run", run_out)
    monkeypatch.setattr(worker, "model_directory", Path)
    with pytest.raises(
        RuntimeError, match=r"push of step 3.*tokens_per_microbatch below 512.*activation_checkpointing"
    ):
        worker.run_worker(task, None)


def test_workers_that_never_connect_are_told_which_interface_to_set() -> None:
    beats = [Heartbeat(rank, 2, f"node-{rank}", 1, 0, CONNECT, 1, 700, 10) for rank in range(2)]
    assert "NCCL_SOCKET_IFNAME" in str(diagnose_hang(beats, 600))
    later = [Heartbeat(rank, 2, f"node-{rank}", 1, 4, "score", 9 + rank, 700, 10) for rank in range(2)]
    assert "NCCL" not in str(diagnose_hang(later, 600))


@pytest.mark.long
def test_changes_that_no_stage_allows_are_not_proposed() -> None:
    recipe = load_recipe(ROOT / "configs" / "llama-3-8b-lora.yaml", ["cluster.num_workers=1", "model.quantization=nf4"])
    facts = plan(recipe, memory_gb=10).facts
    assert not facts["layout"]["fits"]
    assert not any("offload_parameters" in change for change in facts["changes"])
    with pytest.raises(UserError, match=r"excludes engine\.offload_parameters"):
        load_recipe(recipe.model_dump(mode="json", by_alias=True), ["engine.offload_parameters=cpu"])
