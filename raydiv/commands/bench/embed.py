"""``raydiv bench --part embed``: prompts per second of the embedding pool, compared with a plain batched forward."""

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
from raydiv.data.readers import read_examples
from raydiv.evaluation.separation.embed import Readout, embed
from raydiv.model.load import ModelSource
from raydiv.model.resolve import model_directory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session, worker_environment
from raydiv.utils.versions import versions

WARMUP_PARTS = 4
"""The first 1/WARMUP_PARTS of the prompts is not timed: processes start and models load."""


def bench_embed(
    recipe: Recipe, rows: int = 800, repeats: int = 3, display: ProgressDisplay | None = None
) -> dict[str, Any]:
    """Embed ``rows`` of the recipe's training prompts ``repeats`` times, in turns with plain batches of the same
    prompts.

    Returns medians: ``raydiv`` and ``plain`` in prompts per second after warm-up, and their ``ratio`` within a turn.
    """
    display = display or ProgressDisplay()
    model = ModelSource.from_recipe(recipe, model_directory(recipe.model.id, recipe.model.revision))
    prompts = _prompts(recipe, rows)
    turns = []
    for number in range(repeats):
        with display.phase(f"turn {number + 1} of {repeats}"):
            with ray_session(recipe.cluster):
                raydiv_rate = _rate(1 for _ in embed(model, prompts, recipe.cluster, Readout()))
            turns.append({"raydiv": raydiv_rate, "plain": _plain_rate(recipe, model, prompts)})
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
    """``rows`` training prompts, without duplicates as far as the data have enough."""
    examples = [example for source in recipe.data.train for example in read_examples(source, recipe.data)]
    distinct = list({str(example.prompt): example.prompt for example in examples}.values())
    return [Prompt(distinct[n % len(distinct)], False, "any", str(n)) for n in range(rows)]


def _rate(done: Iterable[int]) -> float:
    """Prompts per second; ``done`` yields the number of prompts of each finished batch."""
    times = [(time.monotonic(), count) for count in done]
    total = sum(count for _, count in times)
    seen, start = 0, times[0][0]
    for at, count in times:
        seen += count
        start = at
        if seen >= total / WARMUP_PARTS:
            break
    return (total - seen) / (times[-1][0] - start)


def _plain_rate(recipe: Recipe, model: ModelSource, prompts: Sequence[Prompt]) -> float:
    chat = model.chat()
    settings = {
        "model": str(model.directory),
        "precision": model.precision,
        "use_gpu": recipe.cluster.use_gpu,
        "ids": [chat.prompt_ids(prompt.text, generation=False) for prompt in prompts],
    }
    return float(run_script("embed", settings, worker_environment(recipe.cluster))["rate"])


BATCH = 32
"""Batch size of the plain script; prompts of similar length are padded together."""


def main(settings: Mapping[str, Any]) -> None:
    """The plain script: the decoder of transformers on all CPUs or the GPU, over padded batches, shortest first."""
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
            batch = ids[start : start + BATCH]
            lengths = torch.tensor([len(prompt) for prompt in batch])
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in batch], batch_first=True)
            mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
            with torch.inference_mode():
                states = decoder(input_ids=padded.to(device), attention_mask=mask.to(device)).last_hidden_state
            states[torch.arange(len(batch)), lengths - 1].float().cpu()
            yield len(batch)

    print(json.dumps({"rate": _rate(batches())}))


def embed_table(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_embed`` returns."""
    return ["", "prompts/s"], [
        ("raydiv's pool", f"{report['raydiv']:.1f}"),
        ("plain batched forward", f"{report['plain']:.1f}"),
        ("ratio within a turn", f"{report['ratio']:.2f}"),
    ]


if __name__ == "__main__":
    import sys

    main(json.loads(Path(sys.argv[1]).read_text()))
