"""TRL 1.16 as an oracle: its loss methods on raydiv's log-probs, in fp32, with the whole step on one device."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.loss_cases import ALIGNED, BETA, MISMATCHED, PAIRS, RATIOS, REFERENCE, TOKENS, A, U, evaluate, make_batch
from raydiv.data.tokens import TokenizedExamples
from raydiv.losses import OBJECTIVES, Batch
from raydiv.losses.position import PositionWeights

Oracle = tuple[float, np.ndarray]
"""Value, and gradient by the log-probs of all examples."""

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def completions(tokens: Tensor) -> Tensor:
    """Mask [n, longest + 1] of sequences of one prompt token, then the response, then padding."""
    columns = torch.arange(int(tokens.max()) + 1)
    return ((columns >= 1) & (columns <= tokens[:, None])).long()


def outputs_of(logps: Tensor, tokens: Tensor) -> SimpleNamespace:
    """What TRL's fused head returns, every token of a response being equally likely."""
    per_token = completions(tokens)[:, 1:] * (logps / tokens)[:, None]
    return SimpleNamespace(log_probs=per_token, entropy=per_token, mean_logits=per_token, is_top1=per_token > 0)


def trainer_of(beta: float, **settings: Any) -> SimpleNamespace:
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        beta=beta,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def differentiated(batch: Batch, rows: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Oracle:
    logps = batch.logps.detach()[rows].requires_grad_()
    loss = loss_of(logps)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.item(), torch.zeros_like(batch.logps).index_add(0, rows, gradient).detach().numpy()


def halves(batch: Batch) -> Tensor:
    """Rows of a paired batch of TRL's: all chosen, then all rejected."""
    return batch.pairs.T.reshape(-1)


def trl_dpo(batch: Batch, beta: float, kind: str, **settings: Any) -> Oracle:
    from trl.trainer.dpo_trainer import DPOTrainer

    compute_loss: Any = DPOTrainer._compute_loss
    rows = halves(batch)
    completion, reference = completions(batch.tokens[rows]), batch.reference_logps[rows]
    trainer = trainer_of(
        beta,
        loss_types=[kind],
        loss_weights=[1.0],
        label_smoothing=settings.pop("label_smoothing", 0.0),
        args=SimpleNamespace(**settings),
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": reference[: len(batch.pairs)],
        "ref_rejected_logps": reference[len(batch.pairs) :],
    }

    def loss_of(logps: Tensor) -> Any:
        return compute_loss(trainer, lambda **_: outputs_of(logps, batch.tokens[rows]), inputs, False)

    return differentiated(batch, rows, loss_of)


def trl_kto(batch: Batch, beta: float, kind: str, **weights: float) -> Oracle:
    from trl.trainer.kto_trainer import KTOTrainer

    compute_loss: Any = KTOTrainer._compute_loss
    completion, mismatched = completions(batch.tokens), batch.mismatched_log_ratios
    trainer = trainer_of(
        beta,
        loss_type=kind,
        calculate_KL=kind == "kto" and len(mismatched) > 0,
        _compute_kl_logps=lambda model, inputs: mismatched,
        desirable_weight=weights.get("aligned", 1.0),
        undesirable_weight=weights.get("unaligned", 1.0),
    )
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "label": batch.aligned,
        "ref_logps": batch.reference_logps,
        "ref_KL_logps": torch.zeros_like(mismatched),
    }

    def loss_of(logps: Tensor) -> Any:
        return compute_loss(trainer, lambda **_: outputs_of(logps, batch.tokens), inputs, False)

    return differentiated(batch, torch.arange(len(batch.logps)), loss_of)


def trl_likelihood(batch: Batch, beta: float, trainer_class: Any, **settings: Any) -> Oracle:
    """CPO and ORPO compute log-probs themselves, here from logits of two tokens; all responses are the first."""
    rows, count = halves(batch), len(batch.pairs)
    tokens = batch.tokens[rows]
    completion = completions(tokens)
    labels = torch.zeros_like(completion).masked_fill(completion == 0, -100)
    attention = completion.clone()
    attention[:, 0] = 1  # the prompt's one token, which no logits predict
    inputs = {
        f"{side}_{key}": tensor[part]
        for side, part in (("chosen", slice(count)), ("rejected", slice(count, None)))
        for key, tensor in (("input_ids", completion * 0), ("labels", labels), ("attention_mask", attention))
    }
    trainer = trainer_of(beta, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **settings)
    for static in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, static, getattr(trainer_class, static))
    for method in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, method):
            setattr(trainer, method, partial(getattr(trainer_class, method), trainer))

    def loss_of(logps: Tensor) -> Any:
        per_token = logps / tokens
        logits = torch.stack([per_token, (-per_token.expm1()).log()], dim=-1)
        outputs = SimpleNamespace(logits=logits[:, None].expand(-1, completion.shape[1], -1))
        return trainer_class.get_batch_loss_metrics(trainer, lambda *_, **__: outputs, inputs)[0]

    return differentiated(batch, rows, loss_of)


def trl_cpo(batch: Batch, beta: float, kind: str, **settings: Any) -> Oracle:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    settings = {"simpo_gamma": 0.5, "label_smoothing": 0.0, "alpha": 0.0, **settings}  # alpha: AlphaPO's
    return trl_likelihood(batch, beta, CPOTrainer, loss_type=kind, **settings)


def trl_orpo(batch: Batch, beta: float, kind: str, odds_weight: float) -> Oracle:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    return trl_likelihood(batch, odds_weight, ORPOTrainer)  # its beta is no temperature


class Pairing(NamedTuple):
    ours: str
    options: Mapping[str, Any]
    oracle: Callable[..., Oracle]
    kind: str
    settings: Mapping[str, Any] = MappingProxyType({})
    mismatched: Sequence[float] = ()
    logps: bool = False
    """Scales the log-probs themselves, which must stay below 0, and not the log-ratios."""


# TRL averages over all examples, we over each class by itself
SHARES = {"lambda_aligned": A.mean(), "lambda_unaligned": U.mean()}
SMOOTHED = {"label_smoothing": 0.1}
SAME: dict[str, Pairing] = {
    # TRL's sigmoid ignores label smoothing; cDPO's oracle is below
    "dpo": Pairing("dpo", {}, trl_dpo, "sigmoid"),
    "slic": Pairing("slic", {}, trl_dpo, "hinge"),
    "ipo": Pairing("ipo", {"length_normalize": True}, trl_dpo, "ipo"),
    # TRL's smoothing defaults to 0, at which its exo_pair is infinite
    "exo": Pairing("exo", {}, trl_dpo, "exo_pair", {"label_smoothing": 1e-3}),
    "exo-smoothed": Pairing("exo", SMOOTHED, trl_dpo, "exo_pair", SMOOTHED),
    "nca": Pairing("nca", {}, trl_dpo, "nca_pair"),
    "rdpo": Pairing("rdpo", SMOOTHED, trl_dpo, "robust", SMOOTHED),
    "rdpo-unsmoothed": Pairing("rdpo", {"label_smoothing": 0.0}, trl_dpo, "robust"),
    # TRL has no delta
    "bco-pair": Pairing("bco-pair", {"delta": "fixed"}, trl_dpo, "bco_pair"),
    "sppo": Pairing("sppo", {}, trl_dpo, "sppo_hard"),
    "aot": Pairing("aot", {}, trl_dpo, "aot"),
    "aot-smoothed": Pairing("aot", SMOOTHED, trl_dpo, "aot", SMOOTHED),
    "apo-zero": Pairing("apo-zero", {}, trl_dpo, "apo_zero"),
    "apo-down": Pairing("apo-down", {}, trl_dpo, "apo_down"),
    "discopop": Pairing("discopop", {}, trl_dpo, "discopop", {"discopop_tau": 0.05}),
    "discopop-tau": Pairing("discopop", {"tau": 0.5}, trl_dpo, "discopop", {"discopop_tau": 0.5}),
    "sigmoid-norm": Pairing("sigmoid-norm", {}, trl_dpo, "sigmoid_norm"),
    "sft": Pairing("sft", {}, trl_dpo, "sft"),
    # TRL takes max(0, mean) of what it finds by rotating the device batch; here it finds our mismatched examples
    "kto": Pairing("kto", SHARES, trl_kto, "kto", mismatched=MISMATCHED),
    "kto-clamped": Pairing("kto", SHARES, trl_kto, "kto", mismatched=[-0.8, 0.3]),
    "kto-alone": Pairing("kto", SHARES, trl_kto, "kto"),
    "kto-lambdas": Pairing(
        "kto",
        {"lambda_aligned": 1.5 * A.mean(), "lambda_unaligned": 0.4 * U.mean()},
        trl_kto,
        "kto",
        {"aligned": 1.5, "unaligned": 0.4},
        MISMATCHED,
    ),
    # the other way round, for an objective without class weights
    "apo-zero-unpaired": Pairing(
        "apo-zero-unpaired",
        {},
        trl_kto,
        "apo_zero_unpaired",
        {"aligned": 1 / A.mean(), "unaligned": 1 / U.mean()},
    ),
    "cpo": Pairing("cpo", {}, trl_cpo, "sigmoid", {"cpo_alpha": 1.0}, logps=True),
    "cpo-alpha": Pairing("cpo", {"cpo_alpha": 0.3}, trl_cpo, "sigmoid", {"cpo_alpha": 0.3}, logps=True),
    "cpo-alone": Pairing("cpo", {"cpo_alpha": 0.0}, trl_cpo, "sigmoid", {"cpo_alpha": 0.0}, logps=True),
    # TRL's simpo adds CPO's NLL unless told not to
    "simpo": Pairing("simpo", {}, trl_cpo, "simpo", {"cpo_alpha": 0.0}, logps=True),
    "simpo-gamma": Pairing(
        "simpo", {"gamma": 1.2}, trl_cpo, "simpo", {"cpo_alpha": 0.0, "simpo_gamma": 1.2}, logps=True
    ),
    # TRL's NLL is of the prompt too, ours of the response; after a prompt of one token they are the same
    "orpo": Pairing("orpo", {}, trl_orpo, "", {"odds_weight": 0.1}, logps=True),
    "orpo-weight": Pairing("orpo", {"odds_weight": 0.7}, trl_orpo, "", {"odds_weight": 0.7}, logps=True),
}


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("key", SAME)
def test_agrees_with_trl(key: str, scale: float) -> None:
    ours, options, oracle, kind, settings, mismatched, logps = SAME[key]
    ratios = (scale + 0.1) * (REFERENCE + RATIOS) - REFERENCE if logps else scale * RATIOS
    batch = make_batch(
        ratios, ALIGNED, PAIRS, reference=REFERENCE, tokens=TOKENS, mismatched=mismatched, dtype=torch.float32
    )
    beta: dict[str, Any] = {"beta": BETA} if "beta" in OBJECTIVES[ours].parameters else {}
    loss, gradient = oracle(batch, BETA, kind, **settings)
    value, our_gradient = evaluate(ours, batch, **beta, **options)
    assert value.loss.item() == pytest.approx(loss, abs=1e-5, rel=1e-5)
    np.testing.assert_allclose(our_gradient, gradient, atol=1e-5, rtol=1e-5)
    assert np.abs(gradient).sum() > 1e-3


# TRL pairs what it sorts, and so needs classes of equal size
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
def test_aot_unpaired_agrees_with_trl(scale: float, smoothing: float) -> None:
    rows = np.array(PAIRS).ravel()
    batch = make_batch(
        scale * RATIOS[rows],
        A[rows].tolist(),
        [(0, 1), (2, 3), (4, 5)],
        reference=REFERENCE[rows],
        tokens=TOKENS[rows],
        dtype=torch.float32,
    )
    loss, gradient = trl_dpo(batch, BETA, "aot_unpaired", label_smoothing=smoothing)
    value, our_gradient = evaluate("aot-unpaired", batch, beta=BETA, label_smoothing=smoothing)
    assert value.loss.item() == pytest.approx(loss, abs=1e-5)
    if scale:  # equal log-ratios have no order
        np.testing.assert_allclose(our_gradient, gradient, atol=1e-5)


# sorting changes nothing where there is one pair
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_smoothed_dpo_agrees_with_trl(kind: str, pair: tuple[int, int]) -> None:
    batch = make_batch(RATIOS, ALIGNED, [pair], reference=REFERENCE, tokens=TOKENS, dtype=torch.float32)
    loss, gradient = trl_dpo(batch, BETA, kind, label_smoothing=0.2)
    value, our_gradient = evaluate("dpo", batch, beta=BETA, label_smoothing=0.2)
    assert value.loss.item() == pytest.approx(loss, abs=1e-5)
    np.testing.assert_allclose(our_gradient, gradient, atol=1e-5)


def test_discopop_is_finite_where_trl_is_not() -> None:
    batch = make_batch([-60.0, 40.0], [True, False], [(0, 1)], dtype=torch.float32)
    loss, gradient = trl_dpo(batch, 1.0, "discopop", discopop_tau=0.05)
    assert math.isnan(loss)
    assert np.isnan(gradient).any()
    value, our_gradient = evaluate("discopop", batch, beta=1.0)
    assert value.loss.item() == pytest.approx(100)
    np.testing.assert_allclose(our_gradient, [-1, 1], atol=1e-6)


def test_every_loss_that_both_have_is_compared() -> None:
    ours_alone = {"kldo", "fdo", "bco", "npo", "log-ratio-l2"}
    compared = {pairing.ours for pairing in SAME.values()} | {"aot-unpaired"}
    assert compared == set(OBJECTIVES) - ours_alone


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_position_by_common_length_agrees_with_ld_dpo(alpha: float) -> None:
    """Loss and gradient by every token's log-prob."""
    from trl.trainer.dpo_trainer import DPOTrainer

    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 2, 4, 3, 5, 6])  # all chosen, then all rejected
    mask = completions(lengths)
    logps, reference = (-3 * torch.rand(mask[:, 1:].shape, generator=generator) * mask[:, 1:] for _ in range(2))
    pairs = [(n, n + 3) for n in range(3)]

    ids = [([1], list(range(length))) for length in lengths.tolist()]
    examples = TokenizedExamples.from_ids(ids, [True] * 3 + [False] * 3, [0, 1, 2] * 2)
    weights = examples.weights(PositionWeights(late_weight=alpha), range(6))
    assert weights is not None
    by_token = logps.clone().requires_grad_()

    def sums(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([(torch.from_numpy(w) * v[: len(w)]).sum() for w, v in zip(weights, values, strict=True)])

    log_ratios = sums(by_token) - sums(reference)
    batch = make_batch(log_ratios, [True] * 3 + [False] * 3, pairs, tokens=lengths.tolist(), dtype=torch.float32)
    loss = OBJECTIVES["dpo"].function(batch, {}, beta=0.3, label_smoothing=0.0).loss
    (gradient,) = torch.autograd.grad(loss, by_token)

    theirs = logps.clone().requires_grad_()
    trainer = trainer_of(
        0.3,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        label_smoothing=0.0,
        args=SimpleNamespace(),
        f_divergence_type="reverse_kl",
        ld_alpha=alpha,
        use_weighting=False,
    )
    compute_loss: Any = DPOTrainer._compute_loss
    outputs = SimpleNamespace(log_probs=theirs * mask[:, 1:], entropy=theirs, mean_logits=theirs, is_top1=theirs > 0)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": sums(reference)[:3],
        "ref_rejected_logps": sums(reference)[3:],
    }
    expected = compute_loss(trainer, lambda **_: outputs, inputs, False)
    (expected_gradient,) = torch.autograd.grad(expected, theirs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
