"""What reaches a rank: the ids that it forwards and no others, in the order of the plan, wherever they are read."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
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
from raydiv.data.tokens import TokenizedExamples, mismatched
from raydiv.losses import OBJECTIVES, Batch, Term
from raydiv.training import dataloader as module
from raydiv.training.dataloader import ExampleSet, RankShard, StepLoader, parts, stream_steps
from raydiv.training.step import StepExamples, Stepper, joined
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


def forwarded(dealt: Sequence[Sequence[Sequence[int]]], rank: int) -> set[int]:
    return {position for batch in dealt[rank] for position in batch}


def assert_held(found: TokenizedExamples, expected: set[int], stored: Any, rows: np.ndarray) -> None:
    """``found`` holds the ids of ``stored`` at positions ``expected`` alone; lengths are known of all."""
    assert len(found) == len(rows)
    assert found.lengths == stored.lengths[rows].tolist()
    for position, row in enumerate(rows.tolist()):
        if position in expected:
            (same,) = stored.ids(np.array([row]))
            assert all((one == other).all() for one, other in zip(found[position], same, strict=True))
        else:
            with pytest.raises(LookupError):
                found[position]


@quick
@given(
    ranks=st.integers(1, 3),
    tokens=st.sampled_from([1, 30, 70, 10_000]),
    scope=st.sampled_from(SCOPES),
    scores=st.booleans(),
    weight=st.sampled_from([1.0, 2.0, 0.5]),
    number=st.integers(0, 40),
)
def test_a_rank_holds_exactly_what_its_layout_forwards(
    ranks: int, tokens: int, scope: Any, scores: bool, weight: float, number: int, examples: ExampleSet
) -> None:
    layout, order = BatchLayout(tokens, ranks, scope), order_of(examples, weight=weight)
    seen: set[int] = set()
    for rank in range(ranks):
        feed = StepLoader(examples, order, RankShard(layout, rank, trains=True, scores=scores))
        plan = order.step(number)
        chosen = feed.step(plan, feed.read(number))
        own = forwarded(layout.training(chosen.examples.lengths, chosen.examples.units)[0], rank)
        if scores:
            own |= forwarded(layout.scoring(chosen.examples.lengths), rank)
        assert_held(chosen.examples, own, examples.examples, plan.rows)
        others = forwarded(layout.scoring(chosen.mismatched.lengths), rank)
        assert_held(chosen.mismatched, others, examples.mismatched, plan.rows)
        seen |= own
    assert seen == set(range(len(plan.rows)))


def test_a_step_knows_labels_pairs_and_reference_of_the_whole_step(examples: ExampleSet) -> None:
    order = order_of(examples)
    feed = StepLoader(examples, order, RankShard(BatchLayout(30, 3, "pair"), 1, trains=True, scores=False))
    plan = order.step(2)
    chosen = feed.step(plan, feed.read(2))
    assert chosen.number == 2
    assert chosen.examples.aligned.tolist() == examples.examples.aligned[plan.rows].tolist()
    assert chosen.examples.pair.tolist() == plan.pair.tolist()
    assert len(chosen.examples.pairs) == (plan.pair >= 0).sum() / 2 > 0
    assert not chosen.mismatched.aligned.any()
    assert len(chosen.mismatched.pairs) == 0
    assert chosen.reference_logps is not None
    assert chosen.reference_logps.tolist() == plan.rows.tolist()
    assert chosen.mismatched_reference_logps is not None
    assert chosen.mismatched_reference_logps.tolist() == (1000 + plan.rows).tolist()


def test_a_set_without_mismatched_examples_or_reference_has_none(examples: ExampleSet) -> None:
    order = order_of(examples)
    feed = StepLoader(
        ExampleSet(examples.examples, None), order, RankShard(BatchLayout(30, 1, "pair"), 0, trains=True, scores=True)
    )
    chosen = feed.step(order.step(0), feed.read(0))
    assert chosen.reference_logps is None
    assert len(chosen.mismatched) == 0
    assert chosen.mismatched_reference_logps is not None
    assert len(chosen.mismatched_reference_logps) == 0


def same(one: StepExamples, other: StepExamples) -> bool:
    """Whether two steps hold the same."""
    fields = ("prompt_lengths", "response_lengths", "aligned", "pair")
    alike = one.number == other.number
    for mine, theirs in ((one.examples, other.examples), (one.mismatched, other.mismatched)):
        alike &= all((getattr(mine, name) == getattr(theirs, name)).all() for name in fields)
        for name in ("prompt_ids", "response_ids"):
            ids = [[None if row is None else row.tolist() for row in getattr(side, name)] for side in (mine, theirs)]
            alike &= ids[0] == ids[1]
    return alike


def test_a_feed_that_travelled_reads_the_same(examples: ExampleSet) -> None:
    for plan in (order_of(examples), SequentialPlan(examples.examples.lengths, 16)):
        here = StepLoader(examples, plan, RankShard(BatchLayout(30, 2, "pair"), 1, trains=True, scores=True))
        here.step(here.plan.step(4), here.read(4))
        there: StepLoader = pickle.loads(pickle.dumps(here))
        for number in (0, 3):
            first, second = (feed.step(feed.plan.step(number), feed.read(number)) for feed in (here, there))
            assert same(first, second)
            # read there, used here
            assert same(first, here.step(here.plan.step(number), pickle.loads(pickle.dumps(there.read(number)))))


def test_steps_are_streamed_in_order_from_any_step(examples: ExampleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    order = order_of(examples)
    feed = StepLoader(examples, order, RankShard(BatchLayout(30, 2, "pair"), 0, trains=True, scores=False))
    made = []

    class Here:
        def __init__(self, makers: Sequence[Callable[[], Iterable[Any]]], ahead: int) -> None:
            made.append(len(makers))
            self._makers = makers

        def __iter__(self) -> Iterator[Any]:
            for maker in self._makers:
                yield from maker()

        def close(self) -> None:
            pass

    monkeypatch.setattr(module, "Stream", Here)
    monkeypatch.setattr(module, "WINDOW", 4)
    monkeypatch.setattr(module, "AHEAD", 1)
    # the first step is read by the rank itself
    for start, stop, windows in [(0, 4, 1), (0, 9, 2), (3, 12, 2), (11, 12, 0)]:
        steps = list(stream_steps(feed, lambda: pickle.loads(pickle.dumps(feed)), start, stop))
        assert [plan.step for plan, _ in steps] == [chosen.number for _, chosen in steps] == list(range(start, stop))
        assert made[-1] == windows
        for plan, chosen in steps:
            assert plan.rows.tolist() == order.step(plan.step).rows.tolist()
            assert same(chosen, feed.step(plan, feed.read(plan.step)))


def scored(chosen: StepExamples) -> Batch:
    """A part as scoring leaves it; an example's log-prob tells its content."""
    assert chosen.reference_logps is not None
    assert chosen.mismatched_reference_logps is not None
    return Batch(
        logps=torch.tensor([content(chosen.examples, row) for row in range(len(chosen.examples))]),
        reference_logps=chosen.reference_logps,
        aligned=torch.from_numpy(chosen.examples.aligned),
        tokens=torch.from_numpy(chosen.examples.response_lengths),
        pairs=torch.from_numpy(chosen.examples.pairs),
        mismatched_log_ratios=torch.tensor([content(chosen.mismatched, row) for row in range(len(chosen.mismatched))]),
    )


def content(examples: TokenizedExamples, row: int) -> float:
    prompt, response = examples[row]
    return float(prompt.sum() + 0.5 * response.sum())


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
@pytest.mark.parametrize("with_mismatched", [True, False])
def test_parts_together_are_the_set_in_its_order_with_its_pairs(
    size: int, with_mismatched: bool, examples: ExampleSet, ids: Ids
) -> None:
    given_set = examples if with_mismatched else ExampleSet(examples.examples, examples.reference_logps)
    order = SequentialPlan(examples.examples.lengths, size)
    feed = StepLoader(given_set, order, RankShard(BatchLayout(70, 1, "pair"), 0, trains=False, scores=True))
    steps = list(parts(feed, order.parts))
    assert [len(chosen.examples) for chosen in steps] == [len(order.step(n).rows) for n in range(order.parts)]
    batch = joined([scored(chosen) for chosen in steps], order.order, examples.examples.units)
    assert batch.logps.tolist() == [sum(prompt) + 0.5 * sum(response) for prompt, response in ids]
    assert batch.reference_logps.tolist() == list(range(len(ids)))
    assert batch.aligned.tolist() == examples.examples.aligned.tolist()
    assert batch.tokens.tolist() == [len(response) for _, response in ids]
    assert sorted(batch.pairs.tolist()) == [[2 * n, 2 * n + 1] for n in range(PAIRS)]
    assert examples.mismatched is not None
    others = examples.mismatched.ids(np.arange(len(ids)))
    expected = [float(prompt.sum() + 0.5 * response.sum()) for prompt, response in others]
    assert batch.mismatched_log_ratios.tolist() == (expected if with_mismatched else [])


def test_parts_are_read_when_they_are_asked_for(examples: ExampleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    order = SequentialPlan(examples.examples.lengths, 16)
    feed = StepLoader(examples, order, RankShard(BatchLayout(70, 1, "pair"), 0, trains=False, scores=True))
    read, asked = StepLoader.read, []

    def counted(self: StepLoader, step: int) -> Any:
        asked.append(step)
        return read(self, step)

    monkeypatch.setattr(StepLoader, "read", counted)
    reading = parts(feed, order.parts)
    assert asked == []
    next(reading)
    assert asked == [0]
    assert len(list(reading)) == order.parts - 1
    assert asked == list(range(order.parts))


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
def test_a_rank_steps_with_what_it_is_fed(
    loss: str,
    options: dict[str, Any],
    adapters_off: bool,
    ranks: int,
    examples: ExampleSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trainer's own way through a step looks up no example that the feed has not brought, and all that it has."""
    objective = OBJECTIVES[loss]
    given_set = ExampleSet(
        examples.examples,
        None if adapters_off else examples.reference_logps,
        examples.mismatched if objective.mismatched else None,
        examples.mismatched_reference_logps if objective.mismatched and not adapters_off else None,
    )
    order, looked_up = order_of(examples), set()
    look_up = TokenizedExamples.__getitem__

    def watched(self: TokenizedExamples, row: int) -> Any:
        looked_up.add((id(self), row))
        return look_up(self, row)

    monkeypatch.setattr(TokenizedExamples, "__getitem__", watched)
    monkeypatch.setattr(dist, "world_size", lambda: ranks)
    monkeypatch.setattr(dist, "sum_over_ranks", lambda values: values)
    for tokens in (30, 10_000):
        for rank in range(ranks):
            monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
            model: Any = FakeHeadAndEngine()
            stepper = Stepper(model, model, [Term(objective, 1.0, {**objective.defaults, **options})], tokens)
            feed = StepLoader(given_set, order, RankShard(stepper.layout, rank, trains=True, scores=adapters_off))
            for number in (0, 7):
                looked_up.clear()
                chosen = feed.step(order.step(number), feed.read(number))
                stepper.step(chosen, lr=0.1)
                held = {
                    (id(side), row)
                    for side in (chosen.examples, chosen.mismatched)
                    for row, ids in enumerate(side.prompt_ids)
                    if ids is not None
                }
                assert looked_up == held
                assert held


def test_plan_of_a_feed_is_any_order_that_finds_a_step(examples: ExampleSet) -> None:
    plan = StepPlan(9, 0.25, np.array([3, 2, 3]), np.array([5, 5, -1]))
    order = Mock(step=Mock(return_value=plan))
    feed = StepLoader(examples, order, RankShard(BatchLayout(70, 1, "batch"), 0, trains=True, scores=False))
    chosen = feed.step(plan, feed.read(9))
    order.step.assert_called_once_with(9)
    assert_held(chosen.examples, {0, 1, 2}, examples.examples, plan.rows)
    assert chosen.examples.pairs.tolist() == [[1, 0]]
