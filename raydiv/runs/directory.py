"""The run directory: the one place that knows which files a run has and where they are.

Its path is on storage that the driver and all workers share.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raydiv.config import Recipe, save_recipe
from raydiv.runs.events import EventLog
from raydiv.runs.heartbeat import HeartbeatFolder
from raydiv.runs.metrics_log import MetricsLog
from raydiv.runs.output_directory import OutputDirectory
from raydiv.runs.stage import RunStage, StageFile
from raydiv.utils.errors import UserError
from raydiv.utils.storage import Folder

PROBE = ".writable"

SEPARATION, EVALUATION = "separation", "evaluation"
"""Folders of a run."""


class RunDirectory(OutputDirectory):
    """The files of a run, and its metrics, events, heartbeats and stage."""

    kind = "run"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.result = path / "result.json"
        self.rows = path / "rows.jsonl"
        self.model = path / "model"
        self.separation = path / SEPARATION
        self.evaluation = path / EVALUATION
        self.ray = path / "ray"
        self.profile = path / "profile"
        self.mlflow = path / "mlflow.json"
        self.layout = path / "layout.json"
        """How the workers lay out examples."""
        self.rewards = path / "rewards.json"
        """Rewards of held-out examples, ``aligned`` and ``unaligned``; missing without those or a reference."""
        self.depth_reference = path / "depth-reference.json"
        """Log-probs of the tokens of held-out examples before training; missing without evaluate.depth_every."""
        self.metrics = MetricsLog(path / "metrics.jsonl")
        self.events = EventLog(path / "events.jsonl")
        self.heartbeats = HeartbeatFolder(path / "workers")
        self.stage = StageFile(path / "stage.json", self.metrics)
        self._stop = path / "stop"

    @property
    def holds_a_run(self) -> bool:
        return self.recipe.is_file()

    def create(self, recipe: Recipe, fingerprints: Mapping[str, str]) -> None:
        """Start a new run of ``recipe``, with the ``fingerprints`` of its data and model.

        Removes what an attempt left that stopped before recipe.yaml was written. Raises UserError where the directory
        cannot be written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in (self.metrics.path, self.result, self.mlflow, self.events.path, self.rewards):
                path.unlink(missing_ok=True)
            self._require_free_storage(recipe)
            self.stage.write(RunStage(uuid.uuid4().hex, dict(fingerprints)))
            self.start_attempt(recipe)
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {error.strerror}") from None

    def _require_free_storage(self, recipe: Recipe) -> None:
        """Remove checkpoints in the run's own directory. Raises UserError for those on ``checkpoint.storage``."""
        folder = self.checkpoints(recipe)
        if recipe.checkpoint.storage is None:
            folder.remove()
        elif folder.folder_names():
            raise UserError(
                f"checkpoint.storage: {folder.uri} holds another run's checkpoints; set another name, or remove them"
            )

    def start_attempt(self, recipe: Recipe) -> None:
        """Write the recipe of this attempt, and remove the stop flag and Ray's files of the one before.

        Raises UserError where checkpoints cannot be written.
        """
        _require_writable(self.checkpoints(recipe))
        self._stop.unlink(missing_ok=True)
        shutil.rmtree(self.ray, ignore_errors=True)
        save_recipe(recipe, self.recipe)

    def request_stop(self) -> None:
        """Ask the workers to write a checkpoint after this step, and to stop."""
        self._stop.touch()

    @property
    def stop_requested(self) -> bool:
        return self._stop.exists()

    def checkpoints(self, recipe: Recipe) -> Folder:
        """The folder of the run's checkpoints."""
        storage = recipe.checkpoint.storage
        if storage is None:
            return Folder(str(self.path / "checkpoints"))
        return Folder(storage.rstrip("/")).subfolder(recipe.name)

    def remove_checkpoints(self) -> None:
        if self.holds_a_run:
            self.checkpoints(self.read_recipe()).remove()

    def write_row_notes(self, notes: Iterable[dict[str, Any]]) -> None:
        """Write rows.jsonl, the rows of the data that were dropped or truncated; without any there is no file."""
        lines = [json.dumps(note) + "\n" for note in notes]
        if lines:
            self.rows.write_text("".join(lines))


def _require_writable(checkpoints: Folder) -> None:
    """Raise UserError where no checkpoint can be written, which training would only warn of."""
    try:
        checkpoints.write(PROBE, b"")
        checkpoints.remove_file(PROBE)
    except OSError as error:
        raise UserError(
            f"checkpoint.storage: {checkpoints.uri} cannot be written: {error.strerror or error}; make it writable, or "
            "name another folder"
        ) from None
