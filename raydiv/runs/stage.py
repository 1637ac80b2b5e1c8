"""stage.json: how far a run has come, which is what resuming depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from raydiv.runs.metrics_log import MetricsLog
from raydiv.utils.errors import UserError
from raydiv.utils.storage import read_json, write_json


@dataclass(frozen=True, slots=True)
class RunStage:
    """The content of stage.json.

    ``id`` is unique to the run; ``of`` holds the fingerprints of its data and model. ``began`` and ``ended`` are the
    sizes in bytes of metrics.jsonl at the start of training and after the model was written, None before that. ``why``
    is the reason for the end, ``planned`` the number of steps.
    """

    id: str
    of: dict[str, str]
    began: int | None = None
    ended: int | None = None
    why: str | None = None
    planned: int | None = None


class StageFile:
    """Reads and writes stage.json."""

    def __init__(self, path: Path, metrics: MetricsLog) -> None:
        self._path, self._metrics = path, metrics

    def read(self) -> RunStage:
        """The last stage written. Raises UserError where there is none, as in a run of an earlier version."""
        try:
            return RunStage(**read_json(self._path))
        except (OSError, TypeError, ValueError):
            raise UserError(
                f"{self._path.parent}: no stage.json that says how far the run has come; start a new run (name=...)"
            ) from None

    def write(self, stage: RunStage) -> None:
        write_json(self._path, asdict(stage))

    def training_started(self, planned: int) -> None:
        """Note the start of training of ``planned`` steps. Metrics logged before it are never truncated."""
        self.write(replace(self.read(), began=self._metrics.size, planned=planned))

    def training_ended(self, why: str) -> None:
        """Note that training is over and the model is written."""
        self.write(replace(self.read(), ended=self._metrics.size, why=why))
