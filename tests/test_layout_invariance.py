"""Invariant 1: the update does not depend on the layout, for every objective, through real ZeRO on gloo.

The oracle is a plain PyTorch step: all logits, one autograd graph, no micro-batches, no ranks, no DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_on_ranks

from raydiv.config import Recipe, load_recipe
from raydiv.data.plan import micro_batches
from raydiv.data.tokens import TokenizedExamples, mismatched
from raydiv.losses import OBJECTIVES, Batch
from raydiv.model.collate import collate
from raydiv.training.coefficients import first_states, judge
from raydiv.training.step import StepExamples, Stepper

LR = 0.5
MAX_LENGTH = 64
LAYOUTS = {"one micro-batch a rank": 100_000, "uneven micro-batches": 70, "one example each": 1}


@dataclass(frozen=True)
class Case:
    """One step: an objective, where its examples land, and which of them there are."""

    loss: dict[str, Any]
    tokens: int
    zero_stage: int = 3
    examples: str = "pairs"
    lora: bool = False
    persistent: int = 0

    def recipe(self, model: Path) -> Recipe:
        return load_recipe(
            {
                "model": {"id": str(model), **({"lora": {"r": 4, "dropout": 0.0}} if self.lora else {})},
                "loss": self.loss,
                "optim": {"steps": 1, "lr": LR, "clip": None},
                "batch": {"tokens_per_microbatch": self.tokens},
                "engine": {"zero_stage": self.zero_stage},
            }
        )


def step_examples(kind: str, with_mismatched: bool = False) -> StepExamples:
    """Aligned responses long and unaligned ones short, so that sorting by length leaves ranks with one class."""
    generator = np.random.default_rng(7)

    def ids(length: int) -> list[int]:
        return [int(token) for token in generator.integers(6, 300, length)]

    prompts = [ids(n) for n in (3, 9, 5, 7, 4)]
    pairs = [(prompt, ids(18 + 3 * n), ids(2 + n)) for n, prompt in enumerate(prompts)]
    rows = [
        (prompt, response, good, n)
        for n, (prompt, *both) in enumerate(pairs)
        for response, good in zip(both, (True, False), strict=True)
    ]
    if kind == "aligned only":
        rows = [row for row in rows if row[2]]
    if kind == "one":
        rows = rows[:1]
    examples = TokenizedExamples.from_ids(
        [(p, r) for p, r, _, _ in rows], [g for _, _, g, _ in rows], [n for *_, n in rows]
    )
    others = mismatched(examples, MAX_LENGTH) if with_mismatched else examples.select([])
    noise = lambda n: torch.tensor(generator.normal(-60, 20, n), dtype=torch.float32)  # noqa: E731
    return StepExamples(0, examples, others, noise(len(examples)), noise(len(others)))


def one_step(model: str, case: Case) -> dict[str, Any]:
    """The step through the real engine; runs on every rank."""
    import raydiv.engine as module
    from raydiv.model.head import LogProbHead
    from raydiv.model.load import build_policy

    # a model this small would otherwise never be partitioned between its uses
    module.PERSISTENT_ELEMENTS = case.persistent
    plain = module._deepspeed_config
    module._deepspeed_config = lambda recipe: (
        plain(recipe)
        | {  # AdamW divides near-zero gradients by themselves
            "optimizer": {"type": "SGD", "params": {"lr": LR}},
            "zero_allow_untested_optimizer": True,
        }
    )
    recipe = case.recipe(Path(model))
    chosen = step_examples(case.examples, recipe.loss.needs_mismatched)
    try:
        torch.manual_seed(0)
        engine = module.Engine(recipe, lambda: build_policy(Path(model), recipe.model, torch.float32))
    finally:
        module._deepspeed_config = plain
    stepper = Stepper(engine, LogProbHead(engine.model), recipe.loss.terms, case.tokens)
    metrics = stepper.step(chosen, LR)
    weights = {name.removeprefix("base_model.model."): weight.numpy() for name, weight in engine.weights(case.lora)}
    engine.close()
    return {"metrics": metrics, "weights": weights, "forwards": stepper.forwards}


def steps(model: str, cases: list[Case]) -> list[dict[str, Any]]:
    return [one_step(model, case) for case in cases]


def plain_step(model_directory: Path, case: Case) -> tuple[float, dict[str, np.ndarray]]:
    """The oracle: one forward with whole logits, autograd through the objective, one SGD update."""
    from raydiv.model.load import build_policy

    recipe = case.recipe(model_directory)
    chosen = step_examples(case.examples, recipe.loss.needs_mismatched)
    torch.manual_seed(0)
    model = build_policy(model_directory, recipe.model, torch.float32)

    def logps(examples: TokenizedExamples) -> torch.Tensor:
        if not len(examples):
            return torch.zeros(0)
        inputs = collate([examples[row] for row in range(len(examples))])
        logits = model(input_ids=inputs.ids, attention_mask=inputs.mask).logits
        tokens = logits.log_softmax(-1)[inputs.rows, inputs.columns, inputs.targets]
        return inputs.per_example(tokens, len(examples))

    batch = Batch(
        logps(chosen.examples),
        chosen.reference_logps,
        torch.from_numpy(chosen.examples.aligned),
        torch.from_numpy(chosen.examples.response_lengths),
        torch.from_numpy(chosen.examples.pairs),
        logps(chosen.mismatched).detach() - chosen.mismatched_reference_logps,
    )
    values = [
        weight * objective.function(batch, state, **options).loss
        for (objective, weight, options), state in zip(recipe.loss.terms, first_states(recipe.loss.terms), strict=True)
    ]
    loss = sum(values)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= LR * parameter.grad
    trained = {
        name.removeprefix("base_model.model."): parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not case.lora
    }
    return float(loss.detach()), trained


def assert_equal(case: Case, found: dict[str, Any], loss: float, weights: dict[str, np.ndarray]) -> None:
    assert found["metrics"]["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6), case
    assert found["weights"].keys() == weights.keys()
    moved = 0.0
    for name, weight in weights.items():
        scale = np.abs(weight).max()
        assert np.abs(found["weights"][name] - weight).max() <= 2e-6 * max(scale, 1), (case, name)
        moved = max(moved, float(scale))
    assert moved > 0


def all_cases() -> list[Case]:
    """Every objective in every layout; the rarer corners once each."""
    objectives = [{"type": name} for name in OBJECTIVES]
    cases = [Case(loss, tokens) for loss in objectives for tokens in LAYOUTS.values()]
    mixture = {"type": "kldo", "skew": 0.5, "mix": {"sft": {"weight": 0.5}}}
    cases += [Case(mixture, tokens) for tokens in LAYOUTS.values()]
    cases += [
        Case({"type": "kldo", "estimator": "ema"}, 70),
        Case(mixture, 70, zero_stage=0),
        Case(mixture, 70, zero_stage=2),
    ]
    cases += [Case(mixture, 70, lora=True), Case(mixture, 100_000, lora=True)]
    cases += [Case({"type": name}, 70, examples="aligned only") for name in ("kldo", "bco", "kto")]
    cases += [Case(mixture, 70, persistent=1_000_000)]
    return [*cases, Case({"type": "kldo"}, 70, examples="one")]


def test_a_rank_without_unaligned_examples_and_an_empty_micro_batch_are_among_the_cases() -> None:
    chosen = step_examples("pairs").examples
    dealt = micro_batches(chosen.lengths, LAYOUTS["one micro-batch a rank"], ranks=2)
    assert any(all(chosen.aligned[i] for batch in mine for i in batch) for mine in dealt)
    sizes = {
        len(batch) for mine in micro_batches(chosen.lengths, LAYOUTS["uneven micro-batches"], ranks=2) for batch in mine
    }
    assert len(sizes) > 1
    assert [[0]] in micro_batches(step_examples("one").examples.lengths, 70, ranks=2)
    assert [[]] in micro_batches(step_examples("one").examples.lengths, 70, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_update_equals_the_plain_step_in_every_layout(ranks: int, tiny_model: Path, tmp_path: Path) -> None:
    cases = all_cases()
    by_rank = run_on_ranks(steps, ranks, tmp_path / "ranks", str(tiny_model), cases)
    for number, case in enumerate(cases):
        loss, weights = plain_step(tiny_model, case)
        for results in by_rank:
            assert_equal(case, results[number], loss, weights)


@pytest.mark.slow
def test_one_micro_batch_a_rank_needs_no_second_forward(tiny_model: Path, tmp_path: Path) -> None:
    cases = [Case({"type": "kldo"}, tokens) for tokens in LAYOUTS.values()]
    found = run_on_ranks(steps, 2, tmp_path / "ranks", str(tiny_model), cases)[0]
    lengths = step_examples("pairs").examples.lengths
    counts = [len(micro_batches(lengths, tokens, 2)[0]) for tokens in LAYOUTS.values()]
    assert [result["forwards"] for result in found] == [count if count == 1 else 2 * count for count in counts]


def test_order_of_examples_inside_the_step_does_not_matter() -> None:
    chosen = step_examples("pairs")
    order = np.random.default_rng(0).permutation(len(chosen.examples))
    logps = torch.randn(len(order)) * 10

    def verdict(rows: np.ndarray) -> Any:
        examples = chosen.examples.select(rows)
        batch = Batch(
            logps[rows],
            chosen.reference_logps[rows],
            torch.from_numpy(examples.aligned),
            torch.from_numpy(examples.response_lengths),
            torch.from_numpy(examples.pairs),
            torch.ones(3),
        )
        terms = [(objective, 1.0, objective.defaults) for objective in OBJECTIVES.values()]
        return judge(terms, first_states(terms), batch)

    straight, shuffled = verdict(np.arange(len(order))), verdict(order)
    assert shuffled.loss == pytest.approx(straight.loss, rel=1e-6)
    torch.testing.assert_close(shuffled.coefficients, straight.coefficients[order], rtol=1e-5, atol=1e-8)
