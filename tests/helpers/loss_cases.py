"""Batches of known numbers, and every objective at every choice of its options."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from torch import Tensor

from raydiv.losses import OBJECTIVES, Batch, Value

torch.set_num_threads(1)

NONE: tuple[tuple[int, int], ...] = ()

# seven examples; the fifth belongs to no pair, and the classes differ in size
ALIGNED = [True, False, False, True, False, True, False]
A, U = np.array(ALIGNED), ~np.array(ALIGNED)
RATIOS = np.array([1.3, -0.4, 2.1, -1.7, 0.9, 3.2, -2.5])
REFERENCE = np.array([-12.0, -9.5, -31.0, -4.25, -7.0, -15.5, -2.0])
TOKENS = np.array([5, 3, 11, 2, 4, 7, 1])
PAIRS = [(0, 1), (3, 2), (5, 6)]
PLUS, MINUS = np.array([0, 3, 5]), np.array([1, 2, 6])
MISMATCHED = [0.8, -0.3, 1.9]
BETA = 0.3


def make_batch(
    log_ratios: Sequence[float] | np.ndarray | Tensor,
    aligned: Sequence[bool],
    pairs: Sequence[tuple[int, int]] = NONE,
    *,
    reference: Sequence[float] | np.ndarray | None = None,
    tokens: Sequence[int] | np.ndarray | None = None,
    mismatched: Sequence[float] = (),
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """A batch whose log-probs are a leaf, or lead to ``log_ratios`` when that is a tensor with a graph."""
    ratios = torch.as_tensor(log_ratios, dtype=dtype)
    reference_logps = torch.full((len(aligned),), -3.0) if reference is None else torch.as_tensor(np.asarray(reference))
    logps = reference_logps.to(dtype) + ratios
    return Batch(
        logps=logps if logps.requires_grad else logps.requires_grad_(),
        reference_logps=reference_logps.to(dtype),
        aligned=torch.tensor(list(aligned), dtype=torch.bool),
        tokens=torch.tensor(tokens if tokens is not None else [4] * len(aligned), dtype=torch.long),
        pairs=torch.tensor(list(pairs), dtype=torch.long).reshape(-1, 2),
        mismatched_log_ratios=torch.tensor(list(mismatched), dtype=dtype),
    )


def known_batch(
    log_ratios: np.ndarray = RATIOS,
    pairs: Sequence[tuple[int, int]] = PAIRS,
    mismatched: Sequence[float] = MISMATCHED,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """The seven examples above."""
    return make_batch(
        log_ratios, ALIGNED, pairs, reference=REFERENCE, tokens=TOKENS, mismatched=mismatched, dtype=dtype
    )


def evaluate(
    name: str, batch: Batch, state: Mapping[str, float] | None = None, **options: Any
) -> tuple[Value, np.ndarray]:
    """An objective's value, and its gradient by the log-probs."""
    objective = OBJECTIVES[name]
    value = objective.function(batch, objective.state if state is None else state, **options)
    assert value.loss.shape == ()
    assert value.loss.dtype == batch.logps.dtype
    (gradient,) = torch.autograd.grad(value.loss, batch.logps)
    return value, gradient.double().numpy()


def divergence(value: Value) -> float:
    assert value.divergence is not None
    return float(value.divergence.detach())


def with_defaults(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with all others at their defaults."""
    return {**OBJECTIVES[name].defaults, **options}


def ceiling(name: str, options: Mapping[str, Any]) -> float | None:
    return OBJECTIVES[name].ceiling(with_defaults(name, options))


NUMBERS: dict[str, list[float]] = {
    "label_smoothing": [0.2],
    "skew": [0.5],
    "lambda_aligned": [0.3],
    "alpha": [-1.0, 0.0, 1.0, 2.0],
    "ema_rate": [0.5],
    "delta_rate": [1.0],
    "cpo_alpha": [0.0],
    "gamma": [0.0],
    "tau": [0.9],
}


def variants() -> list[Any]:
    """Every objective at its defaults and at each choice of its options that is a choice; numbers where named above."""
    cases = []
    for name, objective in OBJECTIVES.items():
        axes = []
        for option, (annotation, default) in objective.parameters.items():
            choices: list[Any] = [default, *NUMBERS.get(option, [])]
            if annotation is bool:
                choices = [False, True]
            elif get_origin(annotation) is Literal:
                choices = list(get_args(annotation))
            axes.append([(option, choice) for choice in choices])
        for options in map(dict, itertools.product(*axes)):
            unused = objective.unused_options(options)
            if any(options[option] != objective.defaults[option] for option in unused):
                continue  # an option that means nothing here, at several values
            chosen = {
                option: choice
                for option, choice in options.items()
                if option not in unused and (choice != objective.defaults[option] or isinstance(choice, str))
            }
            label = "-".join([name, *(f"{key}={choice}" for key, choice in chosen.items())])
            cases.append(pytest.param(name, chosen, id=label))
    return cases


every_variant = pytest.mark.parametrize(("name", "options"), variants())
