"""A cell of a study, which is one run; and a cell for each model as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

BASE = "none"
"""The loss of a model as it comes, which none has trained."""

NO_DATA = "-"
"""Its data."""

Key = tuple[str, str, str]
"""Model, data and loss."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A model trained on ``data`` under ``loss``, and its metrics after training and before it, by the names that runs log.

    A base cell is a model as it comes: loss BASE, data NO_DATA, seed 0, and ``metrics`` are ``before``. ``where`` is its run's
    place.
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
        """What runs of several seeds share."""
        return self.model, self.data, self.loss


def trained_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Those that are no base cells."""
    return [cell for cell in cells if not cell.is_base]


def baseline_cells(cells: Sequence[Cell]) -> list[Cell]:
    """A base cell for each model: the mean of what its cells measured before training, which is one measurement repeated."""
    found = []
    for model in dict.fromkeys(cell.model for cell in cells):
        measured = [cell.before for cell in cells if cell.model == model]
        names = dict.fromkeys(name for metrics in measured for name in metrics)
        before = {name: _mean([metrics[name] for metrics in measured if name in metrics]) for name in names}
        found.append(Cell(model, NO_DATA, BASE, 0, before, before, ""))
    return found


def in_order(cells: Sequence[Cell]) -> dict[Key, list[Cell]]:
    """The cells of each model, data and loss: all in the order of first appearance, a model's base before the rest."""
    places = [list(dict.fromkeys(names)) for names in zip(*(cell.key for cell in cells), strict=True)]
    found: dict[Key, list[Cell]] = {}
    for cell in sorted(
        cells,
        key=lambda one: (
            places[0].index(one.model),
            not one.is_base,
            places[1].index(one.data),
            places[2].index(one.loss),
            one.seed,
        ),
    ):
        found.setdefault(cell.key, []).append(cell)
    return found


def finite(value: float | None) -> float | None:
    """The value, or None where it is no finite number."""
    return value if value is not None and isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
