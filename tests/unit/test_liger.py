"""Liger's kernels reach the model in training and no other. A stub stands in for liger-kernel, which needs Triton."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations import liger as integration
from transformers.models.llama import modeling_llama

from raydiv.config import load_recipe
from raydiv.config.recipe import ModelConfig
from raydiv.model.liger import apply_liger_kernels, require_liger
from raydiv.model.load import ModelSource, build_policy
from raydiv.utils.errors import UserError

PLAIN_NORM, PLAIN_MLP = modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP


class StubNorm(PLAIN_NORM):  # type: ignore[misc]
    """A norm that is told apart: twice the plain one."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * PLAIN_NORM.forward(self, hidden)


def stub_rope(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[str, str]:
    return "liger", "liger"


def patch_llama(model: Any, **options: bool) -> None:
    """What liger-kernel 0.8.5 does to a Llama, its classes and functions."""
    assert options == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    modeling_llama.apply_rotary_pos_emb = stub_rope
    modeling_llama.LlamaRMSNorm = StubNorm
    modeling_llama.LlamaMLP = StubNorm
    model.model.norm.forward = StubNorm.forward.__get__(model.model.norm)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    package, transformers, patches = map(ModuleType, names)
    package.__spec__ = importlib.util.spec_from_loader("liger_kernel", None)
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch_llama}  # type: ignore[attr-defined]
    transformers._apply_liger_kernel_to_instance = patch_llama  # type: ignore[attr-defined]
    for name, module in zip(names, (package, transformers, patches), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(integration, "is_liger_kernel_available", lambda: True)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # put back after the test
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits  # type: ignore[no-any-return]


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_the_trained_instance_alone_has_the_kernels(lora: Any, tiny_model: Path) -> None:
    section = {"id": str(tiny_model), "lora": lora}
    plain = logits_of(build_policy(tiny_model, ModelConfig(**section), torch.float32))
    policy = build_policy(tiny_model, ModelConfig(**section, use_liger_kernel=True), torch.float32)
    assert torch.equal(logits_of(policy), 2 * plain)  # the head takes the last norm's output
    assert (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP) == (PLAIN_NORM, PLAIN_MLP)
    written = ModelSource(tiny_model).load_unmerged()
    assert torch.equal(logits_of(written), plain)


@pytest.mark.usefixtures("liger")
def test_rotary_embeddings_are_ligers_on_gpus_alone(tiny_model: Path) -> None:
    plain = modeling_llama.apply_rotary_pos_emb
    build_policy(tiny_model, ModelConfig(id=str(tiny_model), use_liger_kernel=True), torch.float32)
    q, k, cos, sin = torch.randn(4, 1, 2, 3, 8)
    cos, sin = cos[:, 0], sin[:, 0]
    for rotated, expected in zip(
        modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), plain(q, k, cos, sin), strict=True
    ):
        assert torch.equal(rotated, expected)
    on_gpu = SimpleNamespace(is_cuda=True)
    assert modeling_llama.apply_rotary_pos_emb(on_gpu, k, cos, sin) == ("liger", "liger")
    assert modeling_llama.apply_rotary_pos_emb(q=on_gpu, k=k, cos=cos, sin=sin) == ("liger", "liger")


@pytest.mark.usefixtures("liger")
def test_models_without_kernels_are_refused() -> None:
    require_liger("llama")
    with pytest.raises(UserError, match=r"model.use_liger_kernel: .* type falcon, only for llama: set it to false"):
        require_liger("falcon")
    own = type("Own", (), {"__module__": __name__, "config": SimpleNamespace(model_type="llama")})
    with pytest.raises(UserError, match="code of its own"):
        apply_liger_kernels(own())


def test_its_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs liger-kernel; run: pip install 'liger-kernel>=0.8' \(raydiv\[liger\]\)"
    ):
        require_liger("llama")


def test_it_needs_gpus(tiny_model: Path) -> None:
    content = {
        "model": {"id": str(tiny_model), "use_liger_kernel": True},
        "loss": {"type": "dpo"},
        "optim": {"steps": 1},
    }
    with pytest.raises(UserError, match=r"use_liger_kernel needs cluster\.use_gpu"):
        load_recipe(content | {"data": {"train": "bundled:preference"}})
    load_recipe(content | {"data": {"train": "bundled:preference"}, "cluster": {"use_gpu": True}})
