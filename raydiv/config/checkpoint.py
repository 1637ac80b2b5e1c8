"""When a run writes checkpoints, which of them are kept, and where."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from raydiv.config.section import Section

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}

Direction = Literal["min", "max"]
"""Which of a metric's values are the better ones."""


class CheckpointConfig(Section):
    """Everything that a run needs to go on as if it had never stopped."""

    every: PositiveInt | str | None = Field(
        default="10min", description="steps, or a time such as 90s, 10min or 2h; null writes none but at SIGTERM"
    )
    keep: PositiveInt = Field(
        default=2, description="newest checkpoints that are kept; the best one is kept beside them"
    )
    best_metric: str | None = Field(
        default=None,
        description="a metric measured during training, such as eval/loss, that says which one is the best",
    )
    mode: Direction = "min"
    final: Literal["last", "best"] = Field(default="last", description="whose weights the run ends with")
    storage: str | None = Field(
        default=None, description="a shared folder, s3:// or gs://, in place of checkpoints/ in the run directory"
    )

    @field_validator("every")
    @classmethod
    def _a_time(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str) and (not (found := DURATION.fullmatch(value.strip())) or not float(found[1])):
            raise ValueError(f"is neither a number of steps nor a time such as 90s, 10min or 2h: {value}")
        return value

    @property
    def seconds(self) -> float | None:
        """Seconds between checkpoints, where they are by time."""
        if not isinstance(self.every, str):
            return None
        found = DURATION.fullmatch(self.every.strip())
        assert found is not None, "checked when it is set"
        return float(found[1]) * SECONDS[found[2]]

    @model_validator(mode="after")
    def _best_of_something(self) -> CheckpointConfig:
        if self.best_metric is None:
            for key in ("mode", "final"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: {getattr(self, key)} needs best_metric: there is nothing to compare")
        return self


class EarlyStopConfig(Section):
    """Stop when a held-out metric has not become better for a while."""

    metric: str = Field(
        default="eval/loss", pattern="^eval/", description="of data.eval, measured every evaluate.every steps"
    )
    mode: Direction = "min"
    patience: PositiveInt = Field(default=3, description="evaluations in a row that are no better")
    min_delta: Annotated[float, Field(ge=0)] = Field(default=0.0, description="less than this is no better")
