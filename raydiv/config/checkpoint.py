"""The sections ``checkpoint`` and ``early_stop``."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from raydiv.config.section import Section

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}

Direction = Literal["min", "max"]
"""Whether the smallest or the largest value of a metric is the best."""


class CheckpointConfig(Section):
    """Checkpoints, from which a run resumes as if it had never stopped."""

    every: PositiveInt | str | None = Field(
        default="10min", description="steps, or a time such as 90s, 10min or 2h; null: only at SIGTERM"
    )
    keep: PositiveInt = Field(
        default=2, description="number of newest checkpoints that are kept; the best one is kept as well"
    )
    best_metric: str | None = Field(
        default=None,
        description="metric of training, such as eval/loss, by which the best checkpoint is chosen",
    )
    mode: Direction = "min"
    final: Literal["last", "best"] = Field(default="last", description="checkpoint whose weights become the model")
    storage: str | None = Field(
        default=None, description="a shared folder, s3:// or gs://, instead of checkpoints/ in the run directory"
    )

    @field_validator("every")
    @classmethod
    def _is_interval(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str) and (not (match := DURATION.fullmatch(value.strip())) or not float(match[1])):
            raise ValueError(f"must be a number of steps, or a time such as 90s, 10min or 2h: {value}")
        return value

    @property
    def interval_seconds(self) -> float | None:
        """Seconds between checkpoints; None where ``every`` is in steps."""
        if not isinstance(self.every, str):
            return None
        match = DURATION.fullmatch(self.every.strip())
        assert match is not None, "validated by _is_interval"
        return float(match[1]) * SECONDS[match[2]]

    @model_validator(mode="after")
    def _best_has_metric(self) -> CheckpointConfig:
        if self.best_metric is None:
            for key in ("mode", "final"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: {getattr(self, key)} needs best_metric")
        return self


class EarlyStopConfig(Section):
    """Stop when a held-out metric has not improved for ``patience`` evaluations."""

    metric: str = Field(
        default="eval/loss", pattern="^eval/", description="metric of data.eval, measured every evaluate.every steps"
    )
    mode: Direction = "min"
    patience: PositiveInt = Field(default=3, description="evaluations in a row without an improvement")
    min_delta: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="smallest change that counts as an improvement"
    )
