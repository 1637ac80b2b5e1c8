"""``raydiv bench --part answers``: new tokens per second of the pool, beside other ways to answer."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from raydiv.commands.bench.harness import run_script
from raydiv.config import Recipe
from raydiv.data.prompt_sets import read_prompts
from raydiv.evaluation.generate import complete, until_stop
from raydiv.model.load import ModelSource
from raydiv.model.resolve import model_directory
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session, worker_environment
from raydiv.utils.errors import UserError
from raydiv.utils.versions import versions

BATCH = 32
"""Prompts of a batch of the plain script."""


def bench_answers(
    recipe: Recipe, rows: int = 96, repeats: int = 3, display: ProgressDisplay | None = None
) -> dict[str, Any]:
    """Generate greedy answers to ``rows`` of the recipe's evaluation prompts, in turns with plain ``generate`` and with
    transformers' continuous batching, each in one process on all CPUs or the GPU. Models are loaded before.

    Returns medians of new tokens per second: ``raydiv``, ``plain`` and ``continuous``; and of the ratios within a turn,
    ``raydiv_to_plain`` and ``continuous_to_plain``. Raises UserError for a recipe without evaluate.prompts.
    """
    display = display or ProgressDisplay()
    if not recipe.evaluate.prompts:
        raise UserError("bench --part answers: needs evaluate.prompts")
    model = ModelSource.from_recipe(recipe, model_directory(recipe.model.id, recipe.model.revision))
    chat, prompts = model.chat(), read_prompts(recipe.evaluate.prompts, both=False)
    ids = [chat.prompt_ids(prompt.text) for prompt in islice(cycle(prompts), rows)]
    stops = sorted({chat.end_of_turn.id, chat.tokenizer.eos_token_id} - {None})
    settings = {
        "model": str(model.directory),
        "precision": model.precision,
        "use_gpu": recipe.cluster.use_gpu,
        "ids": ids,
        "stops": stops,
        "max_new_tokens": recipe.evaluate.max_new_tokens,
    }
    turns = []
    for number in range(repeats):
        with display.phase(f"turn {number + 1} of {repeats}"):
            rates = run_script("answers", settings, worker_environment(recipe.cluster))
            turns.append({"raydiv": _pool_rate(recipe, model, ids, stops), **rates})
    return {
        "cpus": os.cpu_count(),
        "prompts": rows,
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "repeats": repeats,
        "versions": versions(),
        **{name: median(turn[name] for turn in turns) for name in turns[0]},
        **{
            f"{name}_to_plain": median(turn[name] / turn["plain"] for turn in turns)
            for name in ("raydiv", "continuous")
        },
        "turns": turns,
    }


def _pool_rate(recipe: Recipe, model: ModelSource, ids: Sequence[Sequence[int]], stops: Sequence[int]) -> float:
    rows = [{"ids": list(prompt), "seed": None} for prompt in ids]
    limit = recipe.evaluate.max_new_tokens
    with ray_session(recipe.cluster):
        complete(model, rows[:8], 1, stops, recipe.cluster)
        return _rate(lambda: complete(model, rows, limit, stops, recipe.cluster))


def _rate(answer: Callable[[], Sequence[Sequence[int]]]) -> float:
    """New tokens per second."""
    started = time.monotonic()
    answers = answer()
    return sum(map(len, answers)) / (time.monotonic() - started)


def main(settings: Mapping[str, Any]) -> None:
    """The script of the other candidates."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
    device = "cuda" if settings["use_gpu"] else "cpu"
    ids, stops = sorted(settings["ids"], key=len), settings["stops"]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=settings["max_new_tokens"], eos_token_id=stops, pad_token_id=stops[0]
    )

    def load(attention: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            settings["model"],
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
        model.generation_config = config
        return model.to(device).eval()

    def plain() -> list[list[int]]:
        answers = []
        for start in range(0, len(ids), BATCH):
            batch = ids[start : start + BATCH]
            length = max(map(len, batch))
            padded = torch.tensor([[stops[0]] * (length - len(prompt)) + prompt for prompt in batch], device=device)
            mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
            with torch.inference_mode():
                output = model.generate(input_ids=padded, attention_mask=mask)
            answers += [until_stop(answer, stops) for answer in output[:, length:].tolist()]
        return answers

    def continuous(prompts: list[list[int]]) -> list[list[int]]:
        with torch.no_grad():  # its thread updates the cache outside of an inference mode
            outputs = paged.generate_batch(inputs=prompts, generation_config=config, persistent_manager=True)
        failed = [output.error for output in outputs.values() if output.error]
        if failed or len(outputs) < len(prompts):
            raise RuntimeError(f"continuous batching failed: {failed[:1]}")
        return [until_stop(list(output.generated_tokens), stops) for output in outputs.values()]

    model = load("sdpa")
    rates = {"plain": _rate(plain)}
    paged = load("paged|sdpa")
    continuous(ids)  # allocates its cache, by the sizes of these requests; it takes long on a CPU
    rates["continuous"] = _rate(lambda: continuous(ids))
    print(json.dumps(rates), flush=True)
    os._exit(0)  # the manager's thread does not end with the main one


def answers_table(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of what ``bench_answers`` returns."""
    return ["", "new tokens/s", "to plain generate"], [
        ("raydiv's pool", f"{report['raydiv']:.0f}", f"{report['raydiv_to_plain']:.2f}"),
        ("transformers, continuous batching", f"{report['continuous']:.0f}", f"{report['continuous_to_plain']:.2f}"),
        ("plain generate, batches of 32", f"{report['plain']:.0f}", "1.00"),
    ]


if __name__ == "__main__":
    import sys

    main(json.loads(Path(sys.argv[1]).read_text()))
