"""A cell of a study: the metrics of one trained run, or of a model without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite

BASE = "none"
"""The loss of a base cell."""

NO_DATA = "-"
"""The data of a base cell."""

Key = tuple[str, str, str]
"""Model, data and loss."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A model trained on ``data`` with ``loss``: its metrics after and before training, by the names that runs log.

    ``where`` is the path or the MLflow name of its run. A base cell is a model without training: its loss is BASE, its
    data NO_DATA, its seed 0, and ``metrics`` equals ``before``.
    """

    model: str
    data: str
    loss: str
    seed: int
    metrics: Mapping[str, float]
    before: Mapping[str, float]
    where: str

    @property
    def is_base(self) -> bool:
        return self.loss == BASE

    @property
    def key(self) -> Key:
        """Model, data and loss: equal for the runs that differ only in their seed."""
        return self.model, self.data, self.loss


def trained_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The cells without the base cells."""
    return [cell for cell in cells if not cell.is_base]


def baseline_cells(cells: Sequence[Cell]) -> list[Cell]:
    """A base cell for each model: the mean over its cells of each metric from before training.

    The cells of a model share one cached measurement of it, so the mean only joins their metrics.
    """
    base_cells = []
    for model in dict.fromkeys(cell.model for cell in cells):
        before = [cell.before for cell in cells if cell.model == model]
        names = dict.fromkeys(name for metrics in before for name in metrics)
        means = {name: _mean([metrics[name] for metrics in before if name in metrics]) for name in names}
        base_cells.append(Cell(model, NO_DATA, BASE, 0, means, means, ""))
    return base_cells


def grouped_cells(cells: Sequence[Cell]) -> dict[Key, list[Cell]]:
    """The cells by model, data and loss, those of one key in the order of their seeds.

    Models, data and losses are in the order of their first appearance, and a model's base cell comes before its other
    cells.
    """
    models = list(dict.fromkeys(cell.model for cell in cells))
    data = list(dict.fromkeys(cell.data for cell in cells))
    losses = list(dict.fromkeys(cell.loss for cell in cells))

    def position(cell: Cell) -> tuple[int, bool, int, int, int]:
        return models.index(cell.model), not cell.is_base, data.index(cell.data), losses.index(cell.loss), cell.seed

    return {key: list(group) for key, group in groupby(sorted(cells, key=position), key=lambda cell: cell.key)}


def finite(value: float | None) -> float | None:
    """The value, or None if it is NaN or infinite."""
    return value if value is not None and isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
