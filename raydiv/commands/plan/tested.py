"""Combinations that the tests run; a recipe with another one may work, and nobody has seen it."""

from __future__ import annotations

from collections.abc import Iterator

from raydiv.config import Recipe

TESTED: dict[tuple[str, ...], set[tuple[object, ...]]] = {
    ("model.attention",): {("auto",), ("sdpa",), ("eager",)},
    ("model.trust_remote_code",): {(False,)},
    ("cluster.use_gpu",): {(False,)},
    ("cluster.num_workers",): {(1,), (2,), (3,), (4,)},
    ("engine.zero_stage", "engine.precision"): {
        *((stage, "fp32") for stage in (0, 1, 2, 3)),
        *((stage, "bf16") for stage in (1, 2, 3)),
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
"""By the keys that meet, the values that have been run together (tests/)."""


def untested(recipe: Recipe) -> Iterator[str]:
    """What of a settled recipe the tests have never run, as ``key value, key value``."""
    for keys, seen in TESTED.items():
        values = tuple(_value(recipe, key) for key in keys)
        if values not in seen:
            yield ", ".join(f"{key} {str(value).lower()}" for key, value in zip(keys, values, strict=True))


def _value(recipe: Recipe, key: str) -> object:
    section, _, name = key.partition(".")
    found: object = getattr(getattr(recipe, section), name)
    return found
