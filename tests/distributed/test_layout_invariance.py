"""Invariant 1: the update does not depend on the layout, for every objective, through real ZeRO on gloo.

The oracle is a plain PyTorch step: all logits, one autograd graph, no micro-batches, no ranks, no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from helpers.ranks import run_on_ranks
from helpers.step_cases import LR, Case, on_this_rank, step_examples, with_reference_tokens, with_token_weights
from raydiv.config.loss import TYPES
from raydiv.data.batching import MicroBatch, micro_batches
from raydiv.data.tokens import TokenizedExamples
from raydiv.losses import OBJECTIVES, Batch, State, Term
from raydiv.model.collate import collate
from raydiv.model.head import LogProbHead
from raydiv.model.packing import Packing
from raydiv.training.coefficients import evaluate_objective
from raydiv.training.step import RankStep, Stepper

LAYOUTS = {"one micro-batch a rank": 100_000, "uneven micro-batches": 70, "one example each": 1}


def running_states(terms: Sequence[Term]) -> list[State]:
    """States that have moved."""
    return [dict.fromkeys(term.objective.state, 0.4) for term in terms]


def build(model: str, case: Case) -> Any:
    """The real engine with plain SGD; runs on every rank."""
    import raydiv.training.engine as module
    from raydiv.model.load import build_policy

    # a model this small would otherwise never be partitioned between its uses
    module.PERSISTENT_ELEMENTS = case.persistent
    plain = module.deepspeed_config
    module.deepspeed_config = lambda recipe: (
        plain(recipe)
        | {  # AdamW divides near-zero gradients by themselves
            "optimizer": {"type": "SGD", "params": {"lr": LR}},
            "zero_allow_untested_optimizer": True,
        }
    )
    recipe = case.recipe(Path(model))
    try:
        torch.manual_seed(0)
        return module.DeepSpeedEngine(recipe, lambda: build_policy(Path(model), recipe.model, torch.float32))
    finally:
        module.deepspeed_config = plain


def stepper_of(engine: Any, head: LogProbHead, model: str, case: Case) -> Stepper:
    loss = case.recipe(Path(model)).loss
    return Stepper(
        engine, head, loss.terms, case.tokens, case.packing, loss.position.rule, states=running_states(loss.terms)
    )


def trained_weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in engine.weights(trainable_only=True)}


def restore_weights(engine: Any, weights: dict[str, torch.Tensor]) -> None:
    """Undo a step: building an engine anew takes longer than the step."""
    from deepspeed import zero

    for name, parameter in engine.model.named_parameters():
        if name in weights:
            with zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if parameter.numel():  # whole on rank 0 alone
                    parameter.copy_(weights[name])
    engine._deepspeed.optimizer.refresh_fp32_params()


def step_of(case: Case, with_mismatched: bool) -> RankStep:
    step = step_examples(case.examples, with_mismatched)
    of_kind = {"constrained": with_reference_tokens, "rewarded": with_token_weights}.get(case.position["kind"])
    return of_kind(step) if of_kind else step


def steps(model: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Each case's step from the same weights; runs on every rank."""
    results = []
    for _, group in groupby(cases, key=lambda case: (case.zero_stage, case.lora, case.persistent, case.engine)):
        engine: Any = None
        for case in group:
            if engine is None:
                engine = build(model, case)
                head, first = LogProbHead(engine.model), trained_weights(engine)
            stepper = stepper_of(engine, head, model, case)
            step = step_of(case, any(term.objective.needs_mismatched for term in stepper.terms))
            metrics = stepper.step(on_this_rank(step, stepper.layout), LR)
            weights = {
                name.removeprefix("base_model.model."): weight.numpy()
                for name, weight in trained_weights(engine).items()
            }
            results.append(
                {"metrics": metrics, "weights": weights, "forwards": stepper.forwards, "states": stepper.states}
                | {"secondary": [weight.ds_secondary_tensor is not None for weight in partitioned(engine)]}
            )
            if case.zero_stage == 3 and not case.engine:
                restore_weights(engine, first)
            else:
                engine.close()
                engine = None
        if engine is not None:
            engine.close()
    return results


def partitioned(engine: Any) -> list[Any]:
    """Weights that ZeRO 3 partitions, persistent ones apart: those are gathered once."""
    weights = engine.model.parameters()
    return [weight for weight in weights if hasattr(weight, "ds_secondary_tensor") and not weight.ds_persist]


def position_weight(position: dict[str, Any], token: int, shorter: int) -> float:
    """What a response's token counts, from 1; ``shorter``: the tokens of its pair's shorter response."""
    if position["kind"] == "decay":
        return float(position["rate"] ** (token - 1))
    if position["kind"] == "common-length":
        return float(position["weight"]) if token > shorter else 1.0
    return float(position["weight"]) if position["kind"] == "first" and token <= position["tokens"] else 1.0


@dataclass(frozen=True)
class PlainStep:
    """The oracle's result: the objective, the gradient's norm, and each trained weight before and after."""

    loss: float
    grad_norm: float
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


def plain_step(model_directory: Path, case: Case) -> PlainStep:
    """The oracle: one forward with whole logits, autograd through the objective, one SGD update."""
    from raydiv.model.load import build_policy

    recipe = case.recipe(model_directory)
    rank_step = step_of(case, bool(recipe.loss.mismatched_terms))
    torch.manual_seed(0)
    model = build_policy(model_directory, recipe.model, torch.float32)

    def weights(examples: TokenizedExamples) -> list[torch.Tensor]:
        if case.position["kind"] == "rewarded":
            return [torch.from_numpy(values) for values in examples.token_values]
        lengths, shortest = examples.response_lengths.tolist(), dict[int, int]()
        for pair, length in zip(examples.pair.tolist(), lengths, strict=True):
            shortest[pair] = min(length, shortest.get(pair, length))
        return [
            torch.tensor(
                [
                    position_weight(case.position, token, shortest[pair] if pair >= 0 else length)
                    for token in range(1, length + 1)
                ]
            )
            for pair, length in zip(examples.pair.tolist(), lengths, strict=True)
        ]

    def logps(examples: TokenizedExamples) -> torch.Tensor:
        if not len(examples):
            return torch.zeros(0)
        inputs = collate([examples[row] for row in range(len(examples))])
        logits = model(**inputs.forward_kwargs()).logits
        tokens = logits.log_softmax(-1)[inputs.rows, inputs.columns, inputs.targets]
        # in fp32 and in turn: the rounding of sums is most of the error where the classes' gradients nearly cancel
        return torch.zeros(len(examples)).index_add(0, inputs.examples, terms(examples, tokens))

    def terms(examples: TokenizedExamples, tokens: torch.Tensor) -> torch.Tensor:
        if case.position["kind"] != "constrained":
            return torch.cat(weights(examples)) * tokens
        listed = case.position["betas"]
        betas = [listed[min(t, len(listed) - 1)] for n in examples.response_lengths.tolist() for t in range(n)]
        beta, reference = torch.tensor(betas), torch.from_numpy(np.concatenate(examples.token_values))
        return reference + 2 / beta * (2 * (beta * (tokens - reference)).sigmoid()).log()

    batch = Batch(
        logps(rank_step.examples),
        rank_step.reference_logps,
        torch.from_numpy(rank_step.examples.aligned),
        torch.stack([weight.sum() for weight in weights(rank_step.examples)]),
        torch.from_numpy(rank_step.examples.pairs),
        logps(rank_step.mismatched).detach() - rank_step.mismatched_reference_logps,
    )
    values = [
        term.weight * term.objective.function(batch, state, **term.options).loss
        for term, state in zip(recipe.loss.terms, running_states(recipe.loss.terms), strict=True)
    ]
    loss = sum(values)
    loss.backward()
    trained = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    grads = {name: parameter.grad.numpy().copy() for name, parameter in trained.items()}
    before = {name: parameter.detach().numpy().copy() for name, parameter in trained.items()}
    after = {name: before[name] - np.float32(LR) * grads[name] for name in trained}
    return PlainStep(float(loss.detach()), norm(grads), before, after)


def norm(tensors: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((tensor.astype(np.float64) ** 2).sum() for tensor in tensors.values())))


ROUNDING = 1e-6


def assert_equal(case: Case, result: dict[str, Any], expected: PlainStep) -> None:
    assert result["metrics"]["loss"] == pytest.approx(expected.loss, rel=ROUNDING, abs=ROUNDING), case
    assert result["metrics"]["grad_norm"] == pytest.approx(expected.grad_norm, rel=2 * ROUNDING, abs=1e-8), case
    weights = result["weights"]
    assert weights.keys() == expected.after.keys()
    for name, weight in expected.after.items():
        size = np.abs(weight).max() + np.abs(expected.before[name]).max()  # both were rounded
        # one element alone: up to 1.4e-6 with the matrix kernels of one Intel CPU, 1.0e-6 with those of the others
        assert np.abs(weights[name] - weight).max() <= 2 * ROUNDING * size, (case, name)
    # the update, which is the gradient: its own rounding, and that of the weights that it was subtracted from
    error = norm({name: weights[name] - weight for name, weight in expected.after.items()})
    moved = norm({name: weight - expected.before[name] for name, weight in expected.after.items()})
    assert error <= ROUNDING * moved + 1e-9 * norm(expected.before), case
    # without a single pair, or without an unaligned example, there is nothing for these to learn from
    objective = OBJECTIVES[case.loss["type"]]
    nothing = case.examples in ("aligned only", "one") and (objective.data == "paired" or not objective.needs_aligned)
    assert moved > 0 or nothing, case


MIXTURE: dict[str, Any] = {"type": "kldo", "skew": 0.5, "mix": {"sft": {"weight": 0.5}}}
OBJECTIVE_CASES: list[dict[str, Any]] = [
    *({"type": name} for name in TYPES),
    *({"type": "kldo", "skew": 0.5, "estimator": estimator} for estimator in ("ema", "lagged")),
    {"type": "bco", "delta": "batch"},
    {"type": "fdo", "divergence": "kl"},
    MIXTURE,
    {"type": "dpo", "mix": {"sft": {"weight": 0.2}, "log-ratio-l2": {"weight": 0.001}}},
]


DECAY: dict[str, Any] = {"kind": "decay", "rate": 0.8}
CONSTRAINED: dict[str, Any] = {"kind": "constrained", "betas": [0.5, 0.2, 0.05]}
FIRST: dict[str, Any] = {"kind": "first", "tokens": 3, "weight": 0.25}
REWARDED: dict[str, Any] = {"kind": "rewarded", "model": "another", "temperature": 1.0}
LAYOUTS_OF_WEIGHTED: list[tuple[int, Packing]] = [(100_000, "none"), (30, "none"), (30, "mask")]
WEIGHTED_CASES = [
    # a stream by examples, one by pairs, a whole step, mismatched examples, and means over tokens
    *(
        Case({"type": name}, tokens, examples="even pairs", packing=packing, position=position)
        for name, position in [
            ("sft", FIRST),
            ("dpo", DECAY),
            ("kldo", FIRST),
            ("kto", DECAY),
            ("simpo", FIRST),
            ("npo", DECAY),
        ]
        for tokens, packing in LAYOUTS_OF_WEIGHTED
    ),
    *(
        Case({"type": name}, tokens, packing=packing, position={"kind": "common-length", "weight": 0.5})
        for name in ("dpo", "sigmoid-norm", "kldo", "kto")
        for tokens, packing in LAYOUTS_OF_WEIGHTED
    ),
    Case(MIXTURE, 70, lora=True, position=DECAY),
    *(
        Case({"type": name}, tokens, examples="even pairs", packing=packing, position=CONSTRAINED)
        for name in ("sft", "dpo", "kldo", "kto", "simpo")
        for tokens, packing in LAYOUTS_OF_WEIGHTED
    ),
    *(
        Case(loss, tokens, examples="even pairs", packing=packing, position=REWARDED)
        for loss in ({"type": "dpo"}, {"type": "kto"}, {"type": "npo", "mix": {"sft": {"weight": 1}}})
        for tokens, packing in LAYOUTS_OF_WEIGHTED
    ),
]


CHECKPOINTED = {"activation_checkpointing": True}


def cases_in_every_layout() -> list[Case]:
    """Every objective in every layout."""
    padded = [Case(loss, tokens) for loss in OBJECTIVE_CASES for tokens in LAYOUTS.values()]
    return padded + [Case(loss, tokens, packing="mask") for loss in OBJECTIVE_CASES for tokens in (100_000, 70)]


def corner_cases() -> list[Case]:
    """Stages, adapters, and steps that lack a class or almost everything; once each."""
    return [
        *(Case(loss, 70, examples="aligned only") for loss in OBJECTIVE_CASES),
        *(
            Case({"type": name}, 70, examples="unaligned only")
            for name in ("kldo", "bco", "kto", "fdo", "aot-unpaired")
        ),
        *(Case(MIXTURE, 70, zero_stage=stage) for stage in (0, 1, 2)),
        *(Case(MIXTURE, tokens, lora=True) for tokens in (70, 100_000)),
        *(Case(loss, 30, examples="even pairs") for loss in OBJECTIVE_CASES),
        Case(MIXTURE, 70, persistent=1_000_000),
        Case({"type": "kldo"}, 70, examples="one"),
        *(
            Case(MIXTURE, 70, zero_stage=stage, packing="mask", engine=options)
            for stage, options in [
                (0, CHECKPOINTED),
                (3, CHECKPOINTED),
                (1, {"offload_optimizer": "cpu"}),
                (2, {"offload_optimizer": "cpu"}),
                (3, {"offload_optimizer": "cpu", "offload_parameters": "cpu", **CHECKPOINTED}),
                (2, {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}}}),
            ]
        ),
        Case(MIXTURE, 70, zero_stage=2, lora=True, packing="mask", engine=CHECKPOINTED),
        *WEIGHTED_CASES,
    ]


def test_a_rank_without_unaligned_examples_and_an_empty_micro_batch_are_among_the_cases() -> None:
    rank_step = step_examples("pairs").examples
    by_rank = micro_batches(rank_step.lengths, LAYOUTS["one micro-batch a rank"], ranks=2)
    assert any(all(rank_step.aligned[i] for batch in batches for i in batch) for batches in by_rank)
    sizes = {
        len(batch)
        for batches in micro_batches(rank_step.lengths, LAYOUTS["uneven micro-batches"], ranks=2)
        for batch in batches
    }
    assert len(sizes) > 1
    assert [[0]] in micro_batches(step_examples("one").examples.lengths, 70, ranks=2)
    assert [[]] in micro_batches(step_examples("one").examples.lengths, 70, ranks=2)


def test_mismatched_examples_shift_kto() -> None:
    rank_step = step_examples("pairs", with_mismatched=True)
    assert len(rank_step.mismatched) == len(rank_step.examples)
    # a random model gives about log 300 = 5.7 nats a token
    logps = -5.7 * torch.from_numpy(rank_step.mismatched.response_lengths)
    assert float((logps - rank_step.mismatched_reference_logps).mean()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_update_equals_the_plain_step_in_every_layout(ranks: int, tiny_model: Path, tmp_path: Path) -> None:
    cases = cases_in_every_layout() + (corner_cases() if ranks == 2 else [])
    by_rank = run_on_ranks(steps, ranks, tmp_path / "ranks", str(tiny_model), cases)
    plain: dict[str, PlainStep] = {}
    for number, case in enumerate(cases):
        key = repr((case.loss, case.examples, case.lora, case.position))
        plain[key] = plain.get(key) or plain_step(tiny_model, case)
        for results in by_rank:
            assert_equal(case, results[number], plain[key])
            assert results[number]["states"] == by_rank[0][number]["states"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
def test_update_equals_the_plain_step_with_partitions_inside_nodes(
    lora: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """ZeRO++'s secondary partitions: four ranks in two groups gather weights inside their own."""
    hpz = {"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}}}
    case = Case(MIXTURE, 70, lora=lora, engine=hpz)
    plain = plain_step(tiny_model, case)
    # its groups of processes can be made once in a process
    for (result,) in run_on_ranks(steps, 4, tmp_path / "ranks", str(tiny_model), [case]):
        assert_equal(case, result, plain)
        assert result["secondary"]
        assert all(result["secondary"]), "weights without a partition inside the node"


def first_rank_batches(kind: str, tokens: int, ranks: int, in_pairs: bool = False) -> list[MicroBatch]:
    """Micro-batches of rank 0."""
    examples = step_examples(kind).examples
    return micro_batches(examples.lengths, tokens, ranks, examples.units if in_pairs else None)[0]


@pytest.mark.slow
def test_a_second_forward_is_paid_only_where_it_must(tiny_model: Path, tmp_path: Path) -> None:
    """One pass: a single micro-batch, separable objectives, and pairs kept together unless that pads too much."""
    few, many = LAYOUTS["one micro-batch a rank"], LAYOUTS["uneven micro-batches"]
    tight = 30
    free, paired = first_rank_batches("even pairs", tight, 2), first_rank_batches("even pairs", tight, 2, in_pairs=True)
    assert len(free) > 1
    assert len(paired) > 1
    expected: list[tuple[dict[str, Any], str, int, int]] = [
        ({"type": "kldo"}, "pairs", few, 1),
        ({"type": "aot"}, "pairs", few, 1),
        ({"type": "kldo"}, "pairs", many, 2 * len(first_rank_batches("pairs", many, 2))),
        ({"type": "kldo", "estimator": "lagged"}, "pairs", many, len(first_rank_batches("pairs", many, 2))),
        ({"type": "bco"}, "pairs", many, len(first_rank_batches("pairs", many, 2))),
        ({"type": "bco", "delta": "batch"}, "pairs", many, 2 * len(first_rank_batches("pairs", many, 2))),
        ({"type": "sft"}, "pairs", many, len(first_rank_batches("pairs", many, 2))),
        ({"type": "fdo"}, "pairs", many, len(first_rank_batches("pairs", many, 2))),
        # the mismatched examples are scored besides, without gradient
        ({"type": "kto"}, "pairs", few, 2),
        ({"type": "dpo"}, "even pairs", tight, len(paired)),
        ({"type": "dpo", "mix": {"sft": {"weight": 1}}}, "even pairs", tight, len(paired)),
        ({"type": "dpo", "mix": {"kldo": {"weight": 1}}}, "even pairs", tight, 2 * len(free)),
        ({"type": "aot"}, "even pairs", tight, 2 * len(free)),
        # a long and a short response in one micro-batch would cost more padding than the second forward
        ({"type": "dpo"}, "pairs", 1, 2 * len(first_rank_batches("pairs", 1, 2))),
    ]
    cases = [Case(loss, tokens, examples=kind) for loss, kind, tokens, _ in expected]
    for results in run_on_ranks(steps, 2, tmp_path / "ranks", str(tiny_model), cases):
        for result, (loss, kind, tokens, forwards) in zip(results, expected, strict=True):
            assert result["forwards"] == forwards, (loss, kind, tokens)


def masked_step(model: str, case: Case) -> list[tuple[float, float]]:
    """For each micro-batch: sum_i c_i logp_i from score's log-probs, and as push computed it from its own forward."""
    engine = build(model, case)
    stepper = stepper_of(engine, LogProbHead(engine.model), model, case)
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            if "lora_B" in name:  # at their initial zeros no mask of an adapter shows
                parameter.normal_(std=0.5)
    forward, scored, pushed = Stepper._forward, [], []

    def recorded(
        self: Stepper, step: int, micro_batch: MicroBatch, inputs: Any, weigh: Any = None, runs: Any = ()
    ) -> torch.Tensor:
        output = forward(self, step, micro_batch, inputs, weigh, runs)
        if weigh is None:
            scored.append(output.detach())
        else:
            pushed.append((weigh(slice(0, len(inputs.targets)), torch.zeros(len(inputs.targets))), output.detach()))
        return output

    with patch.object(Stepper, "_forward", recorded):
        stepper.step(on_this_rank(step_examples("pairs"), stepper.layout), LR)
    same = [(float((c * logps).sum()), float(out)) for logps, (c, out) in zip(scored, pushed, strict=True)]
    engine.close()
    return same


@pytest.mark.slow
def test_score_and_push_see_the_same_dropout_masks(tiny_model: Path, tmp_path: Path) -> None:
    case = Case({"type": "kldo", "skew": 0.5}, 70, zero_stage=2, lora=True, dropout=0.4)
    for sums in run_on_ranks(masked_step, 2, tmp_path / "ranks", str(tiny_model), case):
        assert len(sums) > 1
        for scored, pushed in sums:
            assert pushed == pytest.approx(scored, rel=1e-5)


def released_parameters(model: str, case: Case) -> list[tuple[set[int], set[int]]]:
    """Parameters released after each module of a third step, which DeepSpeed knows: with and without the limit."""
    from raydiv.utils.compat import RELEASE_LOOK_AHEAD

    engine = build(model, case)
    stepper = stepper_of(engine, LogProbHead(engine.model), model, case)
    coordinator, released = engine._deepspeed.optimizer.parameter_offload.param_coordinator, []
    limited, unlimited = getattr(coordinator, RELEASE_LOOK_AHEAD), getattr(type(coordinator), RELEASE_LOOK_AHEAD)

    def both(module: Any, step_id: int) -> set[int]:
        parameters: set[int] = limited(module, step_id)
        released.append((set(parameters), set(unlimited(coordinator, module, step_id))))
        return parameters

    for number in range(3):
        if number == 2:
            setattr(coordinator, RELEASE_LOOK_AHEAD, both)
        stepper.step(on_this_rank(step_examples("pairs"), stepper.layout), 1e-3)
    engine.close()
    return released


@pytest.mark.slow
def test_the_limited_look_ahead_releases_what_deepspeed_would_release(tiny_model: Path, tmp_path: Path) -> None:
    """Some matrices stay whole, and most of the modules of adapters have nothing to release."""
    case = Case({"type": "kldo"}, 100_000, lora=True, persistent=1500, engine={"deepspeed": {"zero_optimization": {
        "stage3_max_reuse_distance": 10_000,
    }}})  # fmt: skip
    for released in run_on_ranks(released_parameters, 2, tmp_path / "ranks", str(tiny_model), case):
        assert released
        assert all(limited == unlimited for limited, unlimited in released)
        assert any(limited for limited, _ in released)
        assert not all(limited for limited, _ in released)


def refusal_messages(model: str, cases: list[Case]) -> list[str]:
    """The error of a rank in each case when one example's log-ratio is not finite; its weights must stay."""
    messages = []
    for case in cases:
        engine = build(model, case)
        stepper = stepper_of(engine, LogProbHead(engine.model), model, case)
        rank_step = on_this_rank(step_examples(case.examples), stepper.layout)
        assert rank_step.reference_logps is not None
        rank_step.reference_logps[0] = torch.nan
        before = trained_weights(engine)
        with pytest.raises(FloatingPointError, match="not finite") as caught:
            stepper.step(rank_step, LR)
        assert all(torch.equal(before[name], weight) for name, weight in trained_weights(engine).items())
        engine.close()
        messages.append(str(caught.value))
    return messages


@pytest.mark.slow
def test_step_that_is_not_finite_is_refused_on_every_rank(tiny_model: Path, tmp_path: Path) -> None:
    single, many = LAYOUTS["one micro-batch a rank"], LAYOUTS["uneven micro-batches"]
    lagged = {"type": "kldo", "estimator": "lagged"}
    cases = [
        Case({"type": "kldo"}, single),
        Case({"type": "kldo"}, many),
        Case(lagged, many),
    ]  # graph kept, two passes, streamed
    first, second = run_on_ranks(refusal_messages, 2, tmp_path / "ranks", str(tiny_model), cases)
    assert first == second


@pytest.mark.parametrize("name", OBJECTIVES)
def test_order_of_examples_inside_the_step_does_not_matter(name: str) -> None:
    rank_step = step_examples("pairs")
    generator = np.random.default_rng(0)
    order = generator.permutation(len(rank_step.examples))
    logps = rank_step.reference_logps + torch.tensor(generator.normal(0, 10, len(order)), dtype=torch.float32)
    terms = [Term(OBJECTIVES[name], 1.0, OBJECTIVES[name].defaults)]

    def evaluate(rows: np.ndarray) -> Any:
        examples = TokenizedExamples.from_ids(
            [rank_step.examples[row] for row in rows],
            rank_step.examples.aligned[rows].tolist(),
            rank_step.examples.pair[rows].tolist(),
        )
        batch = Batch(
            logps[rows],
            rank_step.reference_logps[rows],
            torch.from_numpy(examples.aligned),
            torch.from_numpy(examples.response_lengths),
            torch.from_numpy(examples.pairs),
            torch.ones(3),
        )
        return evaluate_objective(terms, running_states(terms), batch)

    straight, shuffled = evaluate(np.arange(len(order))), evaluate(order)
    assert shuffled.loss == pytest.approx(straight.loss, rel=1e-6)
    largest = float(straight.coefficients.abs().max())
    torch.testing.assert_close(shuffled.coefficients, straight.coefficients[order], rtol=1e-5, atol=1e-6 * largest)
