"""A pool of actors that hold models. It stays up between measurements, so that each does not start its own.

An actor takes seconds to start and to load a model, as long as many a measurement. So scoring, embedding, answering and
judging share the actors of a session, and an actor keeps its model until it needs another. The pool ends where its
CPUs or GPUs are needed (``end_pool``), and with the session.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.resources import Pool, pool_resources
from raydiv.utils.errors import UserError
from raydiv.utils.kept_model import keep_model
from raydiv.utils.progress import Progress, no_progress

Row = Any
"""Anything that can be pickled."""

CALLS_AHEAD = 2
"""Calls that an actor is given at a time, so that it does not wait for the next one."""

ATTEMPTS = 3
"""Restarts of an actor whose process dies, as for want of memory, and repetitions of its call."""


def map_rows(
    rows: Sequence[Row], worker: type, arguments: dict[str, Any], *, progress: Progress = no_progress, **options: Any
) -> list[Row]:
    """The results of ``map_rows_unordered``, in the order of ``rows``."""
    results: dict[int, Row] = {}
    for position, result in map_rows_unordered(rows, worker, arguments, **options):
        results[position] = result
        progress(len(results), len(rows))
    return [results[position] for position in range(len(rows))]


def map_rows_unordered(
    rows: Sequence[Row],
    worker: type,
    arguments: dict[str, Any],
    *,
    cluster: ClusterConfig,
    batch_rows: int,
    length: Callable[[Row], int] = lambda row: 0,
) -> Iterator[tuple[int, Row]]:
    """Map ``rows`` over the session's pool; yields the position and the result of each row as it is finished.

    Batches hold at most ``batch_rows`` rows, shortest first by ``length``, so that they need little padding.

    ``worker(**arguments)`` is built once in each actor; it is called with a list of rows and returns as many. There is
    one actor a CPU, or a GPU where the recipe uses GPUs. ``cluster.pool_actors`` and the number of batches limit them.

    Raises the worker's UserError, and RuntimeError for another of its errors.
    """
    pool = _session_pool(cluster)
    order = sorted(range(len(rows)), key=lambda position: length(rows[position]))
    size = even_batch(len(order), batch_rows, pool.resources.actors)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    calls = [[rows[position] for position in batch] for batch in batches]
    for number, results in pool.map(calls, worker, arguments):
        yield from zip(batches[number], results, strict=True)


def even_batch(rows: int, most: int, actors: int) -> int:
    """Rows of a batch, at most ``most``, so that the actors that are worth their start get as many batches each.

    An actor is worth it for half a batch.
    """
    actors = min(actors, max(1, rows // max(1, most // 2)))
    batches = -(-rows // most)
    batches += -batches % actors
    return max(1, -(-rows // max(1, batches)))


def end_pool() -> None:
    """End the session's pool, and free its CPUs or GPUs and its memory."""
    while _pools:
        _pools.pop().end()


_pools: list[ModelPool] = []
"""The session's pool; empty before its first map."""


def _session_pool(cluster: ClusterConfig) -> ModelPool:
    pool = pool_resources(cluster, model=True)
    if _pools and _pools[0].resources != pool:
        end_pool()
    if not _pools:
        _pools.append(ModelPool(pool))
    return _pools[0]


class ModelPool:
    """Actors that are started when they are first needed, at most ``resources.actors`` of them."""

    def __init__(self, resources: Pool) -> None:
        self.resources = resources
        self._actors: list[Any] = []
        self._starting: dict[Any, Any] = {}
        """By the reference that is ready once it has started, an actor."""

    def map(
        self, calls: Sequence[list[Any]], worker: type, arguments: dict[str, Any]
    ) -> Iterator[tuple[int, list[Any]]]:
        """Call workers with each list of ``calls``; yields the number and the result of each call as it is finished.

        Actors that wait for resources get no call, since others may use those for hours.
        """
        self._start(min(len(calls), self.resources.actors))
        setup = ray.put((worker, arguments))
        waiting = deque(range(len(calls)))
        running: dict[Any, tuple[int, Any]] = {}
        actors = [actor for actor in self._actors if actor not in self._starting.values()]
        try:
            idle = deque(actor for _ in range(CALLS_AHEAD) for actor in actors)
            while waiting or running:
                while waiting and idle:
                    number, actor = waiting.popleft(), idle.popleft()
                    running[actor.call.remote(setup.hex(), setup, calls[number])] = number, actor
                (done, *_), _ = ray.wait([*running, *(self._starting if waiting else ())], num_returns=1)
                if done in self._starting:
                    ray.get(done)
                    idle.extend([self._starting.pop(done)] * CALLS_AHEAD)
                    continue
                number, actor = running.pop(done)
                idle.append(actor)
                yield number, self._result(done, worker)
        finally:
            if running:  # nobody waits for their results
                self.end()

    def end(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._starting = [], {}

    def _start(self, count: int) -> None:
        pool = self.resources
        # a strategy of its own: without one an actor joins the placement group of the trial that starts it, which holds
        # what the trial's driver needs and no more
        options = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "scheduling_strategy": "DEFAULT"} | pool.options
        actor_type = ray.remote(**options, max_restarts=ATTEMPTS, max_task_retries=ATTEMPTS)(ModelActor)
        for _ in range(count - len(self._actors)):
            actor = actor_type.remote()
            self._actors.append(actor)
            self._starting[actor.started.remote()] = actor

    def _result(self, done: Any, worker: type) -> list[Any]:
        try:
            result: list[Any] | UserError = ray.get(done)
        except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError):
            raise
        except Exception as error:
            cause = getattr(error, "cause", None) or error
            raise RuntimeError(f"{worker.__name__}: {type(cause).__name__}: {cause}") from error
        if isinstance(result, UserError):
            raise result
        return result


class ModelActor:
    """Builds the worker of each map, and calls it. A UserError is returned: Ray would wrap it in a traceback."""

    def __init__(self) -> None:
        keep_model()
        self._key = ""
        self._worker: Callable[[list[Any]], list[Any]] | None = None
        if not ray.get_gpu_ids():
            # the actor reserved no GPU, and must not use those that other processes of its node reserved
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def started(self) -> None:
        """Returns once the process runs."""

    def call(self, key: str, setup: tuple[type, dict[str, Any]], rows: list[Any]) -> list[Any] | UserError:
        """The results of the worker ``setup``, which is built unless it is that of the last call (``key``)."""
        try:
            if key != self._key:
                self._key, self._worker = "", None  # the last worker's model goes before another is loaded
                worker, arguments = setup
                self._worker = worker(**arguments)
                self._key = key
            assert self._worker is not None
            return list(self._worker(rows))
        except UserError as error:
            return error
