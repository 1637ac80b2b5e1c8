"""The state of the training loop besides weights and moments; checkpoints hold it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from raydiv.config.checkpoint import EarlyStopConfig
from raydiv.losses import State
from raydiv.training.metrics import RunningMeans


@dataclass
class EarlyStopping:
    """State of ``optim.early_stop``: the best value so far, and how many evaluations in a row were no better."""

    best: float | None = None
    waited: int = 0

    def update(self, section: EarlyStopConfig, value: float) -> bool:
        """Include an evaluation; returns whether to stop."""
        gain = 0.0 if self.best is None else (self.best - value) * (1 if section.mode == "min" else -1)
        if self.best is None or gain > section.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= section.patience


@dataclass
class TrainState:
    """State of the loop, the same on every rank.

    ``refused`` counts the steps that were not finite; ``end_reason`` is None while training goes on.
    """

    means: RunningMeans = field(default_factory=RunningMeans)
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    refused: int = 0
    end_reason: str | None = None

    def as_json(self, states: list[State], logged: int) -> dict[str, Any]:
        """With the running ``states`` of the loss, and the ``logged`` bytes of metrics.jsonl."""
        return {
            "means": asdict(self.means),
            "patience": asdict(self.early_stopping),  # the key in existing checkpoints
            "refused": self.refused,
            "ended": self.end_reason,
            "states": states,
            "logged": logged,
        }

    @classmethod
    def from_json(cls, loop: dict[str, Any]) -> TrainState:
        return cls(
            RunningMeans(**loop["means"]), EarlyStopping(**loop["patience"]), int(loop["refused"]), loop["ended"]
        )
