"""``raydiv bench --part embed``: prompts a second through the pool that reads hidden states, beside a bare batched forward."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydiv.commands.bench.harness import run_script
from raydiv.config import Recipe
from raydiv.data.prompt_sets import Prompt
from raydiv.data.sources import read_examples
from raydiv.evaluation.separation.embed import Readout, embed
from raydiv.model.load import ModelSource
from raydiv.model.resolve import model_directory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session, worker_environment
from raydiv.utils.versions import versions

STARTED = 4
"""A rate is that of the prompts after the first of this many parts: processes start, and models load, before."""


def bench_embed(
    recipe: Recipe, rows: int = 800, repeats: int = 3, display: ProgressDisplay | None = None
) -> dict[str, Any]:
    """Read ``rows`` of the recipe's training prompts ``repeats`` times, in turn with plain batches of the same.

    Returns medians: ``raydiv`` and ``plain`` in prompts a second, once each is under way, and their ``ratio`` within a turn.
    """
    display = display or ProgressDisplay()
    model = ModelSource.of(recipe, model_directory(recipe.model.id, recipe.model.revision))
    prompts = _prompts(recipe, rows)
    turns = []
    for number in range(repeats):
        with display.phase(f"turn {number + 1} of {repeats}"):
            with ray_session(recipe.cluster):
                ours = _rate(1 for _ in embed(model, prompts, recipe.cluster, Readout()))
            turns.append({"raydiv": ours, "plain": _plain(recipe, model, prompts)})
    return {
        "cpus": os.cpu_count(),
        "prompts": len(prompts),
        "repeats": repeats,
        "versions": versions(),
        **{name: statistics.median(turn[name] for turn in turns) for name in ("raydiv", "plain")},
        "ratio": statistics.median(turn["raydiv"] / turn["plain"] for turn in turns),
        "turns": turns,
    }


def _prompts(recipe: Recipe, rows: int) -> list[Prompt]:
    """Different training prompts, over again where there are fewer."""
    examples = [one for source in recipe.data.train for one in read_examples(source, recipe.data.columns)]
    different = list({str(one.prompt): one.prompt for one in examples}.values())
    return [Prompt(different[n % len(different)], False, "any", str(n)) for n in range(rows)]


def _rate(done: Iterable[int]) -> float:
    """Prompts a second, from how many are done each time."""
    times = [(time.monotonic(), count) for count in done]
    total = sum(count for _, count in times)
    seen, start = 0, times[0][0]
    for at, count in times:
        seen += count
        start = at
        if seen >= total / STARTED:
            break
    return (total - seen) / (times[-1][0] - start)


def _plain(recipe: Recipe, model: ModelSource, prompts: Sequence[Prompt]) -> float:
    chat = model.chat()
    settings = {
        "model": str(model.directory),
        "precision": model.precision,
        "use_gpu": recipe.cluster.use_gpu,
        "ids": [chat.prompt(prompt.text, generation=False) for prompt in prompts],
    }
    return float(run_script("embed", settings, worker_environment(recipe.cluster))["rate"])


BATCH = 32
"""Prompts of similar length that the plain script pads together."""


def main(settings: Mapping[str, Any]) -> None:
    """The plain script: transformers' decoder alone, on all CPUs or the GPU, over padded batches, shortest first."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
    device = "cuda" if settings["use_gpu"] else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    decoder = model.base_model.to(device).eval()
    ids = sorted(settings["ids"], key=len)

    def batches() -> Iterable[int]:
        for start in range(0, len(ids), BATCH):
            own = ids[start : start + BATCH]
            lengths = torch.tensor([len(one) for one in own])
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in own], batch_first=True)
            mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
            with torch.inference_mode():
                states = decoder(input_ids=padded.to(device), attention_mask=mask.to(device)).last_hidden_state
            states[torch.arange(len(own)), lengths - 1].float().cpu()
            yield len(own)

    print(json.dumps({"rate": _rate(batches())}))


def embed_table(found: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_embed`` returns."""
    return ["", "prompts/s"], [
        ("raydiv's pool", f"{found['raydiv']:.1f}"),
        ("plain batched forward", f"{found['plain']:.1f}"),
        ("ratio within a turn", f"{found['ratio']:.2f}"),
    ]


if __name__ == "__main__":
    import sys

    main(json.loads(Path(sys.argv[1]).read_text()))
