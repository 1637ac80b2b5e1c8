"""metrics.jsonl: a line for each logged step. The progress bar, MLflow, Prometheus and the report read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from raydiv.utils.jsonl import JsonlTail, append_record, follow, read_records
from raydiv.utils.storage import atomic

Metrics = dict[str, Any]
"""A line of metrics.jsonl: numbers by name, and the name of the divergence."""


def last_values(records: Iterable[Metrics]) -> Metrics:
    """The last value of every metric."""
    values: Metrics = {}
    for record in records:
        values |= record
    return values


def numbers(record: Metrics) -> Metrics:
    """The numeric metrics of a record: without texts, such as the name of the divergence."""
    return {name: value for name, value in record.items() if isinstance(value, int | float)}


class MetricsLog:
    """The metrics of a run. Rank 0 appends those of training, the driver those before and after; the driver follows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Metrics) -> None:
        """Append a line, unless ``record`` is empty."""
        if record:
            append_record(self.path, record)

    def read(self) -> list[Metrics]:
        """All lines."""
        return read_records(self.path)

    def trained_values(self) -> Metrics:
        """The last value of every metric since training began, without those measured of the base model."""
        return last_values(record for record in self.read() if record["step"] > 0)

    def steps_taken(self) -> int:
        """Steps so far, with those that were refused."""
        return max((int(record["step"]) for record in self.read()), default=0)

    @property
    def size(self) -> int:
        """Bytes of the file; 0 where there is none."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Keep the first ``size`` bytes: the steps of the lines after them are repeated.

        The file is replaced by another one, so that followers notice.
        """
        if self.size > size:
            with atomic(self.path) as temporary, self.path.open("rb") as content:
                temporary.write_bytes(content.read(size))

    def follow(self, handle: Callable[[Metrics], None], skip: int = 0) -> AbstractContextManager[None]:
        """Call ``handle`` once with each line from number ``skip`` on, while the block runs and at its end.

        A line that is written again after ``truncate`` is the same line, and is not handled twice.
        """
        return follow(JsonlTail(self.path, skip), handle)
