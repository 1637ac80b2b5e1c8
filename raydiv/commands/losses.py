"""``raydiv losses``: the divergence that each objective estimates, its ceiling, the data it needs and its options."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, get_args, get_origin

from raydiv.losses.objective import OBJECTIVES, Objective
from raydiv.utils.errors import UserError
from raydiv.utils.nearest import nearest

PASSES = {
    "example": "one pass",
    "pair": "one pass where pairs share a micro-batch, else two",
    "batch": "one pass over a single micro-batch per worker, else two",
}
"""Forward passes of a training step, by an objective's scope."""

BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def describe_losses(names: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Name -> summary, description, paper, data, reference, estimates and options of ``names``, by default of all.

    ``estimates`` lists divergence, ceiling and scope with the ``options`` that change them; the defaults come first.
    Raises UserError for an unknown name.
    """
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"{name}: no such loss{nearest(name, OBJECTIVES)}")
    return {
        name: {
            "summary": objective.summary,
            "description": objective.description,
            "paper": objective.paper,
            "data": objective.data,
            "reference": objective.needs_reference,
            "estimates": _estimates(objective),
            "options": {key: _option(*parameter) for key, parameter in objective.parameters.items()},
        }
        for name, objective in sorted(OBJECTIVES.items())
        if name in names or not names
    }


def _estimates(objective: Objective) -> list[dict[str, Any]]:
    estimates: list[dict[str, Any]] = []
    for options in [{}, *({key: choice} for key, choices in _choices(objective).items() for choice in choices)]:
        settings = objective.defaults | options
        facts = {
            "divergence": objective.divergence(settings),
            "ceiling": objective.ceiling(settings),
            "scope": objective.scope(settings),
        }
        if facts not in [{key: estimate[key] for key in facts} for estimate in estimates]:
            estimates.append(facts | {"options": options})
    return estimates


def _choices(objective: Objective) -> dict[str, tuple[Any, ...]]:
    """Values of the options that change the estimate: choices by name, and the numbers that an objective declares."""
    names = {
        key: get_args(annotation)
        for key, (annotation, _) in objective.parameters.items()
        if get_origin(annotation) is Literal
    }
    return names | dict(objective.listed_values)


def _option(annotation: Any, default: Any) -> str:
    """The default of an option, with its bounds or choices."""
    bounds = [
        f"{sign} {getattr(mark, key)}"
        for mark in getattr(annotation, "__metadata__", ())
        for key, sign in BOUNDS.items()
        if hasattr(mark, key)
    ]
    choices = [] if bounds else [str(choice) for choice in get_args(annotation)]
    limits = ", ".join(bounds) or " | ".join(choices)
    return f"{default} ({limits})" if limits else str(default)
