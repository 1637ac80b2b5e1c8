"""stage.json: how far a run has come, which is what resuming depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from raydiv.runs.metrics_log import MetricsLog
from raydiv.utils.errors import UserError
from raydiv.utils.storage import read_json, write_json


@dataclass(frozen=True, slots=True)
class RunStage:
    """The content of stage.json. ``id`` is unique to the run; ``fingerprints`` are those of its data and model.

    The sizes in bytes of metrics.jsonl when training started and when the model was written are None before that.
    ``end_reason`` says why training ended.
    """

    id: str
    fingerprints: dict[str, str]
    metrics_bytes_at_start: int | None = None
    metrics_bytes_at_end: int | None = None
    end_reason: str | None = None
    planned_steps: int | None = None


EARLIER_NAMES = {
    "of": "fingerprints",
    "began": "metrics_bytes_at_start",
    "ended": "metrics_bytes_at_end",
    "why": "end_reason",
    "planned": "planned_steps",
}
"""Keys of stage.json in runs of earlier versions."""


class StageFile:
    """Reads and writes stage.json."""

    def __init__(self, path: Path, metrics: MetricsLog) -> None:
        self._path, self._metrics = path, metrics

    def read(self) -> RunStage:
        """The last stage written. Raises UserError where there is none, as in a run of an earlier version."""
        try:
            return RunStage(**{EARLIER_NAMES.get(key, key): value for key, value in read_json(self._path).items()})
        except (OSError, AttributeError, TypeError, ValueError):
            raise UserError(
                f"{self._path.parent}: no stage.json that says how far the run has come; start a new run (name=...)"
            ) from None

    def write(self, stage: RunStage) -> None:
        write_json(self._path, asdict(stage))

    def training_started(self, planned_steps: int) -> None:
        """Note the start of training. Metrics logged before it are never truncated."""
        self.write(replace(self.read(), metrics_bytes_at_start=self._metrics.size, planned_steps=planned_steps))

    def training_ended(self, reason: str) -> None:
        """Note that training is over and the model is written."""
        self.write(replace(self.read(), metrics_bytes_at_end=self._metrics.size, end_reason=reason))
