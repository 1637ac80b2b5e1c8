"""Ray Data: rows through pools of actors, in the same order, and rows that tasks make ahead of their reader.

A row is any Python object that pickles; between processes it is one cell of one column. A UserError travels as a row too, and
is raised where rows are read: Ray would wrap it in its own words.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.resources import Pool, pool_resources
from raydiv.utils.errors import UserError

Row = dict[str, Any]
Progress = Callable[[int, int | None], None]
"""Told how many rows are done, and of how many (None: not known)."""

BUFFERED_BYTES = 256 * 2**20
"""Object store that rows between a reader and a pool may take: what bounds the memory of a pipeline, not its data's size."""


def no_progress(done: int, total: int | None) -> None:
    """The progress of whom nobody watches."""


def map_rows(
    rows: Sequence[Row], worker: type, arguments: dict[str, Any], *, progress: Progress = no_progress, **options: Any
) -> list[Row]:
    """What ``each_row`` gives, all of it, in the order of ``rows``."""
    done: dict[int, Row] = {}
    for position, row in map_rows_unordered(rows, worker, arguments, **options):
        done[position] = row
        progress(len(done), len(rows))
    return [done[position] for position in range(len(rows))]


def map_rows_unordered(
    rows: Sequence[Row],
    worker: type,
    arguments: dict[str, Any],
    *,
    cluster: ClusterConfig,
    batch_rows: int,
    model: bool = True,
    length: Callable[[Row], int] = lambda row: 0,
) -> Iterator[tuple[int, Row]]:
    """Send ``rows`` through a pool of ``worker`` actors in batches of ``batch_rows``; the position and result of each, as done.

    Rows are sent shortest first by their ``length``, so that a batch pads little.

    ``worker(**arguments)`` is built once per actor and called with a list of rows; it returns as many. One actor a CPU,
    or a GPU where the recipe uses GPUs and the worker holds a ``model``, unless ``cluster.pool_actors`` says fewer; never more
    than there are batches.
    """
    batches = -(-len(rows) // batch_rows)
    order = sorted(range(len(rows)), key=lambda position: length(rows[position]))
    cells = _cells((position, rows[position]) for position in order)
    source = ray.data.from_arrow(cells, override_num_blocks=max(1, batches))
    placed = (_Placed, {"worker": worker, "arguments": arguments})
    return _through(source, *placed, pool_resources(cluster, model), batch_rows, actors=batches)


def map_stream(
    makers: Sequence[Callable[[], Iterable[Any]]],
    worker: type,
    arguments: dict[str, Any],
    *,
    cluster: ClusterConfig,
    model: bool = True,
    actors: int | None = None,
) -> Generator[Any, None, None]:
    """Rows that ``makers`` make, each through a pool of ``worker`` actors alone, in order; memory does not grow with them.

    The makers run in tasks of their own, several at a time; ``worker(**arguments)`` is called with a list of one row.
    """
    pool = pool_resources(cluster, model)
    source = _made(makers, at_once=2 + pool.devices)
    source.context.execution_options.resource_limits = ExecutionResources(object_store_memory=BUFFERED_BYTES)
    return _through(source, worker, arguments, pool, 1, actors=actors or len(makers))


class PrefetchedStream:
    """Rows that ``makers`` make in tasks of their own, in order, about ``ahead`` of them before they are asked for.

    Tasks take seconds to start. They do so at once, aside, and not when the first row is asked for.
    """

    def __init__(self, makers: Sequence[Callable[[], Iterable[Any]]], ahead: int) -> None:
        self._rows = _ahead(makers, ahead)
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._first = self._aside.submit(lambda: [*islice(self._rows, 1)])

    def __iter__(self) -> Iterator[Any]:
        yield from self._first.result()
        yield from self._rows

    def close(self) -> None:
        """Stop making rows."""
        self._aside.shutdown()
        self._rows.close()


def _ahead(makers: Sequence[Callable[[], Iterable[Any]]], ahead: int) -> Generator[Any, None, None]:
    if makers:
        yield from _read(_made(makers, at_once=2), batch_size=1, prefetch_batches=ahead)


def _cells(rows: Iterable[Any]) -> pa.Table:
    return pa.table({"row": pa.array([pickle.dumps(row) for row in rows], pa.large_binary())})


def _objects(cells: pa.Table) -> list[Any]:
    return [pickle.loads(cell) for cell in cells["row"].to_pylist()]  # noqa: S301 - written by our own tasks


def _through(
    source: Dataset,
    worker: type,
    arguments: dict[str, Any],
    pool: Pool,
    batch_rows: int,
    *,
    actors: int,
) -> Generator[Any, None, None]:
    mapped = source.map_batches(
        _Worker,
        fn_constructor_args=(worker, arguments),
        batch_size=batch_rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=max(1, min(actors, pool.actors))),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        **pool.options,
    )
    try:
        yield from _read(mapped, batch_size=None, prefetch_batches=1)
    except (UserError, ray.exceptions.OutOfDiskError):
        raise
    except Exception as error:
        raise RuntimeError(f"{worker.__name__}: {type(error).__name__}: {error}") from error


def _read(data: Dataset, **options: Any) -> Iterator[Any]:
    """The rows of a data set, which stops being worked on when nobody reads on."""
    batches = iter(data.iter_batches(batch_format="pyarrow", **options))
    try:
        for batch in batches:
            for row in _objects(batch):
                if isinstance(row, UserError):
                    raise row
                yield row
    finally:
        getattr(batches, "close", lambda: None)()


def _made(makers: Sequence[Callable[[], Iterable[Any]]], at_once: int) -> Dataset:
    """A data set of the rows that makers make. Each row is a block, so that a reader gets it as soon as it is made."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with DataContext.current(context):
        # tasks that read reserve no CPU: they must run beside actors and workers that hold all of them
        return ray.data.read_datasource(
            _Makers(makers), override_num_blocks=len(makers), concurrency=min(at_once, len(makers)), num_cpus=0
        )


class _Makers(Datasource):  # type: ignore[misc]
    """Ray Data's view of makers: one read task each."""

    def __init__(self, makers: Sequence[Callable[[], Iterable[Any]]]) -> None:
        self._makers = makers

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_Cells(maker), unknown) for maker in self._makers]


class _Cells:
    """What a read task calls: a block for each row that the maker makes."""

    def __init__(self, maker: Callable[[], Iterable[Any]]) -> None:
        self._maker = maker

    def __call__(self) -> Iterator[Any]:
        try:
            for row in self._maker():
                yield _cells([row])
        except UserError as error:
            yield _cells([error])


class _Worker:
    """Adapter between Ray Data's columns and a worker's lists of rows."""

    def __init__(self, worker: type, arguments: dict[str, Any]) -> None:
        self._error: UserError | None = None
        if not ray.get_gpu_ids():
            # it reserved none, and would find those of others on a node that has some
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        try:
            self._worker = worker(**arguments)
        except UserError as error:
            self._error = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = _objects(batch)
        error = self._error or next((row for row in rows if isinstance(row, UserError)), None)
        if error is not None:
            return _cells([error])
        try:
            return _cells(self._worker(rows))
        except UserError as raised:
            return _cells([raised])


class _Placed:
    """A worker whose rows carry their position."""

    def __init__(self, worker: type, arguments: dict[str, Any]) -> None:
        self._worker = worker(**arguments)

    def __call__(self, rows: list[tuple[int, Row]]) -> list[tuple[int, Row]]:
        done = self._worker([row for _, row in rows])
        return [(position, row) for (position, _), row in zip(rows, done, strict=True)]
