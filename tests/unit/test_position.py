"""Weights of response positions: their values, and the recipe's section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.stored import stored_examples
from raydiv.config import Recipe, load_recipe
from raydiv.data.tokens import TokenizedExamples
from raydiv.losses.position import PositionWeights
from raydiv.model.collate import collate
from raydiv.model.packing import Packing
from raydiv.utils.errors import UserError

PAIRED = [([1], [2, 3, 4, 5], True, 0), ([1], [2, 3], False, 0), ([6], [7, 8, 9], True, -1)]


def examples_of(rows: Sequence[tuple[list[int], list[int], bool, int]]) -> TokenizedExamples:
    return TokenizedExamples.from_ids([row[:2] for row in rows], [row[2] for row in rows], [row[3] for row in rows])


def recipe_of(tmp_path: Path, position: Any, **loss: Any) -> Recipe:
    return load_recipe(
        {
            "model": {"id": str(tmp_path)},
            "loss": {"type": "dpo", **loss, "position": position},
            "optim": {"steps": 1},
        }
    )


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (PositionWeights(rate=0.5), [[1, 0.5, 0.25, 0.125], [1, 0.5], [1, 0.5, 0.25]]),
        (PositionWeights(early=3, early_weight=0.2), [[0.2, 0.2, 0.2, 1], [0.2, 0.2], [0.2, 0.2, 0.2]]),
        (PositionWeights(late_weight=0.3), [[1, 1, 0.3, 0.3], [1, 1], [1, 1, 1]]),
    ],
)
@pytest.mark.parametrize("packing", ["none", "mask"])
def test_weights_of_a_micro_batch(weights: PositionWeights, expected: list[list[float]], packing: Packing) -> None:
    examples = examples_of(PAIRED)
    found = examples.weights(weights, [2, 0, 1])
    inputs = collate([examples[row] for row in (2, 0, 1)], packing, found)
    assert inputs.weights is not None
    np.testing.assert_allclose(inputs.weights, np.concatenate([expected[row] for row in (2, 0, 1)]), rtol=1e-7)
    ones = torch.ones(9)
    np.testing.assert_allclose(inputs.sum_per_example(ones, 3), [sum(expected[row]) for row in (2, 0, 1)], rtol=1e-6)
    assert examples.weights(None, [0]) is None


def test_an_example_without_its_partner_has_the_weights_of_its_pair() -> None:
    """As where held-out examples are read by length, with no pair numbers."""
    stored = stored_examples([row[:2] for row in PAIRED], [row[2] for row in PAIRED], [row[3] for row in PAIRED])
    weights = PositionWeights(late_weight=0.3)
    rows = np.array([2, 0])
    alone = stored.without_ids(rows, np.array([-1, -1])).weights(weights, [0, 1])
    assert alone is not None
    np.testing.assert_allclose(np.concatenate(alone), [1, 1, 1, 1, 1, 0.3, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate(alone), np.concatenate(stored.weights(weights, rows) or []))


@pytest.mark.parametrize(
    ("position", "weights"),
    [
        ({"kind": "flat"}, None),
        ({"kind": "first", "tokens": 5, "weight": 1}, None),
        ({"kind": "common-length", "weight": 1}, None),
        (None, None),
        ({"kind": "decay", "rate": 0.9}, PositionWeights(rate=0.9)),
        ({"kind": "first", "tokens": 5, "weight": 0.1}, PositionWeights(early=5, early_weight=0.1)),
        ({"kind": "common-length", "weight": 0.5}, PositionWeights(late_weight=0.5)),
        ({"kind": "decay", "rate": 0.9, "weight": None}, PositionWeights(rate=0.9)),
    ],
)
def test_section(position: Any, weights: PositionWeights | None, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, position)
    assert recipe.loss.position.weights == weights
    again = load_recipe(recipe.model_dump(mode="json", by_alias=True))
    assert again.loss.position == recipe.loss.position


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ({"kind": "decay"}, "loss.position: kind decay needs rate"),
        ({"kind": "first", "tokens": 3}, "loss.position: kind first needs weight"),
        ({"kind": "common-length"}, "loss.position: kind common-length needs weight"),
        ({"rate": 0.5}, "loss.position: rate has no effect with kind flat"),
        ({"kind": "decay", "rate": 0.5, "tokens": 2}, "loss.position: tokens has no effect with kind decay"),
        ({"kind": "decay", "rate": 1.0}, "loss.position.rate"),
        ({"kind": "first", "tokens": 0, "weight": 1}, "loss.position.tokens"),
        ({"kind": "first", "tokens": 1, "weight": 0}, "loss.position.weight"),
        ({"kind": "fist"}, "loss.position.kind"),
        ({"rates": 1}, "loss.position.rates: unknown key \\(did you mean rate\\?\\)"),
    ],
)
def test_settings_without_effect_are_refused(position: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        recipe_of(tmp_path, position)


def test_another_loss_keeps_the_position(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"kind": "decay", "rate": 0.9}, label_smoothing=0.1)
    other = load_recipe(recipe.model_dump(mode="json", by_alias=True), ["loss.type=kldo"])
    assert other.loss.position.rate == 0.9
