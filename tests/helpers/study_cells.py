"""A synthetic study: cells whose attack success falls with log D_B by a known slope."""

from __future__ import annotations

import math

import numpy as np

from raydiv.experiments.study.cells import Cell

SLOPE = -0.12
INTERCEPTS = {"Qwen2.5-1.5B": 0.35, "Llama_3.2-1B": 0.5, "gemma-2-2b": 0.42}
LOSSES = ("dpo", "kto", "bco", "kldo")
MATCHED = 0.8
"""Length-matched D_B over D_B."""


def metrics_of(d_b: float, asr: float, degenerate: float = 0.01) -> dict[str, float]:
    return {
        "separation/d_b": d_b,
        "separation/d_b_length_matched": MATCHED * d_b,
        "separation/d_b_shuffled": 0.012,
        "separation/silhouette": d_b / (2 + d_b),
        "separation/length_auc": 0.5,
        "evaluate/asr": asr,
        "evaluate/asr/prefill": min(1.0, asr + 0.2),
        "evaluate/asr_any/prefill": 1.0,
        "evaluate/asr_set/AdvBench": asr / 2,
        "evaluate/asr_set/Salad-Data:base_set": 1.1 * asr,
        "evaluate/over_refusal": 0.3 * (1 - asr),
        "evaluate/over_refusal_set/XSTest": 0.2 * (1 - asr),
        "evaluate/safety": 1 - asr - degenerate,
        "evaluate/degenerate": degenerate,
        "evaluate/toxicity/harmful": asr / 4,
        "evaluate/toxicity/ordinary": 0.0,
        "evaluate/kl": 10 * d_b,
        "evaluate/perplexity": 9 + d_b,
        "capability/gsm8k/exact_match/strict-match": 0.3 - 0.01 * d_b,
        "reward/margin": 1.0,
    }


def study(noise: float = 0.0, seeds: int = 1) -> list[Cell]:
    """Cells of three models, two kinds of data and four losses; data CR separates more than Pref."""
    generator = np.random.default_rng(0)
    cells = []
    for m, (model, intercept) in enumerate(INTERCEPTS.items()):
        for data, factor in (("CR", 2.0), ("Pref", 1.0)):
            for n, loss in enumerate(LOSSES):
                for seed in range(seeds):
                    d_b = factor * (1 + 0.9 * n + 0.2 * m) * math.exp(noise * generator.normal())
                    asr = intercept + SLOPE * math.log(d_b) + noise * generator.normal() / 4
                    before = metrics_of(0.02 + 0.01 * m, 0.9)
                    where = f"runs/{model}-{data}-{loss}-{seed}"
                    cells.append(Cell(model, data, loss, seed, metrics_of(d_b, asr), before, where))
    return cells
