"""Combinations of settings that the tests run. Another combination may work, but no test covers it."""

from __future__ import annotations

from collections.abc import Iterator

from raydiv.config import Recipe
from raydiv.config.section import Section

TESTED: dict[tuple[str, ...], set[tuple[object, ...]]] = {
    ("model.attention",): {("auto",), ("sdpa",), ("eager",)},
    ("model.trust_remote_code",): {(False,)},
    ("model.use_liger_kernel",): {(False,)},
    ("cluster.use_gpu",): {(False,)},
    ("cluster.num_workers",): {(1,), (2,), (3,), (4,)},
    ("engine.zero_stage", "engine.precision", "model.lora"): {
        *((stage, "fp32", kind) for stage in (0, 1, 2, 3) for kind in (None, "set")),
        *((stage, "bf16", kind) for stage in (1, 2, 3) for kind in (None, "set")),
    },
    ("engine.precision", "engine.offload_optimizer"): {
        *(("fp32", place) for place in ("none", "cpu")),
        *(("bf16", place) for place in ("none", "cpu")),
    },
    ("engine.zero_stage", "model.quantization"): {
        *((stage, None) for stage in (0, 1, 2, 3)),
        *((stage, "nf4") for stage in (0, 2)),
    },
    ("engine.zero_stage", "engine.offload_optimizer", "engine.offload_parameters"): {
        *((stage, "none", "none") for stage in (0, 1, 2, 3)),
        *((stage, "cpu", "none") for stage in (1, 2, 3)),
        (3, "cpu", "cpu"),
    },
}
"""For each group of keys, the combinations of values that the tests in tests/ run."""


def untested_combinations(recipe: Recipe) -> Iterator[str]:
    """The combinations of a resolved recipe that no test runs, each as ``key value, key value``."""
    for keys, tested in TESTED.items():
        values = tuple(_value(recipe, key) for key in keys)
        if values not in tested:
            yield ", ".join(f"{key} {str(value).lower()}" for key, value in zip(keys, values, strict=True))


def _value(recipe: Recipe, key: str) -> object:
    section, _, name = key.partition(".")
    value: object = getattr(getattr(recipe, section), name)
    return "set" if isinstance(value, Section) else value
