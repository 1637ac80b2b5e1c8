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
from raydiv.losses import OBJECTIVES, Batch
from raydiv.losses.position import PositionRule, PositionWeights, RewardWeights, TokenConstraint
from raydiv.model.collate import ModelInputs, collate
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


def constrained_inputs(logps: Sequence[np.ndarray], betas: tuple[float, ...], packing: Packing = "none") -> ModelInputs:
    """A micro-batch of responses whose reference log-probs by token are ``logps``."""
    ids = [([1, 2], list(range(3, 3 + len(values)))) for values in logps]
    examples = TokenizedExamples.from_ids(ids, [True] * len(ids), [-1] * len(ids))
    rows = list(range(len(ids)))
    examples = examples.with_ids(rows, [examples[row] for row in rows], [values.astype(np.float32) for values in logps])
    constraint = examples.constraint(TokenConstraint(betas), rows)
    return collate([examples[row] for row in rows], packing, constraint=constraint)


@pytest.mark.parametrize("packing", ["none", "mask"])
def test_constrained_sft_has_the_gradient_of_a_weighted_cross_entropy(packing: Packing) -> None:
    """Qi et al. (arXiv 2406.05946, appendix D.2): tokens of log-prob l weigh 2 (1 - s(b (l - l_ref))) in -mean l."""
    generator = np.random.default_rng(0)
    reference = [generator.normal(-3, 2, length) for length in (9, 4, 1)]
    logps = torch.tensor(np.concatenate(reference) + generator.normal(0, 6, 14), dtype=torch.float32).requires_grad_()
    paper = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)
    inputs = constrained_inputs(reference, paper, packing)
    sums = inputs.sum_per_example(logps, 3)
    batch = Batch(
        sums, sums.detach(), torch.ones(3).bool(), torch.tensor([9, 4, 1]), torch.zeros(0, 2).long(), sums[:0]
    )
    (gradient,) = torch.autograd.grad(OBJECTIVES["sft"].function(batch, {}).loss, logps)

    betas = np.concatenate([[0.5, 2, 2, 2, 2, 0.1, 0.1, 0.1, 0.1], [0.5, 2, 2, 2], [0.5]])
    ratios = logps.detach().double().numpy() - np.concatenate(reference)
    weights = 2 * (1 - 1 / (1 + np.exp(-betas * ratios)))
    np.testing.assert_allclose(gradient, -weights / 14, rtol=2e-5, atol=1e-8)
    np.testing.assert_allclose(inputs.slopes(logps.detach()), weights, rtol=2e-5, atol=1e-8)


def test_a_constrained_token_is_that_of_the_reference_at_the_start_and_gains_at_most_2_log_2_over_beta() -> None:
    reference = [np.array([-1.0, -2.0, -3.0])]
    inputs = constrained_inputs(reference, (2.0, 0.5))
    start = torch.tensor(reference[0], dtype=torch.float32)
    torch.testing.assert_close(inputs.terms(start), start)
    torch.testing.assert_close(inputs.slopes(start), torch.ones(3))
    gains = inputs.terms(start + 1000) - start
    np.testing.assert_allclose(gains, [np.log(2), 4 * np.log(2), 4 * np.log(2)], rtol=1e-6)
    torch.testing.assert_close(inputs.slopes(start - 1000), torch.full((3,), 2.0))
    assert inputs.terms(start - 1e4).isfinite().all()


def test_the_constraint_of_another_ranks_example_is_not_there() -> None:
    examples = examples_of(PAIRED).with_ids([], [], [])
    assert examples.constraint(PositionWeights(rate=0.5), [0]) is None
    tokens = examples.with_ids([1], [examples[1]], [np.array([-1.0, -2.0], np.float32)])
    constraint = tokens.constraint(TokenConstraint((0.3,)), [1])
    assert constraint is not None
    np.testing.assert_allclose(constraint[0], [[0.3, 0.3], [-1, -2]], rtol=1e-6)
    with pytest.raises(LookupError, match="another rank's"):
        tokens.constraint(TokenConstraint((0.3,)), [0])


@pytest.mark.parametrize(
    "position",
    [{"kind": "constrained", "betas": [1]}, {"kind": "rewarded", "model": "another", "temperature": 1}],
    ids=lambda position: str(position["kind"]),
)
def test_log_probs_by_token_need_a_stored_reference(position: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, position)
    assert recipe.loss.needs_reference_tokens
    tree = recipe.model_dump(mode="json", by_alias=True)
    assert load_recipe(tree, ["loss.type=sft", "optim.target_margin=2"]).loss.needs_reference
    with pytest.raises(UserError, match=f"{position['kind']} needs model.reference: store"):
        load_recipe(tree, ["model.lora.r=2", "model.reference=adapter-off"])


@pytest.mark.parametrize(
    ("position", "rule"),
    [
        ({"kind": "flat"}, None),
        ({"kind": "first", "tokens": 5, "weight": 1}, None),
        ({"kind": "common-length", "weight": 1}, None),
        (None, None),
        ({"kind": "decay", "rate": 0.9}, PositionWeights(rate=0.9)),
        ({"kind": "first", "tokens": 5, "weight": 0.1}, PositionWeights(early=5, early_weight=0.1)),
        ({"kind": "common-length", "weight": 0.5}, PositionWeights(late_weight=0.5)),
        ({"kind": "decay", "rate": 0.9, "weight": None}, PositionWeights(rate=0.9)),
        ({"kind": "constrained", "betas": [0.5, 2, 0.1]}, TokenConstraint((0.5, 2.0, 0.1))),
        ({"kind": "rewarded", "model": "runs/dpo", "temperature": -2}, RewardWeights("runs/dpo", -2.0)),
    ],
)
def test_section(position: Any, rule: PositionRule | None, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, position)
    assert recipe.loss.position.rule == rule
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
        ({"kind": "constrained"}, "loss.position: kind constrained needs betas"),
        ({"kind": "constrained", "betas": []}, "loss.position.betas"),
        ({"kind": "constrained", "betas": [0.5, 1e-4]}, "loss.position.betas"),
        ({"kind": "constrained", "betas": [True]}, "loss.position.betas"),
        ({"kind": "decay", "rate": 0.5, "betas": [1]}, "loss.position: betas has no effect with kind decay"),
        ({"kind": "rewarded", "temperature": 1}, "loss.position: kind rewarded needs model"),
        ({"kind": "rewarded", "model": "x"}, "loss.position: kind rewarded needs temperature"),
        ({"kind": "rewarded", "model": "x", "temperature": 0}, "loss.position.temperature: must not be 0"),
        ({"kind": "rewarded", "model": "x", "temperature": float("nan")}, "loss.position.temperature"),
        ({"kind": "first", "tokens": 1, "weight": 2, "model": "x"}, "loss.position: model has no effect"),
        ({"kind": "fist"}, "loss.position.kind"),
        ({"rates": 1}, "loss.position.rates: unknown key \\(did you mean rate\\?\\)"),
    ],
)
def test_settings_without_effect_are_refused(position: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        recipe_of(tmp_path, position)


@pytest.mark.parametrize("packing", ["none", "mask"])
def test_rewarded_sft_and_npo_have_the_gradients_of_w_door(packing: Packing) -> None:
    """Zhao et al. (arXiv 2503.03710; exp_weights and the terms of wgdnpo_loss in the published code, with their plain
    NPO): aligned tokens of weight exp((l_ref - l_dpo) / tau), summed, and -2/beta log s(-beta log-ratio) of unaligned
    ones.
    """
    generator, tau, beta = np.random.default_rng(0), 1.5, 0.5
    lengths, aligned = (9, 4, 6, 5), torch.tensor([True, True, False, False])
    logps, reference, dpo = (
        [generator.normal(-3, 2, length).astype(np.float32) for length in lengths] for _ in range(3)
    )
    weights = [
        RewardWeights("dpo", tau).of(of_dpo, of_reference) if good else np.ones_like(of_dpo)
        for good, of_dpo, of_reference in zip(aligned, dpo, reference, strict=True)
    ]
    inputs = collate([([1, 2], list(range(3, 3 + length))) for length in lengths], packing, weights)
    sums = lambda parts: torch.tensor([float((w * p).sum()) for w, p in zip(weights, parts, strict=True)])  # noqa: E731
    leaf = torch.from_numpy(np.concatenate(logps)).requires_grad_()
    counts = torch.tensor([float(w.sum()) for w in weights])
    batch = Batch(
        inputs.sum_per_example(leaf, 4), sums(reference), aligned, counts, torch.zeros(0, 2).long(), torch.zeros(0)
    )
    sft = OBJECTIVES["sft"].function(batch, {}).loss
    npo = OBJECTIVES["npo"].function(batch, {}, beta=beta).loss
    (of_sft,) = torch.autograd.grad(sft, leaf, retain_graph=True)
    (of_npo,) = torch.autograd.grad(npo, leaf)

    theirs = torch.from_numpy(np.concatenate(logps)).requires_grad_()
    parts, plain = theirs.split(list(lengths)), [torch.from_numpy(values) for values in reference]
    rewards = [torch.from_numpy(r - d) for r, d in zip(reference, dpo, strict=True)]
    refusal = -sum((torch.exp(rewards[i] / tau) * parts[i]).sum() for i in (0, 1))
    ratios = torch.stack([(parts[i] - plain[i]).sum() for i in (2, 3)])
    unlearning = (-torch.nn.functional.logsigmoid(-beta * ratios) * 2 / beta).mean()
    (of_refusal,) = torch.autograd.grad(refusal, theirs, retain_graph=True)
    (of_unlearning,) = torch.autograd.grad(unlearning, theirs)
    # sft is a mean over the tokens by their weights
    torch.testing.assert_close(of_sft * counts[aligned].sum(), of_refusal, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_npo, of_unlearning)
    assert sft.item() * counts[aligned].sum().item() == pytest.approx(refusal.item(), rel=1e-5)


def test_weights_by_reward_follow_the_sign_of_the_temperature() -> None:
    raised, lowered = np.array([-1.0], np.float32), np.array([-3.0], np.float32)
    reference = np.array([-2.0], np.float32)
    assert RewardWeights("m", 2.0).of(raised, reference) == pytest.approx(np.exp(-0.5))
    assert RewardWeights("m", -2.0).of(raised, reference) == pytest.approx(np.exp(0.5))
    assert RewardWeights("m", 2.0).of(lowered, reference) == pytest.approx(np.exp(0.5))
    assert np.isinf(RewardWeights("m", 0.001).of(lowered, reference))


def test_the_weights_of_another_ranks_example_are_not_there() -> None:
    examples = examples_of(PAIRED).with_ids([1], [([1], [2, 3])], [np.array([0.5, 2.0], np.float32)])
    rule = RewardWeights("m", 1.0)
    assert [row.tolist() for row in examples.weights(rule, [1]) or ()] == [[0.5, 2.0]]
    with pytest.raises(LookupError, match="another rank's"):
        examples.weights(rule, [0])


def test_another_loss_keeps_the_position(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"kind": "decay", "rate": 0.9}, label_smoothing=0.1)
    other = load_recipe(recipe.model_dump(mode="json", by_alias=True), ["loss.type=kldo"])
    assert other.loss.position.rate == 0.9
