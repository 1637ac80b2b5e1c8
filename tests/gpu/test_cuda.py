"""What a GPU alone can show: kernels, memory, precision, and whole runs. Skipped without one; minutes on one of 80 GB.

Memory is compared with the forecast at a Llama of 1 billion random weights; runs train a tiny model by the commands
that users run.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from helpers.models import make_model
from helpers.small_run import write_files
from helpers.step_cases import make_step, on_this_rank
from raydiv.cli import main
from raydiv.commands.plan.architecture import architecture_of
from raydiv.commands.plan.memory import memory_of
from raydiv.config import Recipe, load_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.data.tokens import TokenizedExamples
from raydiv.model import packing
from raydiv.model.head import LogitRule, LogProbHead, _Score
from raydiv.model.load import DTYPES, build_policy
from raydiv.model.packing import BlockDiagonalMask
from raydiv.runs.directory import RunDirectory
from raydiv.runtime.session import worker_environment
from raydiv.training.engine import DeepSpeedEngine
from raydiv.training.step import Stepper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

HEADS, GROUPS, SIZE = 8, 2, 64
LENGTHS = [5, 1, 300, 47, 64]


# kernels


def exact_attention(query: Any, key: Any, value: Any, window: int | None) -> torch.Tensor:
    """Causal attention over each example, in fp64."""
    rows, start = [], 0
    for length in LENGTHS:
        q, k, v = (tensor[:, :, start : start + length].double() for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(HEADS // GROUPS, dim=1) for tensor in (k, v))
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position
        seen = (distance >= 0) & (distance < (window or length))
        scores = (q @ k.transpose(2, 3) / SIZE**0.5).masked_fill(~seen, -torch.inf)
        rows.append(scores.softmax(-1) @ v)
        start += length
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "loop"])
def test_packed_attention_and_its_gradient(kernel: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel and packing.variable_length_kernel() is None:
        pytest.skip("this torch has no varlen_attn with windows")
    if not kernel:
        monkeypatch.setattr(packing, "variable_length_kernel", lambda: None)
    torch.manual_seed(0)
    total = sum(LENGTHS)
    inputs = [
        torch.randn(1, heads, total, SIZE, device="cuda", dtype=torch.bfloat16) for heads in (HEADS, GROUPS, GROUPS)
    ]
    given = [tensor.clone().requires_grad_() for tensor in inputs]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    output = packing.packed_attention(*given, BlockDiagonalMask.of(LENGTHS), window)
    expected = exact_attention(*exact, window)
    assert float((output - expected).abs().max()) < 0.02
    direction = torch.randn_like(expected)
    (output.double() * direction).sum().backward()
    (expected * direction).sum().backward()
    for own, other in zip(given, exact, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert float((own.grad - other.grad).abs().max() / other.grad.abs().max()) < 0.02


@pytest.mark.parametrize("vocabulary", [65_024, 128_256])
def test_head_against_fp64(vocabulary: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(700, 512, device="cuda", dtype=torch.bfloat16)
    weight = 0.05 * torch.randn(vocabulary, 512, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (700,), device="cuda")
    given = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    buffer = torch.empty(256, vocabulary, device="cuda")
    logps = _Score.apply(*given, None, targets, LogitRule(), buffer)  # type: ignore[no-untyped-call]
    expected = (exact[0] @ exact[1].T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert float((logps - expected).abs().max()) < 1e-4, "logits are not rounded to bf16"
    logps.sum().backward()
    expected.sum().backward()
    for own, other in zip(given, exact, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert float((own.grad - other.grad).abs().max() / other.grad.abs().max()) < 0.02


# steps


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result in a new process with the environment of a training worker, alone in its group."""
    environment = worker_environment(ClusterConfig(use_gpu=True)) | {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
    }  # fmt: skip
    queue = mp.get_context("spawn").Queue()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        process = mp.get_context("spawn").Process(target=_put_result, args=(queue, function, arguments))
        process.start()
    result = queue.get(timeout=300)
    process.join()
    return result


def _put_result(queue: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    queue.put(function(*arguments))


def llama_1b(folder: Path) -> Path:
    """The config of a Llama of a billion weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def recipe_of(model: Path, *overrides: str) -> Recipe:
    tree = {
        "model": {"id": str(model)},
        "loss": {"type": "kldo", "skew": 0.5},
        "optim": {"steps": 4},
        "batch": {"max_length": 512, "max_prompt_length": 64},
        "checkpoint": {"every": None},
        "cluster": {"use_gpu": True, "num_workers": 1},
    }
    return load_recipe(tree, overrides)


EXAMPLES = 64


def steps_of(path: str, overrides: tuple[str, ...], tokens: int) -> dict[str, Any]:
    """Four updates of random weights: losses, memory, and how often the host waits for the GPU in the last one."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    recipe = recipe_of(Path(path), *overrides)
    dtype = DTYPES[recipe.engine.precision]

    def policy() -> Any:
        torch.manual_seed(0)
        device = "cpu" if is_deepspeed_zero3_enabled() else "cuda"
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
        if recipe.model.lora is None:
            return model
        from peft import get_peft_model

        from raydiv.model.load import lora_config

        return get_peft_model(model, lora_config(recipe.model.lora), autocast_adapter_dtype=False)

    engine: Any = DeepSpeedEngine(recipe, policy)
    stepper = Stepper(engine, LogProbHead(engine.model), recipe.loss.terms, tokens, "mask")
    draw = np.random.default_rng(0)
    rows = [draw.integers(3, 128_000, draw.integers(80, 300)) for _ in range(EXAMPLES)]
    aligned = [number % 2 == 0 for number in range(EXAMPLES)]
    examples = TokenizedExamples.from_ids([(row[:40], row[40:]) for row in rows], aligned, [-1] * EXAMPLES)
    nothing = TokenizedExamples.from_ids([], [], [])
    torch.cuda.reset_peak_memory_stats()
    losses, waits = [], 0
    for number in range(4):
        step = make_step(number, examples, nothing, torch.full((EXAMPLES,), -900.0), torch.zeros(0))
        step = on_this_rank(step, stepper.layout)
        torch.cuda.set_sync_debug_mode("warn" if number == 3 else "default")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses.append(stepper.step(step, 1e-5)["loss"])
        waits = sum("synchroniz" in str(warning.message) for warning in caught)
    torch.cuda.set_sync_debug_mode("default")
    total = int(sum(examples.lengths))
    stage: Any = recipe.engine.zero_stage
    forecast = memory_of(architecture_of(recipe), recipe, 1, stage, min(tokens, total), accumulates=tokens < total)
    return {
        "losses": losses,
        "waits": waits,
        "micro_batches": len(step.layout.training),
        "forecast": forecast.total,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "dtypes": sorted({str(weight.dtype) for weight in engine.model.parameters() if weight.requires_grad}),
    }


STEPS = {
    "ZeRO 1": ("engine.zero_stage=1",),
    "ZeRO 2": ("engine.zero_stage=2",),
    "ZeRO 3": ("engine.zero_stage=3",),
    "ZeRO 2, checkpointing": ("engine.zero_stage=2", "engine.activation_checkpointing=true"),
    "ZeRO 2, adapters": ("engine.zero_stage=2", "model.lora={r: 64}"),
    "ZeRO 3, adapters": ("engine.zero_stage=3", "model.lora={r: 64}"),
}


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    path = str(llama_1b(tmp_path_factory.mktemp("llama")))
    results = {name: in_a_process(steps_of, path, overrides, 4000) for name, overrides in STEPS.items()}
    for name, result in results.items():
        sizes = ", ".join(f"{key} {result[key] / 2**30:.2f} GiB" for key in ("forecast", "allocated", "reserved"))
        print(f"{name}: {sizes}; {result['waits']} waits in {result['micro_batches']} micro-batches")
    return results


def test_stages_agree(stepped: dict[str, dict[str, Any]]) -> None:
    expected = stepped["ZeRO 2"]["losses"]
    for name in ("ZeRO 1", "ZeRO 3", "ZeRO 2, checkpointing"):
        assert stepped[name]["losses"] == pytest.approx(expected, rel=0.01)
    assert stepped["ZeRO 3, adapters"]["losses"] == pytest.approx(stepped["ZeRO 2, adapters"]["losses"], rel=0.01)


@pytest.mark.parametrize("name", STEPS)
def test_memory_is_as_predicted(name: str, stepped: dict[str, dict[str, Any]]) -> None:
    result = stepped[name]
    assert result["allocated"] == pytest.approx(result["forecast"], rel=0.1)
    assert result["reserved"] < 1.1 * result["forecast"]
    assert result["dtypes"] == ["torch.bfloat16"]


@pytest.mark.parametrize("name", STEPS)
def test_the_host_rarely_waits_for_the_gpu(name: str, stepped: dict[str, dict[str, Any]]) -> None:
    # a step ends with its loss and its norm
    assert stepped[name]["waits"] <= 3 * stepped[name]["micro_batches"] + 6


# whole runs, by the commands of users


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), hidden=64)


def run_recipe(folder: Path, model: Path, *overrides: str) -> tuple[int, RunDirectory]:
    files = write_files(folder)
    tree = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "model": {"id": str(model)},
        "data": {"train": files["train"], "eval": files["eval"]},
        "loss": {"type": "kldo", "skew": 0.5},
        "optim": {"lr": 1e-3, "steps": 4},
        "batch": {"examples": 8, "max_length": 160, "max_prompt_length": 80},
        "checkpoint": {"every": 2},
        "cluster": {"use_gpu": True, "num_workers": 1},
        "separation": {"prompts": None},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(tree))
    status = main(["train", str(path), *overrides])
    return status, RunDirectory(folder / "runs" / "run")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.lora={r: 4}",),
        ("model.lora={r: 4}", "model.quantization=nf4"),
        ("engine.zero_stage=3",),
        ("engine.zero_stage=2", "engine.offload_optimizer=cpu"),
        ("engine.zero_stage=0",),
    ],
    ids=" ".join,
)
def test_a_run_ends_with_a_model_that_passed_its_check(overrides: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    if "model.quantization=nf4" in overrides:
        pytest.importorskip("bitsandbytes")
    status, run = run_recipe(tmp_path, model, *overrides)
    assert status == 0
    assert list(run.model.glob("*.safetensors"))
    assert run.read_recipe().engine.precision == ("fp32" if "engine.zero_stage=0" in overrides else "bf16")


def test_a_run_resumes_at_another_stage(model: Path, tmp_path: Path) -> None:
    status, run = run_recipe(tmp_path, model, "engine.zero_stage=2", "optim.steps=2", "optim.schedule=constant")
    assert status == 0
    run.result.unlink()
    stage = json.loads((run.path / "stage.json").read_text())
    (run.path / "stage.json").write_text(json.dumps(stage | {"metrics_bytes_at_end": None, "end_reason": None}))
    assert main(["train", str(tmp_path / "recipe.json"), "engine.zero_stage=3", "optim.steps=2", "--resume"]) == 0
    assert list(run.model.glob("*.safetensors"))


def test_quickstarts_recipe_in_bf16(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    overrides = ["cluster.use_gpu=true", "cluster.num_workers=1", "optim.steps=6", f"output_dir={tmp_path}", "name=run"]
    assert main(["train", str(recipe), *overrides]) == 0
    run = RunDirectory(tmp_path / "run")
    assert run.read_recipe().engine.precision == "bf16"
    assert list(run.model.glob("*.safetensors"))
    assert os.path.exists(run.report)


def test_build_policy_streams_to_the_gpu(model: Path) -> None:
    policy = build_policy(model, recipe_of(model).model, torch.bfloat16)
    assert {parameter.device.type for parameter in policy.parameters()} == {"cuda"}
