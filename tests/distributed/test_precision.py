"""bf16 keeps fp32 master weights and adds micro-batches up in fp32; 4-bit bases are frozen and their adapters learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import make_model
from helpers.ranks import run_on_ranks
from helpers.step_cases import Case, on_this_rank, step_examples
from raydiv.config import load_recipe
from raydiv.model.head import LogProbHead
from raydiv.model.load import DTYPES, ModelSource, build_policy
from raydiv.training.engine import DeepSpeedEngine
from raydiv.training.step import Stepper

STEPS = 8
SFT = {"type": "sft"}


def trained(model: str, case: Case, optim: dict[str, Any], precision: str) -> dict[str, torch.Tensor]:
    """Weights after STEPS AdamW updates on one batch, in fp32; runs on every rank."""
    recipe = replace(case, engine={"precision": precision}).recipe(Path(model))
    recipe = load_recipe(recipe.model_dump(mode="json", by_alias=True) | {"optim": {"steps": STEPS, **optim}})
    torch.manual_seed(0)
    engine: Any = DeepSpeedEngine(recipe, lambda: build_policy(Path(model), recipe.model, DTYPES[precision]))
    stepper = Stepper(engine, LogProbHead(engine.model), recipe.loss.terms, case.tokens, "mask")
    for _ in range(STEPS):
        stepper.step(on_this_rank(step_examples("pairs"), stepper.layout), recipe.optim.lr)
    weights = {name: weight.to(torch.float32, copy=True) for name, weight in engine.weights(trainable_only=True)}
    engine.close()
    return weights


def train_cases(model: str, cases: list[tuple[Case, dict[str, Any], str]]) -> list[dict[str, torch.Tensor]]:
    return [trained(model, *case) for case in cases]


@pytest.mark.slow
def test_bf16_keeps_fp32_master_weights_and_sums_micro_batches_in_fp32(tiny_model: Path, tmp_path: Path) -> None:
    """Steps of 2e-5 are below half a bf16 spacing of most weights: without master weights nothing would move."""
    small = {"lr": 2e-5, "clip": None}
    cases = [(Case(SFT, tokens, zero_stage=stage), small, "bf16") for stage in (1, 2, 3) for tokens in (1, 10_000)]
    cases.append((Case(SFT, 10_000, zero_stage=3), small, "fp32"))
    *by_case, exact = run_on_ranks(train_cases, 2, tmp_path / "ranks", str(tiny_model), cases)[0]
    before = dict(build_policy(tiny_model, cases[0][0].recipe(tiny_model).model, torch.float32).named_parameters())
    moved = {name: weight - before[name].detach() for name, weight in exact.items()}
    for weights in by_case:
        same = total = 0.0
        for name, weight in weights.items():
            start = before[name].detach().bfloat16().float()
            # of elements that an update can be seen in, those that went the way of fp32 training
            seen = (weight - start != 0) & (moved[name].abs() > 0.5 * STEPS * 2e-5)
            total += float(seen.sum())
            same += float((((weight - start) * moved[name] > 0) & seen).sum())
        assert total > 500
        assert same / total > 0.95


@pytest.fixture(scope="module")
def quantizable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of 64 weights must fill a row."""
    return make_model(tmp_path_factory.mktemp("quantizable"), hidden=64)


def quantized_step(model: str, stage: int, tokens: int) -> dict[str, torch.Tensor]:
    recipe = load_recipe(
        {
            "model": {"id": model, "lora": {"r": 4}, "quantization": "nf4"},
            "loss": {"type": "kldo", "skew": 0.5},
            "optim": {"steps": 1, "lr": 0.01},
            "engine": {"zero_stage": stage},
        }
    )
    torch.manual_seed(0)
    engine: Any = DeepSpeedEngine(recipe, lambda: build_policy(Path(model), recipe.model, torch.float32))
    kinds = {type(module).__name__ for module in engine.model.modules()}
    assert "Linear4bit" in kinds
    packed = {name: p.detach().clone() for name, p in engine.model.named_parameters() if not p.requires_grad}
    stepper = Stepper(engine, LogProbHead(engine.model), recipe.loss.terms, tokens, "mask")
    stepper.step(on_this_rank(step_examples("pairs"), stepper.layout), 0.01)
    assert all(torch.equal(p, packed[name]) for name, p in engine.model.named_parameters() if name in packed)
    weights = {name: weight.clone() for name, weight in engine.weights(trainable_only=True)}
    engine.close()
    return weights


@pytest.mark.slow
@pytest.mark.long
def test_adapters_on_a_4_bit_base_learn_alike_in_every_layout(quantizable: Path, tmp_path: Path) -> None:
    (expected,) = run_on_ranks(quantized_step, 1, tmp_path / "one", str(quantizable), 0, 10_000)
    assert any(weight.abs().max() > 0 for name, weight in expected.items() if "lora_B" in name)
    for number, (stage, tokens) in enumerate([(0, 70), (2, 70)]):
        for weights in run_on_ranks(quantized_step, 2, tmp_path / f"two{number}", str(quantizable), stage, tokens):
            for name, weight in expected.items():
                # AdamW's first step is the sign of a gradient, which rounding turns where it is near zero
                different = (weights[name] - weight).abs() > 1e-4
                assert different.float().mean() < 0.02, name


def test_a_4_bit_model_scores_near_the_whole_one(quantizable: Path) -> None:
    ids = torch.arange(6, 30)[None]
    source = ModelSource(quantizable)
    with torch.no_grad():
        whole = source.load().eval()(ids).logits.log_softmax(-1)
        small = replace(source, quantization="nf4").load().eval()(ids).logits.log_softmax(-1)
    assert 0 < float((whole - small).abs().max()) < 0.2
