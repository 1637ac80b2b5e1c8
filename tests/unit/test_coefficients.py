"""The loss on the global batch: one coefficient per example, and the meaning of each metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from raydiv.config.loss import LossConfig, LossSection
from raydiv.data.batching import StepPlan
from raydiv.losses import OBJECTIVES, Batch, Term, widest_scope
from raydiv.losses.objective import objective as register_objective
from raydiv.training.coefficients import evaluate_objective, initial_states, known_coefficients
from raydiv.training.held_out import divergence_of_groups
from raydiv.training.metrics import (
    EMA_RATE,
    RunningMeans,
    estimate_facts,
    reward_metrics,
    state_metrics,
    step_record,
)
from raydiv.training.utilisation import Utilisation

torch.set_num_threads(1)

LOG_RATIOS = [2.0, -1.0, 0.5, 4.0, -3.0]
REFERENCE = [-10.0, -20.0, -5.5, -9.0, -7.0]
ALIGNED = [True, False, True, False, False]
TOKENS = [4, 9, 6, 2, 3]
BETA, SKEW = 0.2, 0.3


def make_batch(
    log_ratios: Sequence[float] = LOG_RATIOS,
    aligned: Sequence[bool] = ALIGNED,
    pairs: Sequence[tuple[int, int]] = (),
) -> Batch:
    reference = torch.tensor(REFERENCE[: len(log_ratios)])
    return Batch(
        logps=reference + torch.tensor(log_ratios),
        reference_logps=reference,
        aligned=torch.tensor(aligned),
        tokens=torch.tensor(TOKENS[: len(log_ratios)]),
        pairs=torch.tensor(list(pairs), dtype=torch.long).reshape(-1, 2),
        mismatched_log_ratios=torch.zeros(0),
    )


def term(name: str, weight: float = 1.0, **options: Any) -> Term:
    """A term with all of its options, as a recipe gives it."""
    return Term(OBJECTIVES[name], weight, {**OBJECTIVES[name].defaults, **options})


KLDO = term("kldo", beta=BETA, skew=SKEW)
MIXTURE = [KLDO, term("sft", 0.5)]


def test_mixture_is_the_weighted_sum() -> None:
    batch = make_batch()
    logps = batch.logps.clone().requires_grad_()
    r, aligned = BETA * (logps - batch.reference_logps), batch.aligned
    kldo = (SKEW * r[aligned].exp().mean() + (1 - SKEW) * r[~aligned].exp().mean()).log() - r[aligned].mean()
    sft = -logps[aligned].sum() / 10  # 4 + 6 aligned response tokens
    (expected,) = torch.autograd.grad(kldo + 0.5 * sft, logps)

    output = evaluate_objective(MIXTURE, initial_states(MIXTURE), batch)
    torch.testing.assert_close(output.coefficients, expected, rtol=0, atol=1e-6)
    assert not output.coefficients.requires_grad
    assert not batch.logps.requires_grad
    assert output.loss == output.metrics["loss"] == pytest.approx(float((kldo + 0.5 * sft).detach()), abs=1e-5)
    assert output.metrics["loss/kldo"] == pytest.approx(float(kldo.detach()), abs=1e-5)
    assert output.metrics["loss/sft"] == pytest.approx(float(sft.detach()), abs=1e-5)
    # the estimate of the main objective alone
    assert output.metrics["divergence"] == pytest.approx(-float(kldo.detach()), abs=1e-5)


def test_losses_of_terms_are_logged_for_mixtures_only() -> None:
    alone = evaluate_objective([KLDO], initial_states([KLDO]), make_batch()).metrics
    mixed = evaluate_objective(MIXTURE, initial_states(MIXTURE), make_batch()).metrics
    assert [name for name in alone if name.startswith("loss")] == ["loss"]
    assert [name for name in mixed if name.startswith("loss")] == ["loss", "loss/kldo", "loss/sft"]


def test_no_divergence_where_none_is_estimated() -> None:
    terms = [term("sft"), term("kldo", 0.1)]
    assert "divergence" not in evaluate_objective(terms, initial_states(terms), make_batch()).metrics


def test_divergence_before_training_is_plain_zero() -> None:
    terms = [term("kldo")]
    metrics = evaluate_objective(terms, initial_states(terms), make_batch([0.0] * 3, [True, True, False])).metrics
    assert str(metrics["divergence"]) == "0.0"


def test_each_term_has_its_own_state() -> None:
    terms = [term("kldo", beta=1.0, estimator="ema"), term("bco", 0.5, beta=1.0), term("sft", 0.1)]
    states = initial_states(terms)
    assert states == [{"log_mean": 0.0}, {"delta": 0.0}, {}]
    states[0]["log_mean"] = 9.0  # type: ignore[index]
    assert OBJECTIVES["kldo"].state == {"log_mean": 0.0}

    batch = make_batch()
    after = evaluate_objective(terms, initial_states(terms), batch).states
    mean = (math.exp(-1) + math.exp(4) + math.exp(-3)) / 3
    assert after[0]["log_mean"] == pytest.approx(math.log(0.9 + 0.1 * mean), abs=1e-6)
    # E+[r] = 1.25, E-[r] = 0; delta is the mean of the steps before
    assert after[1]["delta"] == pytest.approx(0.1 * 0.625, abs=1e-6)
    assert after[2] == {}
    assert evaluate_objective(terms, after, batch).states[1]["delta"] == pytest.approx(0.9 * 0.0625 + 0.0625, abs=1e-6)


def test_states_are_logged_by_objective() -> None:
    terms = [term("bco", beta=1.0), term("bco-pair", 0.5, beta=1.0)]
    metrics = state_metrics(terms, evaluate_objective(terms, initial_states(terms), make_batch(pairs=[(0, 1)])).states)
    assert metrics["state/bco/delta"] == pytest.approx(0.0625, abs=1e-6)
    assert metrics["state/bco-pair/delta"] == pytest.approx(0.1 * (2.0 - 1.0) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("terms", "scope"),
    [
        ([term("bco")], "example"),
        ([term("bco"), term("dpo")], "pair"),
        ([term("dpo"), term("kldo"), term("sft")], "batch"),
        ([term("kldo", estimator="lagged"), term("sft")], "example"),
    ],
    ids=["example", "pair", "batch", "lagged"],
)
def test_scope_of_a_mixture_is_the_widest(terms: list[Term], scope: str) -> None:
    assert widest_scope(terms) == scope


def test_coefficients_of_a_part_are_those_of_the_whole() -> None:
    terms = [term("bco"), term("dpo", 0.3), term("sft", 0.5)]
    batch = make_batch(pairs=[(0, 1), (2, 3)])
    whole = evaluate_objective(terms, initial_states(terms), batch).coefficients
    for part in ([0, 1], [2, 3], [4]):
        logps = torch.full_like(batch.logps, -77.0)
        logps[part] = batch.logps[part]
        known = known_coefficients(terms, initial_states(terms), replace(batch, logps=logps))
        torch.testing.assert_close(known[part], whole[part], rtol=1e-6, atol=1e-8)


def test_running_means_start_at_the_first_value_and_stay_where_a_class_is_absent() -> None:
    means = RunningMeans()
    assert means.update({"loss": 1.0}) == {}
    assert means.update({"divergence": 2.0}) == {"divergence/ema": 2.0}
    after = means.update({"divergence": 4.0, "reward/margin": 1.0})
    assert after == {"divergence/ema": pytest.approx(2.0 + 2.0 * EMA_RATE), "reward/margin/ema": 1.0}
    assert means.update({"loss": 0.0}) == after


def loss_of(**section: Any) -> LossConfig:
    loss: LossConfig = TypeAdapter(LossSection).validate_python(section)
    return loss


def test_estimate_is_named_with_its_ceiling() -> None:
    assert estimate_facts(loss_of(type="kldo", skew=SKEW)) == {
        "divergence/name": "KL(D+ || 0.3 D+ + 0.7 D-)",
        "divergence/ceiling": pytest.approx(math.log(1 / 0.3)),
    }
    assert estimate_facts(loss_of(type="kldo")) == {"divergence/name": "KL(D+ || D-)"}
    assert estimate_facts(loss_of(type="sft")) == {}
    rewarded = {"kind": "rewarded", "model": "another", "temperature": 1.0}
    assert estimate_facts(loss_of(type="kldo", position=rewarded)) == {}, "rewards depend on the class"


def test_metrics_of_unpaired_data() -> None:
    assert reward_metrics(make_batch(), BETA) == {
        "log_ratio/rms": pytest.approx(math.sqrt((4 + 1 + 0.25 + 16 + 9) / 5)),
        "log_ratio/max": pytest.approx(4.0),
        "reward/aligned": pytest.approx(0.25),
        "reward/unaligned": pytest.approx(0.0, abs=1e-7),
        "reward/margin": pytest.approx(0.25),
        "logp/aligned": pytest.approx((-8 - 5) / 2),
        "logp/unaligned": pytest.approx((-21 - 5 - 10) / 3),
        "reward/accuracy": pytest.approx(4 / 6),
    }


def test_largest_log_ratio_counts_whatever_its_sign() -> None:
    assert reward_metrics(make_batch([1.0, -6.0, 2.0], [True, False, True]), BETA)["log_ratio/max"] == pytest.approx(
        6.0
    )
    assert reward_metrics(make_batch([0.0] * 3, [True, False, True]), BETA)["log_ratio/max"] == 0.0


def test_accuracy_without_pairs_is_the_auc_and_does_not_change_with_a_constant() -> None:
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    ratios = torch.randn(40, generator=generator).round(decimals=1)  # with ties
    aligned = torch.rand(40, generator=generator) < 0.4
    batch = Batch(ratios, torch.zeros(40), aligned, torch.ones(40), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0))
    accuracy = reward_metrics(batch, BETA)["reward/accuracy"]
    assert accuracy == pytest.approx(roc_auc_score(aligned.numpy(), ratios.numpy()))
    shifted = replace(batch, logps=ratios + 8)
    assert reward_metrics(shifted, BETA)["reward/accuracy"] == pytest.approx(accuracy)


def gaussian_batch(count: int, seed: int) -> Batch:
    """Log-ratios of two Gaussians whose KL(D+ || D-) is 2: r of D- is N(-2, 4), that of D+ is N(2, 4)."""
    generator = torch.Generator().manual_seed(seed)
    aligned = torch.arange(count) % 2 == 0
    ratios = 2 * torch.randn(count, generator=generator) + torch.where(aligned, 2.0, -2.0)
    empty = torch.zeros(0, 2, dtype=torch.long)
    return Batch(ratios, torch.zeros(count), aligned, torch.ones(count), empty, torch.zeros(0))


def test_groups_of_held_out_examples_have_the_bias_of_a_step() -> None:
    terms = [term("kldo", beta=1.0)]
    states = initial_states(terms)
    held_out = gaussian_batch(4800, seed=0)
    steps = [
        evaluate_objective(terms, states, gaussian_batch(16, seed)).metrics["divergence"] for seed in range(1, 301)
    ]
    whole = evaluate_objective(terms, states, held_out).metrics["divergence"]
    grouped = divergence_of_groups(terms, states, held_out, 16)
    assert grouped is not None
    error = 2**0.5 * np.std(steps) / 300**0.5
    assert abs(grouped - np.mean(steps)) < 4 * error
    assert grouped > whole + 4 * error
    assert divergence_of_groups(terms, states, gaussian_batch(12, 0), 16) is None
    # pairs stay together, also where the objective takes none
    pairs = torch.arange(4800).reshape(-1, 2)
    in_pairs = divergence_of_groups(terms, states, replace(held_out, pairs=pairs), 16)
    assert in_pairs == pytest.approx(grouped, abs=4 * error)
    one_class = replace(held_out, aligned=torch.ones(4800, dtype=torch.bool))
    assert divergence_of_groups(terms, states, one_class, 16) is None
    assert divergence_of_groups([term("dpo")], [{}], replace(held_out, pairs=pairs), 16) is None
    assert divergence_of_groups([term("sft")], [{}], held_out, 16) is None


def test_accuracy_of_pairs_compares_their_rewards() -> None:
    # 2 > -1, 0.5 < 4, 2 < 4; signs would say 4/5
    metrics = reward_metrics(make_batch(pairs=[(0, 1), (2, 3), (0, 3)]), BETA)
    assert metrics["reward/accuracy"] == pytest.approx(1 / 3)
    assert metrics["reward/margin"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("label", "present", "absent"), [(True, "aligned", "unaligned"), (False, "unaligned", "aligned")]
)
def test_absent_class_leaves_its_metrics_out(label: bool, present: str, absent: str) -> None:
    metrics = evaluate_objective([KLDO], initial_states([KLDO]), make_batch([2.0, -1.0, 3.0], [label] * 3)).metrics
    assert {f"reward/{present}", f"logp/{present}", "log_ratio/rms", "log_ratio/max"} <= set(metrics)
    assert not {f"reward/{absent}", f"logp/{absent}", "reward/margin", "reward/accuracy"} & set(metrics)
    assert all(math.isfinite(number) for number in metrics.values())


def test_rewards_use_the_main_objective_beta() -> None:
    terms = [term("kldo", beta=0.5), term("bco", 1.0, beta=0.1)]
    assert evaluate_objective(terms, initial_states(terms), make_batch()).metrics["reward/aligned"] == pytest.approx(
        0.5 * 1.25
    )


def test_an_objective_declares_the_option_that_scales_its_reward() -> None:
    assert term("kldo", beta=0.5).reward_scale == 0.5
    assert {name for name, objective in OBJECTIVES.items() if objective.reward_scale is None} == {
        "log-ratio-l2",
        "orpo",
        "sft",
    }
    assert term("orpo").reward_scale == 1.0
    with pytest.raises(AssertionError, match="beta"):
        register_objective(paper="", data="paired", divergence="none")(lambda batch, state: None)  # type: ignore[arg-type]


def test_record_of_a_step_has_its_tokens_and_the_seconds_of_its_phases() -> None:
    seconds = {"data": 0.5, "score": 0.25, "push": 1.0, "optimizer": 0.25, "log": 7.0, "checkpoint": 3.0}
    timer: Any = SimpleNamespace(take_seconds=lambda: seconds, seconds_to_judge=0.75)
    record = step_record(
        StepPlan(6, 1.25, np.arange(2), np.zeros(2)),
        10,
        {"loss": 0.5, "grad_norm": 3.0},
        1e-3,
        timer,
        Utilisation(100, 12_000.0),
    )
    assert record.pop("peak_memory_bytes") > 0
    assert record.pop("mfu") == 0.25  # 6 operations for each of 100 weights and 5 tokens a second
    assert record == {
        "step": 7,
        "epoch": 1.25,
        "loss": 0.5,
        "grad_norm": 3.0,
        "lr": 1e-3,
        "tokens": 10,
        "tokens_per_second": 5.0,
        "step_seconds": 2.0,
        "data_seconds": 0.5,
        "score_seconds": 0.25,
        "judge_seconds": 0.0,
        "push_seconds": 1.0,
        "optimizer_seconds": 0.25,
        "checkpoint_seconds": 3.0,
        "skew_seconds": 0.0,
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(
    "terms", [[KLDO], MIXTURE, [term("sft")], [term("kto")]], ids=["kldo", "mixture", "sft", "kto"]
)
def test_non_finite_log_probs_are_refused(terms: list[Term], position: int, bad: float) -> None:
    log_ratios = list(LOG_RATIOS)
    log_ratios[position] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluate_objective(terms, initial_states(terms), make_batch(log_ratios))


def test_the_refusal_names_the_examples() -> None:
    with pytest.raises(FloatingPointError, match=r"log-probs of examples \[1, 4\]"):
        evaluate_objective([KLDO], initial_states([KLDO]), make_batch([2.0, math.nan, 0.5, 4.0, math.inf]))
