"""Ray Data: rows mapped over a pool of actors in their order, and rows that tasks read ahead of their consumer.

A row is any Python object that can be pickled. Between processes it is one cell of one column. A UserError travels as a
row too, and is raised where the rows are consumed: Ray would wrap it in a traceback.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.model_pool import end_pool
from raydiv.runtime.resources import Pool, pool_resources
from raydiv.runtime.row_stream import Reader
from raydiv.utils.errors import UserError

BUFFER_BYTES = 256 * 2**20
"""Limit of a pipeline's rows in the object store: its memory does not grow with the data."""


def map_by_actors(
    readers: Sequence[Reader], worker: type, arguments: dict[str, Any], cluster: ClusterConfig
) -> Generator[Any, None, None]:
    """``map_stream`` by a pool: several readers run at a time, in tasks, and there is one actor a CPU.

    The pool of models ends, since its CPUs are needed.
    """
    end_pool()
    pool = pool_resources(cluster, model=False)
    dataset = _read_dataset(readers, concurrency=2 + pool.devices)
    dataset.context.execution_options.resource_limits = ExecutionResources(object_store_memory=BUFFER_BYTES)
    return _map_batches(dataset, worker, arguments, pool, len(readers))


class PrefetchedStream:
    """The rows of ``readers``, read in tasks, in order, about ``prefetch`` rows ahead of the consumer.

    Tasks take seconds to start, so a thread starts them at once, before the first row is consumed.
    """

    def __init__(self, readers: Sequence[Reader], prefetch: int) -> None:
        self._rows = _prefetched_rows(readers, prefetch)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._first = self._executor.submit(lambda: [*islice(self._rows, 1)])

    def __iter__(self) -> Iterator[Any]:
        yield from self._first.result()
        yield from self._rows

    def close(self) -> None:
        """Stop the tasks."""
        self._executor.shutdown()
        self._rows.close()


def _prefetched_rows(readers: Sequence[Reader], prefetch: int) -> Generator[Any, None, None]:
    if readers:
        yield from _iterate_rows(_read_dataset(readers, concurrency=2), batch_size=1, prefetch_batches=prefetch)


def _to_table(rows: Iterable[Any]) -> pa.Table:
    return pa.table({"row": pa.array([pickle.dumps(row, protocol=5) for row in rows], pa.large_binary())})


def _from_table(table: pa.Table) -> list[Any]:
    return [pickle.loads(cell.as_buffer()) for cell in table["row"]]  # noqa: S301 - written by our own tasks


def _map_batches(
    dataset: Dataset, worker: type, arguments: dict[str, Any], pool: Pool, actors: int
) -> Generator[Any, None, None]:
    mapped = dataset.map_batches(
        _PoolWorker,
        fn_constructor_args=(worker, arguments),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=max(1, min(actors, pool.actors))),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        **pool.options,
    )
    try:
        yield from _iterate_rows(mapped, batch_size=None, prefetch_batches=1)
    except (UserError, ray.exceptions.OutOfDiskError):
        raise
    except Exception as error:
        raise RuntimeError(f"{worker.__name__}: {type(error).__name__}: {error}") from error


def _iterate_rows(dataset: Dataset, **options: Any) -> Iterator[Any]:
    """The rows of a data set. Its tasks stop when the iterator is closed. Raises a UserError that a row holds."""
    batches = iter(dataset.iter_batches(batch_format="pyarrow", **options))
    try:
        for batch in batches:
            for row in _from_table(batch):
                if isinstance(row, UserError):
                    raise row
                yield row
    finally:
        getattr(batches, "close", lambda: None)()


def _read_dataset(readers: Sequence[Reader], concurrency: int) -> Dataset:
    """A data set of the readers' rows. Each row is a block, so that its consumer gets it as soon as it is read."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with DataContext.current(context):
        # read tasks reserve no CPU: they run beside actors and workers that reserve all of them
        return ray.data.read_datasource(
            _ReaderDatasource(readers),
            override_num_blocks=len(readers),
            concurrency=min(concurrency, len(readers)),
            num_cpus=0,
        )


class _ReaderDatasource(Datasource):  # type: ignore[misc]
    """One read task for each reader."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = readers

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_ReadFunction(reader), unknown) for reader in self._readers]


class _ReadFunction:
    """The function of a read task: yields one block for each row of the reader."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __call__(self) -> Iterator[pa.Table]:
        try:
            for row in self._reader():
                yield _to_table([row])
        except UserError as error:
            yield _to_table([error])


class _PoolWorker:
    """Calls a worker, which takes and returns lists of rows, with Ray Data's tables."""

    def __init__(self, worker: type, arguments: dict[str, Any]) -> None:
        self._error: UserError | None = None
        if not ray.get_gpu_ids():
            # the actor reserved no GPU, and must not use those that other processes of its node reserved
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        try:
            self._worker = worker(**arguments)
        except UserError as error:
            self._error = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = _from_table(batch)
        error = self._error or next((row for row in rows if isinstance(row, UserError)), None)
        if error is not None:
            return _to_table([error])
        try:
            return _to_table(self._worker(rows))
        except UserError as raised:
            return _to_table([raised])
