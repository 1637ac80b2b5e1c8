"""``raydiv bench --part gpu``: what one GPU makes of models of real sizes, whose weights are random."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydiv.commands.bench.harness import run_script
from raydiv.commands.bench.training import Baseline, bench_training
from raydiv.commands.plan.architecture import config_of
from raydiv.config import Recipe
from raydiv.config.load import with_changes
from raydiv.config.recipe import ModelConfig
from raydiv.model.w1 import SPECIAL_IDS, W1, write_tokenizer
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import worker_environment
from raydiv.utils.cache import cache_dir, digest
from raydiv.utils.errors import UserError
from raydiv.utils.storage import atomic


@dataclass(frozen=True, slots=True)
class GpuWorkload:
    """The shape of a model (a hub id whose config is shipped; None: W1's), changes of W1's recipe, and what the run is
    compared with.
    """

    shape: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    against: Sequence[Baseline] = ("loop", "trl")


WORKLOADS = {
    "W1, every weight": GpuWorkload(),
    "Llama 1B, every weight": GpuWorkload("meta-llama/Llama-3.2-1B", {"batch.examples": 64}),
    "Falcon 11B, LoRA": GpuWorkload(
        "tiiuae/falcon-11B", {"batch.examples": 128, "model.lora": {"r": 64, "alpha": 256}}, against=()
    ),
}


def bench_gpu(
    recipe: Recipe, steps: int = 6, repeats: int = 1, display: ProgressDisplay | None = None
) -> dict[str, Any]:
    """``bench_training`` of W1, whose recipe this is, of a full fine-tune of a Llama of 1B and of adapters of a Falcon
    of 11B.

    The large models have random weights, and W1's tokenizer and data; they stay in the cache (25 GB). Returns the
    report of each by name. Raises UserError for another recipe, and for one without one GPU.
    """
    display = display or ProgressDisplay()
    is_w1 = [recipe.model.id, *(source.path for source in recipe.data.train)] == [W1, W1]
    if not is_w1 or recipe.model.lora is not None or recipe.model.quantization is not None:
        raise UserError(f"--part gpu: needs model.id and data.train {W1} without model.lora: configs/bench/w1.yaml")
    if not recipe.cluster.use_gpu or recipe.cluster.num_workers != 1:
        raise UserError("--part gpu: needs cluster.use_gpu=true cluster.num_workers=1")
    reports = {}
    for name, workload in WORKLOADS.items():
        display.print(name)
        changes = dict(workload.changes)
        if workload.shape is not None:
            with display.phase("random weights"):
                changes["model.id"] = str(random_model(workload.shape, worker_environment(recipe.cluster)))
        changed = with_changes(recipe, changes)
        reports[name] = bench_training(changed, workload.against, steps=steps, repeats=repeats, display=display)
    return reports


def random_model(shape: str, environment: Mapping[str, str]) -> Path:
    """The directory of a model with the sizes of ``shape``, random bf16 weights and W1's tokenizer."""
    config = config_of(ModelConfig(id=shape))
    config.update(SPECIAL_IDS)
    target = cache_dir("models") / f"random-{shape.replace('/', '--')}-{digest(config.to_dict())[:8]}"
    if not target.is_dir():
        with atomic(target) as folder:
            config.save_pretrained(folder)
            run_script("gpu", {"folder": str(folder)}, environment)
            write_tokenizer(folder)
    return target


def main(settings: Mapping[str, Any]) -> None:
    """Write random weights for the config in a folder; a process of its own, which leaves nothing on the GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = settings["folder"]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)
    print(json.dumps({"weights": sum(weight.numel() for weight in model.parameters())}))


def gpu_table(reports: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_gpu`` returns."""
    header = ["", "tokens/s", "to the loop", "to TRL's best", "peak GB", "MFU (6 a weight)"]
    rows = []
    for name, report in reports.items():
        ratios = report["ratios"]["tokens_per_second"]
        to_others = (f"{ratios[other]['median']:.2f}" if other in ratios else "" for other in ("loop", "trl_best"))
        own = report["raydiv"]
        rows.append(
            (
                name,
                f"{own['tokens_per_second']:,.0f}",
                *to_others,
                f"{own['peak_bytes'] / 1e9:.1f}",
                f"{report['mfu']:.0%}",
            )
        )
    return header, rows


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
