"""The data loader of a rank: the ids that it forwards and no others, in the order of the plan, in any process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.stored import stored_examples, write_shards
from raydiv.data.batching import BatchLayout, EpochPlan, SequentialPlan, StepPlan
from raydiv.data.tokens import StoredExamples, TokenizedExamples, TokenValues, mismatched
from raydiv.losses import OBJECTIVES, Batch, Term
from raydiv.training import dataloader as module
from raydiv.training.dataloader import ExampleSet, RankShard, StepLoader, read_steps, stream_steps
from raydiv.training.step import RankLayout, RankStep, Stepper, concatenate_batches
from raydiv.utils import distributed as dist

PAIRS, LONE = 40, 25
SCOPES = ("example", "pair", "batch")
Ids = list[tuple[list[int], list[int]]]

quick = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def ids() -> Ids:
    """Pairs, of like and unlike lengths, and then lone examples; prompts come twice or more."""
    generator = np.random.default_rng(5)

    def some(length: int) -> list[int]:
        return [int(token) for token in generator.integers(6, 300, length)]

    prompts = [some(2 + n % 7) for n in range(PAIRS)]
    paired = [(prompt, some(1 + (n * side) % 11)) for n, prompt in enumerate(prompts) for side in (1, 3)]
    return paired + [(prompts[n], some(1 + n % 5)) for n in range(LONE)]


@pytest.fixture(scope="module")
def examples(ids: Ids, tmp_path_factory: pytest.TempPathFactory) -> ExampleSet:
    """Reference log-probs are the row's number, and a thousand more for its mismatched example."""
    n = len(ids)
    shards = write_shards(tmp_path_factory.mktemp("shards") / "set", ids, (50, n - 50))
    pair = [n for n in range(PAIRS) for _ in range(2)] + [-1] * LONE
    stored = stored_examples(ids, [row % 2 == 0 for row in range(n)], pair, shards=shards)
    logps = np.arange(n, dtype=np.float32)
    return ExampleSet(stored, logps, mismatched(stored, max_length=12), 1000 + logps)


def order_of(examples: ExampleSet, size: int = 14, weight: float = 1.0) -> EpochPlan:
    return EpochPlan(examples.examples.units, size, 3, examples.examples.fingerprint, weights=(weight,))


def in_batches(micro_batches: Sequence[Sequence[int]]) -> set[int]:
    return {position for batch in micro_batches for position in batch}


def assert_ids(examples: TokenizedExamples, expected: set[int], stored: Any, rows: np.ndarray) -> None:
    """``examples`` has the ids of ``stored`` at positions ``expected`` alone, and the lengths of all."""
    assert len(examples) == len(rows)
    assert examples.lengths == stored.lengths[rows].tolist()
    for position, row in enumerate(rows.tolist()):
        if position in expected:
            (ids,) = stored.ids(np.array([row]))
            assert all((read == written).all() for read, written in zip(examples[position], ids, strict=True))
        else:
            with pytest.raises(LookupError):
                examples[position]


@quick
@given(
    ranks=st.integers(1, 3),
    tokens=st.sampled_from([1, 30, 70, 10_000]),
    scope=st.sampled_from(SCOPES),
    scores=st.booleans(),
    weight=st.sampled_from([1.0, 2.0, 0.5]),
    number=st.integers(0, 40),
)
def test_a_rank_has_the_ids_that_its_layout_forwards_and_no_others(
    ranks: int, tokens: int, scope: Any, scores: bool, weight: float, number: int, examples: ExampleSet
) -> None:
    layout, order = BatchLayout(tokens, ranks, scope), order_of(examples, weight=weight)
    rows = order.step(number).rows
    seen: set[int] = set()
    for rank in range(ranks):
        step = StepLoader(examples, order, RankShard(layout, rank, trains=True, scores=scores)).read(number)
        training, streams = layout.training(step.examples.lengths, step.examples.units)
        scoring, mismatched = layout.scoring(step.examples.lengths), layout.scoring(step.mismatched.lengths)
        assert step.layout == RankLayout(training[rank], streams, scoring[rank] if scores else [], mismatched[rank])
        positions = in_batches(training[rank]) | (in_batches(scoring[rank]) if scores else set())
        assert_ids(step.examples, positions, examples.examples, rows)
        assert_ids(step.mismatched, in_batches(mismatched[rank]), examples.mismatched, rows)
        seen |= positions
    assert seen == set(range(len(rows)))


def test_a_step_knows_labels_pairs_and_reference_of_the_whole_step(examples: ExampleSet) -> None:
    order = order_of(examples)
    plan = order.step(2)
    step = StepLoader(examples, order, RankShard(BatchLayout(30, 3, "pair"), 1, trains=True, scores=False)).read(2)
    assert step.number == 2
    assert step.plan.rows.tolist() == plan.rows.tolist()
    assert step.examples.aligned.tolist() == examples.examples.aligned[plan.rows].tolist()
    assert step.examples.pair.tolist() == plan.pair.tolist()
    assert len(step.examples.pairs) == (plan.pair >= 0).sum() / 2 > 0
    assert not step.mismatched.aligned.any()
    assert len(step.mismatched.pairs) == 0
    assert step.reference_logps is not None
    assert step.reference_logps.tolist() == plan.rows.tolist()
    assert step.mismatched_reference_logps is not None
    assert step.mismatched_reference_logps.tolist() == (1000 + plan.rows).tolist()


def test_a_rank_has_the_reference_tokens_of_its_examples_alone(examples: ExampleSet) -> None:
    def tokens(stored: StoredExamples, sign: int) -> TokenValues:
        lengths = stored.response_lengths.astype(np.int64)
        values = np.repeat(np.arange(len(stored)), lengths) * sign
        return TokenValues(values.astype(np.float32), np.append(0, np.cumsum(lengths)))

    assert examples.mismatched is not None
    with_tokens = replace(
        examples,
        token_values=tokens(examples.examples, 1),
        mismatched_token_values=tokens(examples.mismatched, -1),
    )
    order, shard = order_of(examples), RankShard(BatchLayout(30, 3, "pair"), 1, trains=True, scores=False)
    step = StepLoader(with_tokens, order, shard).read(2)
    sides = ((step.examples, step.layout.positions, 1), (step.mismatched, step.layout.mismatched_positions, -1))
    for found, positions, sign in sides:
        assert len(positions) < len(found)
        for position, row in enumerate(step.plan.rows.tolist()):
            values = found.token_values[position]
            if position in positions:
                assert values is not None
                assert values.tolist() == [sign * row] * int(found.response_lengths[position])
            else:
                assert values is None


def test_a_set_without_mismatched_examples_or_reference_has_none(examples: ExampleSet) -> None:
    order = order_of(examples)
    shard = RankShard(BatchLayout(30, 1, "pair"), 0, trains=True, scores=True)
    step = StepLoader(ExampleSet(examples.examples, None), order, shard).read(0)
    assert step.reference_logps is None
    assert len(step.mismatched) == 0
    assert step.mismatched_reference_logps is not None
    assert len(step.mismatched_reference_logps) == 0


def is_same(one: RankStep, other: RankStep) -> bool:
    """Whether two steps have the same content."""
    fields = ("prompt_lengths", "response_lengths", "aligned", "pair")
    same = one.number == other.number and one.plan.rows.tolist() == other.plan.rows.tolist()
    same &= one.layout == other.layout
    for left, right in ((one.examples, other.examples), (one.mismatched, other.mismatched)):
        same &= all((getattr(left, name) == getattr(right, name)).all() for name in fields)
        for name in ("prompt_ids", "response_ids"):
            ids = [[None if row is None else row.tolist() for row in getattr(side, name)] for side in (left, right)]
            same &= ids[0] == ids[1]
    for name in ("reference_logps", "mismatched_reference_logps"):
        left, right = getattr(one, name), getattr(other, name)
        same &= left is right if left is None or right is None else torch.equal(left, right)
    return same


def test_a_loader_that_was_pickled_reads_the_same_steps(examples: ExampleSet) -> None:
    for plan in (order_of(examples), SequentialPlan(examples.examples.lengths, 16)):
        here = StepLoader(examples, plan, RankShard(BatchLayout(30, 2, "pair"), 1, trains=True, scores=True))
        here.read(4)
        there: StepLoader = pickle.loads(pickle.dumps(here))
        for number in (0, 3):
            assert is_same(here.read(number), there.read(number))
            assert is_same(here.read(number), pickle.loads(pickle.dumps(there.read(number))))


def test_steps_are_streamed_in_order_from_any_step(examples: ExampleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    order = order_of(examples)
    loader = StepLoader(examples, order, RankShard(BatchLayout(30, 2, "pair"), 0, trains=True, scores=False))
    windows_made = []

    class Here:
        def __init__(self, makers: Sequence[Callable[[], Iterable[Any]]], ahead: int) -> None:
            windows_made.append(len(makers))
            self._makers = makers

        def __iter__(self) -> Iterator[Any]:
            for maker in self._makers:
                yield from maker()

        def close(self) -> None:
            pass

    monkeypatch.setattr(module, "PrefetchedStream", Here)
    monkeypatch.setattr(module, "WINDOW", 4)
    monkeypatch.setattr(module, "AHEAD", 1)
    monkeypatch.setattr(module, "SHORT_RUN", 0)
    # the first step is read by the rank itself
    for start, stop, windows in [(0, 4, 1), (0, 9, 2), (3, 12, 2), (11, 12, 0)]:
        steps = list(stream_steps(loader, lambda: pickle.loads(pickle.dumps(loader)), start, stop))
        assert [step.number for step in steps] == list(range(start, stop))
        assert windows_made[-1] == windows
        for step in steps:
            assert step.plan.rows.tolist() == order.step(step.number).rows.tolist()
            assert is_same(step, loader.read(step.number))


def scored(step: RankStep) -> Batch:
    """A part as scoring leaves it; an example's log-prob tells its content."""
    assert step.reference_logps is not None
    assert step.mismatched_reference_logps is not None
    return Batch(
        logps=torch.tensor([content(step.examples, row) for row in range(len(step.examples))]),
        reference_logps=step.reference_logps,
        aligned=torch.from_numpy(step.examples.aligned),
        tokens=torch.from_numpy(step.examples.response_lengths),
        pairs=torch.from_numpy(step.examples.pairs),
        mismatched_log_ratios=torch.tensor([content(step.mismatched, row) for row in range(len(step.mismatched))]),
    )


def content(examples: TokenizedExamples, row: int) -> float:
    prompt, response = examples[row]
    return float(prompt.sum() + 0.5 * response.sum())


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
@pytest.mark.parametrize("with_mismatched", [True, False])
def test_parts_together_are_the_set_in_its_order_with_its_pairs(
    size: int, with_mismatched: bool, examples: ExampleSet, ids: Ids
) -> None:
    example_set = examples if with_mismatched else ExampleSet(examples.examples, examples.reference_logps)
    order = SequentialPlan(examples.examples.lengths, size)
    loader = StepLoader(example_set, order, RankShard(BatchLayout(70, 1, "pair"), 0, trains=False, scores=True))
    steps = list(read_steps(loader, 0, order.steps))
    assert [len(step.examples) for step in steps] == [len(order.step(n).rows) for n in range(order.steps)]
    batch = concatenate_batches([scored(step) for step in steps], order.order, examples.examples.units)
    assert batch.logps.tolist() == [sum(prompt) + 0.5 * sum(response) for prompt, response in ids]
    assert batch.reference_logps.tolist() == list(range(len(ids)))
    assert batch.aligned.tolist() == examples.examples.aligned.tolist()
    assert batch.tokens.tolist() == [len(response) for _, response in ids]
    assert sorted(batch.pairs.tolist()) == [[2 * n, 2 * n + 1] for n in range(PAIRS)]
    assert examples.mismatched is not None
    others = examples.mismatched.ids(np.arange(len(ids)))
    expected = [float(prompt.sum() + 0.5 * response.sum()) for prompt, response in others]
    assert batch.mismatched_log_ratios.tolist() == (expected if with_mismatched else [])


def test_steps_are_read_when_they_are_requested(examples: ExampleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    order = SequentialPlan(examples.examples.lengths, 16)
    loader = StepLoader(examples, order, RankShard(BatchLayout(70, 1, "pair"), 0, trains=False, scores=True))
    read, numbers = StepLoader.read, []

    def counted(self: StepLoader, number: int) -> RankStep:
        numbers.append(number)
        return read(self, number)

    monkeypatch.setattr(StepLoader, "read", counted)
    steps = read_steps(loader, 0, order.steps)
    assert numbers == []
    next(steps)
    assert numbers == [0]
    assert len(list(steps)) == order.steps - 1
    assert numbers == list(range(order.steps))


class FakeHeadAndEngine:
    """A head and an engine in one, whose every token has the same log-prob; nothing is learned."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.model = Mock(training=True, disable_adapter=nullcontext)
        self.weight = torch.tensor(-0.5, requires_grad=True)
        self.backward, self.update = Mock(), Mock(return_value=1.0)

    def set_targets(self, rows: Any, columns: Any, targets: torch.Tensor, weigh: Any, runs: Any) -> None:
        self._targets, self._weigh = targets, weigh

    def __call__(self, **_: Any) -> Any:
        logps = self.weight.expand(len(self._targets))
        if self._weigh is None:
            return SimpleNamespace(logits=logps)
        coefficients = self._weigh(slice(0, len(logps)), logps.detach())
        return SimpleNamespace(logits=(coefficients * logps).sum())


LOSSES: list[tuple[str, dict[str, Any]]] = [("kldo", {}), ("kldo", {"estimator": "lagged"}), ("dpo", {}), ("kto", {})]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("adapters_off", [False, True])
@pytest.mark.parametrize(("loss", "options"), LOSSES, ids=str)
def test_a_rank_uses_exactly_the_ids_that_it_was_given(
    loss: str,
    options: dict[str, Any],
    adapters_off: bool,
    ranks: int,
    examples: ExampleSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real step looks up no example whose ids the loader has not read, and every one that it has."""
    objective = OBJECTIVES[loss]
    example_set = ExampleSet(
        examples.examples,
        None if adapters_off else examples.reference_logps,
        examples.mismatched if objective.needs_mismatched else None,
        examples.mismatched_reference_logps if objective.needs_mismatched and not adapters_off else None,
    )
    order, looked_up = order_of(examples), set()
    get_item = TokenizedExamples.__getitem__

    def watched(self: TokenizedExamples, row: int) -> Any:
        looked_up.add((id(self), row))
        return get_item(self, row)

    monkeypatch.setattr(TokenizedExamples, "__getitem__", watched)
    monkeypatch.setattr(dist, "world_size", lambda: ranks)
    monkeypatch.setattr(dist, "sum_over_ranks", lambda values: values)
    for tokens in (30, 10_000):
        for rank in range(ranks):
            monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
            model: Any = FakeHeadAndEngine()
            stepper = Stepper(model, model, [Term(objective, 1.0, {**objective.defaults, **options})], tokens)
            loader = StepLoader(example_set, order, RankShard(stepper.layout, rank, trains=True, scores=adapters_off))
            for number in (0, 7):
                step = loader.read(number)
                looked_up.clear()
                stepper.step(step, lr=0.1)
                held = {
                    (id(side), row)
                    for side in (step.examples, step.mismatched)
                    for row, ids in enumerate(side.prompt_ids)
                    if ids is not None
                }
                assert looked_up == held
                assert held


def test_any_plan_that_returns_steps_by_number_will_do(examples: ExampleSet) -> None:
    plan = StepPlan(9, 0.25, np.array([3, 2, 3]), np.array([5, 5, -1]))
    order = Mock(step=Mock(return_value=plan))
    step = StepLoader(examples, order, RankShard(BatchLayout(70, 1, "batch"), 0, trains=True, scores=False)).read(9)
    order.step.assert_called_once_with(9)
    assert_ids(step.examples, {0, 1, 2}, examples.examples, plan.rows)
    assert step.examples.pairs.tolist() == [[1, 0]]
