"""Weights go into ZeRO-3's partitions as they are read: no rank ever holds the model."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import run_on_ranks
from raydiv.config import load_recipe

SHARD = 40_000_000
SLACK = 40_000_000
"""Bytes that loading may take besides: modules, small tensors, gloo's copy of a parameter."""


def anonymous_bytes() -> int:
    """Memory of this process that is its own: a mapped file's pages can be dropped and do not count."""
    result = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert result is not None
    return 1024 * int(result[1])


def loaded(directory: str) -> dict[str, Any]:
    """Rise of the peak of anonymous memory while the model is built under ZeRO-3; runs on every rank."""
    from raydiv.model.load import build_policy
    from raydiv.training.engine import DeepSpeedEngine

    recipe = load_recipe(
        {
            "model": {"id": directory},
            "loss": {"type": "sft"},
            "optim": {"steps": 1},
            "engine": {"zero_stage": 3},
        }
    )
    result: dict[str, Any] = {}
    build_policy(Path(directory), recipe.model, torch.float32)  # what is imported and allocated once

    def build() -> Any:
        before, peak, done = anonymous_bytes(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                peak[0] = max(peak[0], anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = build_policy(Path(directory), recipe.model, torch.float32)
        done.set()
        watcher.join()
        result["peak"] = peak[0] - before
        return model

    engine = DeepSpeedEngine(recipe, build)
    result["sums"] = {name: float(weight.double().sum()) for name, weight in engine.weights(trainable_only=False)}
    return result


@pytest.mark.slow
def test_a_rank_holds_its_partition_and_a_shard_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc otherwise holds on to what was freed, up to a third of the model, which would hide what is asked here."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    from transformers import LlamaConfig, LlamaForCausalLM

    from helpers.models import make_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model", max_shard_size=SHARD)
    make_tokenizer(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 8
    whole = sum(4 * p.numel() for p in model.parameters())
    expected = {name: float(p.detach().double().sum()) for name, p in model.named_parameters()}
    del model
    for result in run_on_ranks(loaded, 2, tmp_path / "ranks", str(tmp_path / "model"), fresh=True):
        assert result["peak"] < whole / 2 + SHARD + SLACK
        assert result["sums"] == pytest.approx(expected, rel=1e-9)


UNQUANTIZED = """
import sys
from pathlib import Path

import torch

from raydiv.config.recipe import ModelConfig
from raydiv.model.load import build_policy
from raydiv.model.silence import silence_libraries

silence_libraries()
path, lora = Path(sys.argv[1]), {"r": 4}
build_policy(path, ModelConfig(id=str(path), lora=lora), torch.float32)
seen = [name in sys.modules for name in ("peft", "bitsandbytes", "torch._inductor.compile_fx")]
from peft.import_utils import is_bnb_available
from transformers.utils import is_bitsandbytes_available

quantized = build_policy(path, ModelConfig(id=str(path), lora=lora, quantization="nf4"), torch.float32)
kinds = {type(module).__name__ for module in quantized.modules()}
print(*seen, is_bnb_available(), is_bitsandbytes_available(), "Linear4bit" in kinds)
"""


def test_whole_weights_load_no_quantizer_and_quantized_ones_still_find_it(tiny_model: Path) -> None:
    """It imports torch's compiler, for seconds, and peft imports it wherever it is installed."""
    done = subprocess.run([sys.executable, "-c", UNQUANTIZED, str(tiny_model)], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "False", "True", "True", "True"], done.stderr
