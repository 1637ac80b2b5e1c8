"""The order of data is a pure function, weights of sources hold, and micro-batches contain every example once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raydiv.data.batching import (
    BatchLayout,
    EpochPlan,
    SequentialPlan,
    StepPlan,
    micro_batches,
)
from raydiv.data.tokens import TokenizedExamples
from raydiv.training.dataloader import RankShard

NOTHING = TokenizedExamples.from_ids([], [], [])

quick = settings(max_examples=80, deadline=None)


def units_of(*members: Sequence[int]) -> np.ndarray:
    """[u, 2] as in StoredExamples: a pair's rows, or a single row and -1."""
    return np.array([[*rows, -1][:2] for rows in members], dtype=np.int64).reshape(-1, 2)


def single_rows(rows: int) -> np.ndarray:
    """Units of the single rows 0 to ``rows`` - 1."""
    return units_of(*([row] for row in range(rows)))


def members(unit: np.ndarray) -> list[int]:
    return [row for row in unit.tolist() if row >= 0]


@st.composite
def unit_arrays(draw: st.DrawFn) -> np.ndarray:
    """Pairs and single rows, in any order, together rows 0..n-1."""
    sizes = draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=30))
    rows = draw(st.permutations(range(sum(sizes))))
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    return units_of(*(rows[start : start + size] for start, size in zip(starts, sizes, strict=True)))


epochs = st.builds(
    EpochPlan,
    units=unit_arrays(),
    examples=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    fingerprint=st.text(max_size=8),
)


@st.composite
def mixtures(draw: st.DrawFn) -> EpochPlan:
    """Several sources with weights, their units in any order."""
    units = draw(unit_arrays())
    weights = draw(st.lists(st.sampled_from([1.0, 2.0, 0.5, 1.5, 0.3]), min_size=1, max_size=3))
    source = np.array([draw(st.integers(0, len(weights) - 1)) for _ in units], dtype=np.int16)
    # an epoch must not be empty: one source that has a unit gets a weight of at least 1
    number = draw(st.integers(0, len(weights) - 1))
    weights[number] = max(1.0, weights[number])
    source[0] = number
    return EpochPlan(units, draw(st.integers(1, 9)), draw(st.integers(0, 2**40)), "f", source, weights)


def plans(plan: EpochPlan, epoch: int) -> list[StepPlan]:
    """The steps of an epoch."""
    return [plan.step(step) for step in range(*plan._starts_of_epochs(epoch + 1)[epoch:].tolist())]


def walk(plan: EpochPlan, epoch: int) -> list[list[int]]:
    """Rows of each step of an epoch."""
    return [step.rows.tolist() for step in plans(plan, epoch)]


def rows_of(plan: EpochPlan, epoch: int) -> list[int]:
    """Rows of an epoch, in its order."""
    return [row for rows in walk(plan, epoch) for row in rows]


@quick
@given(epochs, st.integers(0, 3))
def test_every_epoch_takes_each_row_once(plan: EpochPlan, epoch: int) -> None:
    steps = walk(plan, epoch)
    assert Counter(row for rows in steps for row in rows) == Counter(plan.units[plan.units >= 0].tolist())
    assert all(steps)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 23, 24, 25, 100])
@pytest.mark.parametrize("sources", [1, 2])
def test_weight_one_takes_each_row_once_for_any_size_of_step(size: int, sources: int) -> None:
    units = units_of(*([n, n + 12] for n in range(6)), *([n] for n in range(6, 12)))
    source = np.arange(len(units)) % sources
    plan = EpochPlan(units, size, 5, "f", source, [1.0] * sources)
    for epoch in range(4):
        assert sorted(rows_of(plan, epoch)) == list(range(18))


@quick
@given(st.one_of(epochs, mixtures()), st.integers(0, 3))
def test_units_stay_together_and_no_step_is_too_large(plan: EpochPlan, epoch: int) -> None:
    together = {tuple(members(unit)) for unit in plan.units}
    largest = max(map(len, together))
    partner = {unit[0]: unit for unit in together}
    for rows in walk(plan, epoch):
        remaining = list(rows)
        while remaining:
            unit = partner[remaining[0]]
            assert tuple(remaining[: len(unit)]) == unit
            remaining = remaining[len(unit) :]
        assert len(rows) <= max(plan.examples, largest)


@quick
@given(st.one_of(epochs, mixtures()), st.integers(0, 3))
def test_pair_numbers_of_a_step_are_shared_by_a_pair_alone(plan: EpochPlan, epoch: int) -> None:
    pairs = {tuple(unit) for unit in plan.units.tolist() if unit[1] >= 0}
    single = {unit[0] for unit in plan.units.tolist() if unit[1] < 0}
    for step in plans(plan, epoch):
        assert len(step.pair) == len(step.rows)
        assert {row for row, pair in zip(step.rows.tolist(), step.pair.tolist(), strict=True) if pair < 0} <= single
        for number in set(step.pair.tolist()) - {-1}:
            assert tuple(step.rows[step.pair == number].tolist()) in pairs
        assert (step.pair >= -1).all()
        assert single.isdisjoint(step.rows[step.pair >= 0].tolist())


def test_step_from_units_numbers_pairs_and_gives_single_rows_none() -> None:
    step = StepPlan.from_units(3, 0.5, units_of([7, 2], [5], [1, 9], [0]))
    assert (step.step, step.epoch) == (3, 0.5)
    assert step.rows.tolist() == [7, 2, 5, 1, 9, 0]
    first, second = step.pair[0], step.pair[3]
    assert step.pair.tolist() == [first, first, -1, second, second, -1]
    assert first != second


def test_a_pair_that_occurs_twice_in_a_step_is_two_pairs() -> None:
    plan = EpochPlan(units_of([0, 1], [2, 3]), 8, 0, "f", weights=(2.0,))
    assert plan.steps_in(1) == 1
    step = plan.step(0)
    assert sorted(step.rows.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(Counter(step.pair.tolist()).values()) == [2, 2, 2, 2]
    for number in set(step.pair.tolist()):
        assert step.rows[step.pair == number].tolist() in ([0, 1], [2, 3])
    # the objective also sees four pairs, each of an aligned and an unaligned example
    examples = TokenizedExamples.from_ids([([1], [2])] * 8, (step.rows % 2 == 0).tolist(), step.pair.tolist())
    assert sorted(examples.pairs.ravel().tolist()) == list(range(8))
    assert (step.rows[examples.pairs[:, 0]] + 1 == step.rows[examples.pairs[:, 1]]).all()


@quick
@given(st.one_of(epochs, mixtures()), st.integers(0, 200), st.lists(st.integers(0, 200), max_size=5))
def test_step_is_a_pure_function(plan: EpochPlan, step: int, before: list[int]) -> None:
    source = np.zeros(len(plan.units), np.int16)
    for number, (members, _) in enumerate(plan._sources):
        source[members] = number
    weights = [weight for _, weight in plan._sources]
    again = EpochPlan(plan.units.copy(), plan.examples, plan.seed, plan.fingerprint, source, weights)
    for other in before:
        plan.step(other)
    assert plan.step(step).rows.tolist() == again.step(step).rows.tolist()
    assert plan.step(step).pair.tolist() == again.step(step).pair.tolist()
    assert again.step(step).step == step


@quick
@given(st.one_of(epochs, mixtures()), st.integers(0, 60))
def test_step_is_the_same_as_in_a_walk_through_epochs(plan: EpochPlan, step: int) -> None:
    walked = [rows for epoch in range(step + 1) for rows in walk(plan, epoch)]
    assert plan.step(step).rows.tolist() == walked[step]


@pytest.mark.parametrize(("weights", "generators"), [((1.0,), 1), ((2.0,), 1), ((1.5,), 2), ((1.0, 0.5, 0.25), 3)])
def test_distant_step_is_computed_without_those_before(
    weights: tuple[float, ...], generators: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shuffle of the epoch, and one of each source of which an epoch takes a part."""
    purposes, generator = [], EpochPlan._generator

    def counted(self: EpochPlan, purpose: object) -> Any:
        purposes.append(purpose)
        return generator(self, purpose)

    monkeypatch.setattr(EpochPlan, "_generator", counted)
    rows = 30_000
    plan = EpochPlan(single_rows(rows), 16, 0, "f", np.arange(rows) % len(weights), weights)
    assert plan.steps_in(10) < 90_000
    step = plan.step(90_000)
    assert len(purposes) == generators
    assert step.step == 90_000
    assert len(set(step.rows.tolist())) == 16


@quick
@given(st.one_of(epochs, mixtures()), st.integers(0, 60))
def test_rows_of_the_first_steps(plan: EpochPlan, steps: int) -> None:
    taken = {row for step in range(steps) for row in plan.step(step).rows.tolist()}
    assert plan.rows_until(steps).tolist() == sorted(taken)


@quick
@given(st.one_of(epochs, mixtures()))
def test_epoch_of_a_step(plan: EpochPlan) -> None:
    assert plan.step(plan.steps_in(1) - 1).epoch == pytest.approx(1)
    assert plan.step(plan.steps_in(2) - 1).epoch == pytest.approx(2)
    assert 0 < plan.step(0).epoch <= 1


@quick
@given(st.integers(0, 2**40), st.text(max_size=8), st.integers(0, 50))
def test_order_depends_on_seed_epoch_and_fingerprint(seed: int, fingerprint: str, epoch: int) -> None:
    units = single_rows(60)
    plan = EpochPlan(units, 8, seed, fingerprint)
    order = walk(plan, epoch)
    assert order == walk(EpochPlan(units, 8, seed, fingerprint), epoch)
    others = [
        walk(plan, epoch + 1),
        walk(EpochPlan(units, 8, seed + 1, fingerprint), epoch),
        walk(EpochPlan(units, 8, seed, fingerprint + "x"), epoch),
    ]
    assert order not in others


@pytest.mark.parametrize("weight", [1.0, 0.5, 2.0])
def test_order_does_not_depend_on_the_size_of_a_step(weight: float) -> None:
    orders = [rows_of(EpochPlan(single_rows(24), size, 3, "f", weights=(weight,)), 1) for size in (1, 5, 8, 24, 100)]
    assert orders == [orders[0]] * 5


def test_order_is_shuffled_evenly() -> None:
    plan = EpochPlan(single_rows(10), 1, 0, "f")
    first = Counter(plan.step(10 * epoch).rows.tolist()[0] for epoch in range(500))
    assert len(first) == 10
    assert max(first.values()) < 2 * min(first.values())


@pytest.mark.parametrize(
    ("units", "examples", "sizes"),
    [
        ([[0], [1], [2], [3], [4]], 2, [2, 2, 1]),
        ([[0, 1], [2, 3], [4, 5]], 4, [4, 2]),
        ([[0, 1], [2, 3], [4, 5]], 5, [4, 2]),
        ([[0, 1], [2, 3]], 1, [2, 2]),
        ([[0], [1]], 16, [2]),
    ],
)
def test_sizes_of_steps(units: list[list[int]], examples: int, sizes: list[int]) -> None:
    assert [len(rows) for rows in walk(EpochPlan(units_of(*units), examples, 0, "f"), 0)] == sizes


@pytest.mark.parametrize(
    ("rows", "weight", "steps"), [(24, 1.0, 6), (24, 0.5, 3), (24, 2.0, 12), (24, 1.5, 9), (25, 1.0, 7), (10, 0.25, 1)]
)
def test_steps_of_an_epoch_count_its_passes(rows: int, weight: float, steps: int) -> None:
    assert EpochPlan(single_rows(rows), 4, 0, "f", weights=(weight,)).steps_in(1) == steps


@quick
@given(st.integers(2, 40), st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 5))
@example(rows=7, size=3, seed=0, first=0)
def test_half_a_source_is_another_half_every_epoch(rows: int, size: int, seed: int, first: int) -> None:
    plan = EpochPlan(single_rows(rows), size, seed, "f", weights=(0.5,))
    half, other = (rows_of(plan, epoch) for epoch in (first, first + 1))
    assert sorted([*half, *other]) == list(range(rows))
    assert abs(len(half) - len(other)) == rows % 2


@quick
@given(st.integers(2, 40), st.sampled_from([0.01, 0.25, 0.3, 0.35, 0.5, 0.75, 0.9]), st.integers(0, 2**40))
def test_a_part_takes_all_units_in_turn(rows: int, weight: float, seed: int) -> None:
    plan = EpochPlan(single_rows(rows), 4, seed, "f", weights=(weight,))
    counts: Counter[int] = Counter(dict.fromkeys(range(rows), 0))
    for epoch in range(12):
        counts.update(rows_of(plan, epoch))
        assert max(counts.values()) - min(counts.values()) <= 1
        # what one epoch rounds off, a later one makes good
        assert abs(counts.total() - weight * rows * (epoch + 1)) <= 0.5 + 1e-6


@pytest.mark.parametrize(("rows", "weights"), [((100, 4), (1.0, 0.1)), ((1,), (0.4,))])
def test_a_part_of_one_unit_takes_all_units_in_turn(rows: tuple[int, ...], weights: tuple[float, ...]) -> None:
    plan = EpochPlan(single_rows(sum(rows)), 8, 0, "f", np.repeat(np.arange(len(rows)), rows), weights)
    assert {row for epoch in range(40) for row in rows_of(plan, epoch)} == set(range(sum(rows)))
    assert len(plan.step(0).rows) > 0


def test_epochs_of_a_tiny_source_may_have_no_step() -> None:
    plan = EpochPlan(single_rows(1), 8, 0, "f", weights=(0.4,))
    assert [len(walk(plan, epoch)) for epoch in range(5)] == [0, 1, 0, 1, 0]
    assert [plan.step(step).epoch for step in range(2)] == [2.0, 4.0]
    assert [plan.steps_in(epochs) for epochs in (0.5, 1, 2, 5)] == [1, 1, 1, 2]


@quick
@given(unit_arrays(), st.integers(1, 9), st.integers(0, 3))
def test_weight_two_takes_each_unit_twice(units: np.ndarray, size: int, epoch: int) -> None:
    counts = Counter(rows_of(EpochPlan(units, size, 1, "f", weights=(2.0,)), epoch))
    assert counts == Counter(dict.fromkeys(units[units >= 0].tolist(), 2))


def test_weight_one_and_a_half_takes_all_once_and_another_half_again() -> None:
    plan = EpochPlan(single_rows(20), 7, 1, "f", weights=(1.5,))
    repeated = []
    for epoch in range(2):
        counts = Counter(rows_of(plan, epoch))
        assert sorted(counts) == list(range(20))
        repeated.append({row for row, count in counts.items() if count == 2})
        assert max(counts.values()) == 2
        assert len(repeated[-1]) == 10
    assert repeated[0].isdisjoint(repeated[1])


def test_each_source_has_its_weight_and_sources_are_mixed() -> None:
    source = np.array([0, 1] * 20)
    plan = EpochPlan(single_rows(40), 25, 1, "f", source, (0.5, 2.0))
    halves = []
    for epoch in range(2):
        counts = Counter(rows_of(plan, epoch))
        halves.append({row for row in counts if row % 2 == 0})
        assert {row: count for row, count in counts.items() if row % 2} == dict.fromkeys(range(1, 40, 2), 2)
        assert all(counts[row] == 1 for row in halves[-1])
    assert halves[0] | halves[1] == set(range(0, 40, 2))
    assert halves[0].isdisjoint(halves[1])
    # 50 examples in two steps
    assert all({row % 2 for row in rows} == {0, 1} for rows in walk(plan, 0))


def test_parts_of_two_sources_are_drawn_independently() -> None:
    source = np.repeat([0, 1], 30)
    rows = rows_of(EpochPlan(single_rows(60), 10, 1, "f", source, (0.5, 0.5)), 0)
    assert {row for row in rows if row < 30} != {row - 30 for row in rows if row >= 30}


@quick
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 50))
def test_sequential_plan_takes_each_row_once_with_similar_lengths_together(lengths: list[int], size: int) -> None:
    plan = SequentialPlan(np.array(lengths, dtype=np.int32), size)
    steps = [plan.step(number) for number in range(plan.steps)]
    rows = [row for step in steps for row in step.rows.tolist()]
    assert sorted(rows) == list(range(len(lengths)))
    assert rows == plan.order.tolist()
    assert [lengths[row] for row in rows] == sorted(lengths)
    assert all(0 < len(step.rows) <= size for step in steps)
    assert all(step.pair.tolist() == [-1] * len(step.rows) for step in steps)
    assert [step.step for step in steps] == list(range(plan.steps))


length_lists = st.lists(st.integers(1, 40), max_size=40)
budgets, worlds = st.integers(1, 120), st.integers(1, 6)


def padded(batch: list[int], lengths: list[int]) -> int:
    return len(batch) * max((lengths[position] for position in batch), default=0)


@quick
@given(length_lists, budgets, worlds)
def test_every_position_is_in_one_micro_batch(lengths: list[int], tokens: int, ranks: int) -> None:
    by_rank = micro_batches(lengths, tokens, ranks)
    assert sorted(position for rank_batches in by_rank for batch in rank_batches for position in batch) == list(
        range(len(lengths))
    )


@quick
@given(length_lists, budgets, worlds)
def test_every_rank_has_the_same_number_of_micro_batches(lengths: list[int], tokens: int, ranks: int) -> None:
    by_rank = micro_batches(lengths, tokens, ranks)
    assert len(by_rank) == ranks
    assert len({len(rank_batches) for rank_batches in by_rank}) == 1
    assert len(by_rank[0]) >= 1


@settings(max_examples=300, deadline=None)
@given(length_lists, budgets, worlds)
def test_budget_holds_unless_an_example_alone_exceeds_it(lengths: list[int], tokens: int, ranks: int) -> None:
    for rank_batches in micro_batches(lengths, tokens, ranks):
        for batch in rank_batches:
            assert len(batch) <= 1 or padded(batch, lengths) <= tokens


@quick
@given(length_lists, budgets, worlds)
def test_ranks_differ_by_at_most_one_micro_batch(lengths: list[int], tokens: int, ranks: int) -> None:
    by_rank = micro_batches(lengths, tokens, ranks)
    loads = [sum(padded(batch, lengths) for batch in rank_batches) for rank_batches in by_rank]
    assert max(loads) - min(loads) <= max(padded(batch, lengths) for rank_batches in by_rank for batch in rank_batches)


@quick
@given(length_lists, budgets, worlds)
def test_last_micro_batches_are_not_all_dummies(lengths: list[int], tokens: int, ranks: int) -> None:
    by_rank = micro_batches(lengths, tokens, ranks)
    assert any(rank_batches[-1] for rank_batches in by_rank) or not lengths


@quick
@given(length_lists, budgets, worlds)
def test_layout_is_a_pure_function(lengths: list[int], tokens: int, ranks: int) -> None:
    assert micro_batches(lengths, tokens, ranks) == micro_batches(list(lengths), tokens, ranks)


def in_pairs(lengths: list[int]) -> list[list[int]]:
    """Groups of two neighbours; an odd last one alone."""
    return [list(range(len(lengths)))[start : start + 2] for start in range(0, len(lengths), 2)]


@quick
@given(length_lists, budgets, worlds)
def test_groups_stay_together_within_the_same_rules(lengths: list[int], tokens: int, ranks: int) -> None:
    groups = in_pairs(lengths)
    by_rank = micro_batches(lengths, tokens, ranks, groups)
    batches = [batch for rank_batches in by_rank for batch in rank_batches]
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    assert all(any(set(group) <= set(batch) for batch in batches) for group in groups)
    assert all(padded(batch, lengths) <= tokens or batch in groups for batch in batches)
    assert len({len(rank_batches) for rank_batches in by_rank}) == 1


@quick
@given(length_lists, budgets, worlds)
def test_costs_of_a_layout_count_padding(lengths: list[int], tokens: int, ranks: int) -> None:
    layout = BatchLayout(tokens, ranks, "batch")
    by_rank = layout.scoring(lengths)
    sizes = [[padded(batch, lengths) for batch in rank_batches] for rank_batches in by_rank]
    assert layout.busiest(by_rank, lengths) == max(map(sum, sizes))
    assert layout.largest(by_rank, lengths) == max(map(max, sizes))


@quick
@given(length_lists, budgets, worlds, st.booleans())
def test_packed_micro_batches_obey_the_same_rules_without_padding(
    lengths: list[int], tokens: int, ranks: int, paired: bool
) -> None:
    groups = in_pairs(lengths) if paired else None
    by_rank = micro_batches(lengths, tokens, ranks, groups, packed=True)
    batches = [batch for rank_batches in by_rank for batch in rank_batches]
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    assert len({len(rank_batches) for rank_batches in by_rank}) == 1
    sizes = [sum(lengths[position] for position in batch) for batch in batches]
    all_groups = [list(group) for group in groups or [[position] for position in range(len(lengths))]]
    assert all(size <= tokens or batch in all_groups for size, batch in zip(sizes, batches, strict=True))
    assert all(any(set(group) <= set(batch) for batch in batches) for group in all_groups)
    loads = [sum(lengths[position] for batch in rank_batches for position in batch) for rank_batches in by_rank]
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_packed_loads_are_as_equal_as_examples_allow(seed: int, ranks: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.choice([20, 200]) + generator.randrange(30) for _ in range(64)]
    layout = BatchLayout(1024, ranks, "batch", packed=True)
    by_rank = layout.scoring(lengths)
    assert layout.busiest(by_rank, lengths) <= 1.05 * sum(lengths) / ranks
    assert len(by_rank[0]) <= -(-sum(lengths) // (1024 * ranks)) + 1


def test_packed_pairs_that_fit_the_budget_are_together() -> None:
    lengths = [10, 1, 10, 1, 10, 1]
    by_rank, streams = BatchLayout(20, 1, "pair", packed=True).training(lengths, in_pairs(lengths))
    assert streams
    assert all(set(pair) <= set(batch) for pair, batch in zip(in_pairs(lengths), by_rank[0], strict=True))


def test_longest_come_first_with_similar_lengths() -> None:
    assert micro_batches([1, 9, 2, 10, 3], 20, 1) == [[[3, 1], [4, 2, 0]]]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_step_without_examples_is_one_dummy_a_rank(ranks: int) -> None:
    assert micro_batches([], 100, ranks) == [[[]]] * ranks


@pytest.mark.parametrize(("examples", "ranks"), [(1, 2), (2, 3), (3, 8)])
def test_fewer_examples_than_ranks_leave_dummies(examples: int, ranks: int) -> None:
    by_rank = micro_batches([5] * examples, 100, ranks)
    assert sorted(len(rank_batches[0]) for rank_batches in by_rank) == [0] * (ranks - examples) + [1] * examples


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_tokens_of_one_budget_are_divided_over_all_ranks(ranks: int) -> None:
    assert [len(batch) for rank_batches in micro_batches([7] * 8, 1000, ranks) for batch in rank_batches] == [
        8 // ranks
    ] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_loads_of_a_large_step_are_balanced(seed: int, ranks: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.choice([20, 200]) + generator.randrange(30) for _ in range(256)]
    by_rank = micro_batches(lengths, 1024, ranks)
    loads = [sum(padded(batch, lengths) for batch in rank_batches) for rank_batches in by_rank]
    assert max(loads) <= 1.1 * sum(loads) / ranks
    assert sum(loads) <= 1.15 * sum(lengths)


SCOPES = ("example", "pair", "batch")


@st.composite
def steps_of_examples(draw: st.DrawFn) -> TokenizedExamples:
    """A step of pairs and single examples of any lengths."""
    units = draw(unit_arrays())
    pair = StepPlan.from_units(0, 0.0, units).pair
    lengths = draw(st.lists(st.integers(1, 40), min_size=len(pair), max_size=len(pair)))
    aligned, seen = [], set()
    for number in pair.tolist():
        aligned.append(number not in seen if number >= 0 else draw(st.booleans()))
        seen.add(number)
    return TokenizedExamples.from_ids([([5] * n, [6]) for n in lengths], aligned, pair.tolist())


@quick
@given(steps_of_examples(), budgets, worlds, st.sampled_from(SCOPES), st.sampled_from([(1, 0), (0, 1), (1, 1)]))
def test_positions_of_all_ranks_are_the_whole_step(
    examples: TokenizedExamples, tokens: int, ranks: int, scope: Any, kind: tuple[int, int]
) -> None:
    trains, scores = map(bool, kind)
    layout = BatchLayout(tokens, ranks, scope)
    positions = [
        RankShard(layout, rank, trains, scores).layout_of(examples, NOTHING).positions for rank in range(ranks)
    ]
    assert {position for shard in positions for position in shard} == set(range(len(examples)))
    assert all(shard == sorted(set(shard)) for shard in positions)
    if not (trains and scores):  # each example is forwarded once, by one rank
        assert sum(map(len, positions)) == len(examples)


@quick
@given(steps_of_examples(), budgets, worlds, st.sampled_from(SCOPES))
def test_positions_are_those_of_the_micro_batches(
    examples: TokenizedExamples, tokens: int, ranks: int, scope: Any
) -> None:
    layout = BatchLayout(tokens, ranks, scope)
    trained, scored = layout.training(examples.lengths, examples.units)[0], layout.scoring(examples.lengths)
    for rank in range(ranks):
        flat = [{position for batch in by_rank[rank] for position in batch} for by_rank in (trained, scored)]
        for trains, scores, expected in [
            (True, False, flat[0]),
            (False, True, flat[1]),
            (True, True, flat[0] | flat[1]),
        ]:
            assert set(RankShard(layout, rank, trains, scores).layout_of(examples, NOTHING).positions) == expected


@quick
@given(steps_of_examples(), budgets, worlds, st.sampled_from(SCOPES))
def test_one_pass_only_if_coefficients_depend_on_the_micro_batch_alone(
    examples: TokenizedExamples, tokens: int, ranks: int, scope: Any
) -> None:
    by_rank, streams = BatchLayout(tokens, ranks, scope).training(examples.lengths, examples.units)
    batches = [set(batch) for rank_batches in by_rank for batch in rank_batches]
    if scope == "batch":
        assert not streams
    if scope == "example":
        assert streams
    if streams and scope == "pair":
        assert all(any(set(unit) <= batch for batch in batches) for unit in examples.units)
    assert BatchLayout(tokens, ranks, scope).largest(by_rank, examples.lengths) <= max(tokens, *examples.lengths)


def test_pairs_of_similar_lengths_are_kept_together_and_others_are_not() -> None:
    def together(lengths: list[int]) -> Any:
        return BatchLayout(20, 1, "pair").training(lengths, in_pairs(lengths))[1]

    assert together([10, 10, 9, 9, 8, 8])
    assert not together([10, 1, 10, 1, 10, 1])
    assert not together([15, 15, 15, 15])  # a pair exceeds the budget
