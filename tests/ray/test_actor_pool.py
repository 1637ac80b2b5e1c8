"""Rows through tasks and actors of Ray: their order, and UserErrors wherever they are raised."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.actor_pool import PrefetchedStream
from raydiv.runtime.model_pool import end_pool, even_batch, map_rows
from raydiv.runtime.row_stream import map_stream
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError

pytestmark = pytest.mark.slow

Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import it
    with ray_session(ClusterConfig()):
        yield
    ray.cloudpickle.unregister_pickle_by_value(module)


def count(start: int, stop: int, wrong: int | None = None) -> Iterator[int]:
    for number in range(start, stop):
        if number == wrong:
            raise UserError(f"file:{number}: change it")
        yield number


class Doubles:
    """Doubles numbers, or rows of one number. Raises a UserError at the number ``wrong``, or when it is built."""

    def __init__(self, wrong: Any = None, built: bool = True) -> None:
        if not built:
            raise UserError("model.id: change it")
        self._wrong = wrong

    def __call__(self, rows: list[Any]) -> list[Any]:
        if self._wrong in rows or {"n": self._wrong} in rows:
            raise UserError(f"file:{self._wrong}: change it")
        return [{"n": 2 * row["n"]} if isinstance(row, dict) else 2 * row for row in rows]


class Breaks:
    def __call__(self, rows: list[Any]) -> list[Any]:
        raise KeyError("a bug")


def readers(wrong: int | None = None) -> list[Any]:
    return [functools.partial(count, start, start + 5, wrong) for start in range(0, 20, 5)]


def test_rows_keep_the_order_of_their_readers() -> None:
    rows = map_stream(readers(), Doubles, {}, cluster=ClusterConfig())
    assert list(rows) == [2 * number for number in range(20)]
    assert list(PrefetchedStream(readers(), prefetch=3)) == list(range(20))


def test_results_have_the_order_of_the_rows_whatever_their_length() -> None:
    rows = [{"n": number} for number in (5, 3, 8, 1, 9, 2, 7)]
    reported: list[tuple[int, int | None]] = []
    results = map_rows(
        rows,
        Doubles,
        {},
        cluster=ClusterConfig(),
        batch_rows=2,
        length=lambda row: int(row["n"]),
        progress=lambda done, total, note="": reported.append((done, total)),
    )
    assert results == [{"n": 2 * row["n"]} for row in rows]
    assert reported == [(number, 7) for number in range(1, 8)]


@pytest.mark.parametrize("where", ["maker", "call", "construction", "map"])
def test_a_user_error_arrives_unchanged_and_without_a_traceback(where: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments: Row = {"call": {"wrong": 7}, "map": {"wrong": 7}, "construction": {"built": False}}.get(where, {})
    stream = readers(7 if where == "maker" else None)

    def work() -> None:
        if where == "map":
            map_rows([{"n": 7}], Doubles, arguments, cluster=ClusterConfig(), batch_rows=1)
        else:
            list(map_stream(stream, Doubles, arguments, cluster=ClusterConfig()))

    with pytest.raises(UserError) as caught:
        work()
    assert str(caught.value) == ("model.id: change it" if where == "construction" else "file:7: change it")
    assert "Traceback" not in capfd.readouterr().err


def test_other_failures_name_their_worker() -> None:
    with pytest.raises(RuntimeError, match=r"^Breaks: (.|\n)*a bug"):
        list(map_stream(readers(), Breaks, {}, cluster=ClusterConfig()))


class Process:
    """Tells its process. At the row ``dies`` it ends once, the first time that the ``marker`` file is missing."""

    def __init__(self, name: str, dies: int | None = None, marker: str = "") -> None:
        self._name, self._dies, self._marker = name, dies, Path(marker)

    def __call__(self, rows: list[int]) -> list[tuple[str, int]]:
        if self._dies in rows and not self._marker.exists():
            self._marker.touch()
            os._exit(1)
        return [(self._name, os.getpid()) for _ in rows]


def processes(rows: int, name: str = "any", **arguments: Any) -> list[int]:
    cluster = ClusterConfig(pool_actors=2)
    results = map_rows(list(range(rows)), Process, {"name": name, **arguments}, cluster=cluster, batch_rows=1)
    assert [told for told, _ in results] == [name] * rows
    return [process for _, process in results]


def test_jobs_of_a_local_session_find_its_ray() -> None:
    """Ray's jobs resolve "auto" by this file, and without it join any Ray of the machine."""
    folder = Path(ray._private.worker.global_worker.node.get_temp_dir_path())
    assert (folder / "ray_current_cluster").read_text() == ray.get_runtime_context().gcs_address


def test_workers_have_the_priority_of_the_process_that_starts_ray() -> None:
    """At Ray's niceness of 15 they stand still beside another program."""

    @ray.remote(num_cpus=0)
    def niceness() -> int:
        return os.nice(0)

    assert ray.get(niceness.remote()) == os.nice(0)


def test_maps_share_actors_until_the_pool_ends() -> None:
    end_pool()
    first = set(processes(1))
    assert len(first) == 1
    second = set(processes(8, "another"))
    end = time.monotonic() + 60
    while len(second) == 1 and time.monotonic() < end:  # the second actor is starting
        second |= set(processes(8))
    assert first < second
    assert len(second) == 2
    assert set(processes(8)) <= second
    list(map_stream(readers(), Doubles, {}, cluster=ClusterConfig()))  # takes the CPUs of the pool
    assert not second & set(processes(8))
    end_pool()
    for _ in range(100):
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the pool's CPUs are not free")


def test_the_call_of_an_actor_that_dies_is_repeated(tmp_path: Path) -> None:
    assert len(processes(9, dies=5, marker=str(tmp_path / "died"))) == 9
    assert (tmp_path / "died").exists()


def test_an_actor_that_waits_for_resources_gets_no_rows() -> None:
    end_pool()
    holder = ray.remote(num_cpus=ray.cluster_resources()["CPU"] - 1)(Process).remote("holder")
    ray.get(holder.__call__.remote([1]))
    try:
        assert len(set(processes(8))) == 1
    finally:
        ray.kill(holder)


def test_an_error_ends_the_calls_that_nobody_waits_for() -> None:
    with pytest.raises(RuntimeError, match=r"^Breaks: KeyError: 'a bug'"):
        map_rows(list(range(20)), Breaks, {}, cluster=ClusterConfig(), batch_rows=1)
    assert len(processes(4)) == 4


def test_a_pool_inside_a_trial_leaves_its_placement_group() -> None:
    """A trial of Ray Tune is an actor of a placement group that holds its driver alone, and captures what it starts."""
    group = ray.util.placement_group([{"memory": 1}])
    ray.get(group.ready())
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
        group, placement_group_capture_child_tasks=True
    )

    @ray.remote(num_cpus=0, memory=1, scheduling_strategy=strategy)
    def trial() -> list[Any]:
        try:
            return list(map_rows([1, 2, 3], Doubles, {}, cluster=ClusterConfig(), batch_rows=2))
        finally:
            end_pool()

    end_pool()
    try:
        assert ray.get(trial.remote(), timeout=120) == [2, 4, 6]
    finally:
        ray.util.remove_placement_group(group)


@pytest.mark.parametrize(
    ("rows", "most", "actors", "batches"),
    [
        (48, 32, 2, [24, 24]),
        (200, 32, 2, [25] * 8),
        (32, 32, 2, [16, 16]),
        (17, 32, 8, [17]),
        (16, 32, 2, [16]),
        (3, 1, 2, [1] * 3),
        (0, 32, 2, []),
    ],
)
def test_batches_are_even_over_the_actors(rows: int, most: int, actors: int, batches: list[int]) -> None:
    size = even_batch(rows, most, actors)
    assert [min(size, rows - start) for start in range(0, rows, size)] == batches
