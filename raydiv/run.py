"""The run directory: the one place that knows what a run leaves behind, and where.

Everything goes through a path on storage that the driver and the workers share.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydiv.config import Recipe, load_recipe, save_recipe
from raydiv.errors import UserError

Metrics = dict[str, Any]
"""A line of metrics.jsonl: numbers by name, and the name of the divergence."""


def last_values(records: Iterable[Metrics]) -> Metrics:
    """The last value of every metric."""
    found: Metrics = {}
    for record in records:
        found |= record
    return found


def numbers(record: Metrics) -> Metrics:
    """A record without its texts, such as the name of the divergence."""
    return {name: value for name, value in record.items() if isinstance(value, int | float)}


SEPARATION, EVALUATION = "separation", "evaluation"
"""Folders of a run."""


class RunDirectory:
    """``OUTPUT_DIR/NAME``. metrics.jsonl is the record that progress, MLflow and the report are read from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.result = path / "result.json"
        self.report = path / "report.html"
        self.rows = path / "rows.jsonl"
        self.model = path / "model"
        self.separation = path / SEPARATION
        self.evaluation = path / EVALUATION
        self.pictures = path / "pictures"
        self.ray = path / "ray"
        self._layout = path / "layout.json"
        self._rewards = path / "rewards.json"
        self.metrics_file = path / "metrics.jsonl"

    @classmethod
    def of(cls, recipe: Recipe) -> RunDirectory:
        return cls(recipe.output_path / recipe.name)

    @property
    def holds_a_run(self) -> bool:
        return self.recipe.is_file()

    def require_free(self) -> None:
        """Raise UserError when a run is here already."""
        if self.holds_a_run:
            raise UserError(
                f"{self.path}: holds a run already; give this one another name=... or another output_dir=..., "
                "or remove the directory"
            )

    def claim(self, recipe: Recipe) -> None:
        """Make the directory this recipe's, without what an attempt that never got to train may have left."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.metrics_file.unlink(missing_ok=True)
            save_recipe(recipe, self.recipe)
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {error.strerror}") from None

    def note_rows(self, notes: Iterable[dict[str, Any]]) -> None:
        """Write down the rows of the data that were left out or cut; without any there is no file."""
        lines = [json.dumps(note) + "\n" for note in notes]
        if lines:
            self.rows.write_text("".join(lines))

    def note_layout(self, facts: dict[str, Any]) -> None:
        """Write down how the workers lay examples out."""
        self._layout.write_text(json.dumps(facts) + "\n")

    def layout(self) -> dict[str, Any]:
        """What ``note_layout`` wrote."""
        facts: dict[str, Any] = json.loads(self._layout.read_text())
        return facts

    def note_rewards(self, by_class: dict[str, list[float]]) -> None:
        """Write down the held-out examples' rewards, ``aligned`` and ``unaligned``, over an earlier evaluation's."""
        self._rewards.write_text(json.dumps(by_class) + "\n")

    def rewards(self) -> dict[str, list[float]]:
        """What ``note_rewards`` wrote last; empty without held-out examples, or without a reference to count from."""
        by_class: dict[str, list[float]] = json.loads(self._rewards.read_text()) if self._rewards.exists() else {}
        return by_class

    def read_recipe(self) -> Recipe:
        return load_recipe(self.recipe)

    def log(self, record: Metrics) -> None:
        """Append a line to metrics.jsonl; an empty record is none."""
        if record:
            with self.metrics_file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")

    def metrics(self) -> list[Metrics]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]

    def trained(self) -> Metrics:
        """The last value of every metric since training began: what was measured before says nothing of the trained model."""
        return last_values(record for record in self.metrics() if record["step"] > 0)

    def steps_taken(self) -> int:
        """Optimizer updates so far."""
        return max((int(record["step"]) for record in self.metrics()), default=0)

    @contextmanager
    def followed(self, handle: Callable[[Metrics], None]) -> Iterator[None]:
        """Call ``handle`` with each line that metrics.jsonl gets while the block runs, the last ones after it."""
        stop = threading.Event()

        def follow() -> None:
            offset = 0
            while True:
                last = stop.is_set()
                for line in self._lines_from(offset):
                    offset += len(line)
                    handle(json.loads(line))
                if last:
                    return
                time.sleep(0.3)

        follower = threading.Thread(target=follow, name="metrics", daemon=True)
        follower.start()
        try:
            yield
        finally:
            stop.set()
            follower.join()

    def _lines_from(self, offset: int) -> list[bytes]:
        """Whole lines after byte ``offset``."""
        if not self.metrics_file.exists():
            return []
        with self.metrics_file.open("rb") as content:
            content.seek(offset)
            return [line for line in content if line.endswith(b"\n")]
