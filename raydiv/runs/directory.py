"""The run directory: the one place that knows what a run leaves behind, and where.

Everything goes through a path on storage that the driver and the workers share.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raydiv.config import Recipe, load_recipe, save_recipe
from raydiv.runs.heartbeat import Heartbeat
from raydiv.utils.errors import UserError
from raydiv.utils.jsonl import JsonlTail, follow
from raydiv.utils.storage import Folder, atomic

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


PROBE = ".writable"

ExamplePlace = tuple[int, int, int]
"""Of an example: the source of data.train, its file, and the position in that."""

SEPARATION, EVALUATION = "separation", "evaluation"
"""Folders of a run."""


@dataclass(frozen=True, slots=True)
class RunStage:
    """How far a run has come, by what it needs to go on.

    ``id`` tells it from every other run; ``of`` are the fingerprints of its data and model. ``began`` and ``ended``: bytes of
    metrics.jsonl when training began, and when its model was written; None before that. ``why`` it ended. ``planned``: steps.
    """

    id: str
    of: dict[str, str]
    began: int | None = None
    ended: int | None = None
    why: str | None = None
    planned: int | None = None


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
        self.profile = path / "profile"
        self._layout = path / "layout.json"
        self._rewards = path / "rewards.json"
        self._stage = path / "stage.json"
        self._stop = path / "stop"
        self.mlflow = path / "mlflow.json"
        self.events = path / "events.jsonl"
        self._workers = path / "workers"
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
                f"{self.path}: holds a run already; go on with it (--resume), give this one another name=... or another "
                "output_dir=..., or remove the directory"
            )

    def create(self, recipe: Recipe, of: Mapping[str, str]) -> None:
        """Make the directory a new run's, without what an attempt that never got to train may have left.

        ``of``: fingerprints of its data and model.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for left in (self.metrics_file, self.result, self.mlflow, self.events, self._rewards):
                left.unlink(missing_ok=True)
            self._free_storage(recipe)
            self.set_stage(RunStage(uuid.uuid4().hex, dict(of)))
            self.start_attempt(recipe)
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {error.strerror}") from None

    def _free_storage(self, recipe: Recipe) -> None:
        folder = self.checkpoints(recipe)
        if recipe.checkpoint.storage is None:
            folder.remove()
        elif folder.folders():
            raise UserError(
                f"checkpoint.storage: {folder.uri} holds another run's checkpoints; give this one another name=..., or "
                "remove them"
            )

    @staticmethod
    def _require_writable(checkpoints: Folder) -> None:
        """Raise UserError where no checkpoint can be written: later that would be a warning, too late."""
        try:
            checkpoints.write(PROBE, b"")
            checkpoints.remove_file(PROBE)
        except OSError as error:
            raise UserError(
                f"checkpoint.storage: {checkpoints.uri} cannot be written: {error.strerror or error}; make it writable, or "
                "name another place"
            ) from None

    def start_attempt(self, recipe: Recipe) -> None:
        """Write down the recipe that an attempt trains by, and let go of what the one before it used.

        Raises UserError where its checkpoints cannot be written.
        """
        self._require_writable(self.checkpoints(recipe))
        self._stop.unlink(missing_ok=True)
        shutil.rmtree(self.ray, ignore_errors=True)
        save_recipe(recipe, self.recipe)

    def set_stage(self, stage: RunStage) -> None:
        with atomic(self._stage) as temporary:
            temporary.write_text(json.dumps(asdict(stage)) + "\n")

    def stage(self) -> RunStage:
        """What ``note_stage`` wrote last. Raises UserError where nothing did, as in a run of an earlier raydiv."""
        try:
            return RunStage(**json.loads(self._stage.read_text()))
        except (OSError, TypeError, ValueError):
            raise UserError(f"{self.path}: has no stage.json that says how far it came; begin another run") from None

    def training_started(self, planned: int) -> None:
        """Training of so many steps begins: what is in metrics.jsonl stays, wherever training goes on from."""
        self.set_stage(replace(self.stage(), began=self.metrics_bytes, planned=planned))

    def training_ended(self, why: str) -> None:
        """The model is written, and training over."""
        self.set_stage(replace(self.stage(), ended=self.metrics_bytes, why=why))

    def request_stop(self) -> None:
        """Ask the workers for a checkpoint, and to end after it."""
        self._stop.touch()

    @property
    def stop_requested(self) -> bool:
        return self._stop.exists()

    def checkpoints(self, recipe: Recipe) -> Folder:
        """Where the run keeps its checkpoints."""
        storage = recipe.checkpoint.storage
        if storage is None:
            return Folder(str(self.path / "checkpoints"))
        return Folder(storage.rstrip("/")).inside(recipe.name)

    def write_row_notes(self, notes: Iterable[dict[str, Any]]) -> None:
        """Write down the rows of the data that were left out or cut; without any there is no file."""
        lines = [json.dumps(note) + "\n" for note in notes]
        if lines:
            self.rows.write_text("".join(lines))

    def write_layout(self, facts: dict[str, Any]) -> None:
        """Write down how the workers lay examples out."""
        self._layout.write_text(json.dumps(facts) + "\n")

    def read_layout(self) -> dict[str, Any]:
        """What ``note_layout`` wrote."""
        facts: dict[str, Any] = json.loads(self._layout.read_text())
        return facts

    def write_rewards(self, by_class: dict[str, list[float]]) -> None:
        """Write down the held-out examples' rewards, ``aligned`` and ``unaligned``, over an earlier evaluation's."""
        self._rewards.write_text(json.dumps(by_class) + "\n")

    def read_rewards(self) -> dict[str, list[float]]:
        """What ``note_rewards`` wrote last; empty without held-out examples, or without a reference to count from."""
        by_class: dict[str, list[float]] = json.loads(self._rewards.read_text()) if self._rewards.exists() else {}
        return by_class

    def read_recipe(self) -> Recipe:
        return load_recipe(self.recipe)

    def log_metrics(self, record: Metrics) -> None:
        """Append a line to metrics.jsonl; an empty record is none."""
        if record:
            with self.metrics_file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")

    def remove_checkpoints(self) -> None:
        """Remove them all: the run needs none any more."""
        if self.holds_a_run:
            self.checkpoints(self.read_recipe()).remove()

    @property
    def metrics_bytes(self) -> int:
        """Bytes of metrics.jsonl."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    def truncate_metrics(self, size: int) -> None:
        """Take metrics.jsonl back to its first ``size`` bytes: what followed them is done again.

        It becomes another file, by which whoever follows it knows.
        """
        if self.metrics_bytes > size:
            with atomic(self.metrics_file) as temporary, self.metrics_file.open("rb") as content:
                temporary.write_bytes(content.read(size))

    def log_event(self, message: str, examples: Sequence[ExamplePlace] = ()) -> None:
        """Say something to whoever follows the run, from any worker; of ``examples``, if of any."""
        with self.events.open("a") as lines:
            lines.write(
                json.dumps({"time": round(time.time(), 3), "message": message, "examples": list(examples)}) + "\n"
            )

    def clear_heartbeats(self) -> None:
        """Those of workers that are no more."""
        shutil.rmtree(self._workers, ignore_errors=True)
        self._workers.mkdir(parents=True)

    def write_heartbeat(self, beat: Heartbeat) -> None:
        with atomic(self._workers / f"{beat.rank}.json") as temporary:
            temporary.write_text(json.dumps(asdict(beat)) + "\n")

    def heartbeats(self) -> list[Heartbeat]:
        """The last beat of every training worker, by rank."""
        # by the times of the files, which are one clock's: those of nodes differ
        found = [(path.stat().st_mtime, json.loads(path.read_text())) for path in self._workers.glob("*.json")]
        newest = max((written for written, _ in found), default=0.0)
        beats = [Heartbeat(**beat | {"silent": round(newest - written, 3)}) for written, beat in found]
        return sorted(beats, key=lambda beat: beat.rank)

    def seconds_since_heartbeat(self) -> float:
        """Seconds since any worker of the last start said something; infinite where none did."""
        beats = []
        for path in self._workers.glob("*.json"):
            with suppress(FileNotFoundError):  # another start forgets them
                beats.append(path.stat().st_mtime)
        return time.time() - max(beats, default=-math.inf)

    def claim_report(self, what: str) -> bool:
        """Whether no other worker was asked this before."""
        try:
            (self._workers / what).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def read_metrics(self) -> list[Metrics]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]

    def trained_metrics(self) -> Metrics:
        """The last value of every metric since training began: what was measured before says nothing of the trained model."""
        return last_values(record for record in self.read_metrics() if record["step"] > 0)

    def steps_taken(self) -> int:
        """Optimizer updates so far."""
        return max((int(record["step"]) for record in self.read_metrics()), default=0)

    def follow_metrics(self, handle: Callable[[Metrics], None], skip: int = 0) -> AbstractContextManager[None]:
        """Call ``handle`` with each line that metrics.jsonl gets while the block runs, the last ones after it.

        Not with the first ``skip`` lines, and with each line once: what is written again after ``rewind`` is the same.
        """
        return follow(JsonlTail(self.metrics_file, skip), handle)

    def follow_events(
        self, say: Callable[[str], None], where: Callable[[ExamplePlace], str]
    ) -> AbstractContextManager[None]:
        """Hand on what workers ``tell`` while the block runs; ``where`` names the place of an example."""
        told = self.events.read_bytes().count(b"\n") if self.events.exists() else 0

        def hand_on(event: Mapping[str, Any]) -> None:
            places = ", ".join(where(tuple(place)) for place in event["examples"])
            say(f"{event['message']}{f' ({places})' if places else ''}")

        return follow(JsonlTail(self.events, told), hand_on)
