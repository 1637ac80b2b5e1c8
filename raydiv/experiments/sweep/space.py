"""Values of trials from the space of a sweep: a grid, random draws, its corners, or what Optuna suggests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from raydiv.config import Recipe, with_changes
from raydiv.config.sweep import Choices, Interval, SearchParameter
from raydiv.utils.errors import UserError

Values = dict[str, Any]
"""A trial's value of each key that applies, in the order of the space."""

MAX_CHECKED = 2000
"""The number of corners of a space that are checked; of more corners, so many random ones."""

DRAWS_PER_TRIAL = 200
"""Random draws for each combination that is wanted: in a small space most of them are duplicates."""

DIGITS = 4
"""Significant digits of a value from an interval, so that recipes are readable."""


def grid(space: Sequence[SearchParameter]) -> list[Values]:
    """Every combination of a space of lists."""
    return list(_combinations(space, _choices))


def _combinations(
    space: Sequence[SearchParameter],
    options: Callable[[Interval | Choices], Sequence[Any]],
    chosen: Values | None = None,
) -> Iterator[Values]:
    """Combinations of each parameter's ``options``; a parameter that does not apply has no value."""
    chosen = chosen or {}
    if not space:
        yield chosen
        return
    first, rest = space[0], space[1:]
    if not first.applies(chosen):
        yield from _combinations(rest, options, chosen)
        return
    for value in options(first.values):
        yield from _combinations(rest, options, chosen | {first.key: value})


def _choices(values: Interval | Choices) -> Sequence[Any]:
    assert not isinstance(values, Interval), "SweepConfig has checked it"
    return values


def _ends(values: Interval | Choices) -> Sequence[Any]:
    return values.ends if isinstance(values, Interval) else values


def suggest(space: Sequence[SearchParameter], trial: Any) -> Values:
    """The values that an Optuna trial suggests."""
    chosen: Values = {}
    for parameter in space:
        if parameter.applies(chosen):
            chosen[parameter.key] = _suggest_value(parameter, trial)
    return chosen


def _suggest_value(parameter: SearchParameter, trial: Any) -> Any:
    """A value of the parameter. Choices are suggested by index, since Optuna does not take all types."""
    key, values = parameter.key, parameter.values
    if not isinstance(values, Interval):
        return values[trial.suggest_categorical(key, list(range(len(values))))]
    low, high = values.ends
    if values.integer:
        return trial.suggest_int(key, low, high, log=values.log)
    value = trial.suggest_float(key, low, high, log=values.log, step=values.step)
    if values.step is not None:
        return value
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


def encode(space: Sequence[SearchParameter], values: Values) -> dict[str, Any]:
    """Values as Optuna has them, with indices of choices."""
    domains = {parameter.key: parameter.values for parameter in space}
    return {key: _encode_value(domains[key], value) for key, value in values.items()}


def _encode_value(domain: Interval | Choices, value: Any) -> Any:
    return value if isinstance(domain, Interval) else domain.index(value)


def draw(space: Sequence[SearchParameter], count: int, seed: int, tried: Sequence[Values] = ()) -> list[Values]:
    """``count`` different random combinations that are not in ``tried``; fewer if there are not so many."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    drawn: list[Values] = []
    for _ in range(DRAWS_PER_TRIAL * count):
        values = suggest(space, study.ask())
        if values not in drawn and values not in tried:
            drawn.append(values)
        if len(drawn) == count:
            break
    return drawn


def draw_untried(space: Sequence[SearchParameter], tried: Sequence[Values], seed: int) -> Values | None:
    """A random combination that is not in ``tried``; None if there is none."""
    if all(not isinstance(parameter.values, Interval) for parameter in space):
        combinations = islice(_combinations(space, _choices), MAX_CHECKED)
        untried = [values for values in combinations if values not in tried]
        return random.Random(seed).choice(untried) if untried else None  # noqa: S311
    return next(iter(draw(space, 1, seed, tried)), None)


def representatives(recipe: Recipe, seed: int = 0) -> list[Values]:
    """The values of all trials of a grid or of random draws; for tpe, the corners of the space."""
    sweep = recipe.sweep
    assert sweep is not None
    if sweep.search == "grid":
        return grid(sweep.parameters)
    if sweep.search == "random":
        assert sweep.trials is not None, "SweepConfig has checked it"
        return draw(sweep.parameters, sweep.trials, recipe.seed)
    corners = list(islice(_combinations(sweep.parameters, _ends), MAX_CHECKED + 1))
    return corners if len(corners) <= MAX_CHECKED else _random_corners(sweep.parameters, seed)


def _random_corners(space: Sequence[SearchParameter], seed: int) -> list[Values]:
    """MAX_CHECKED random corners, and one for each choice and end, with values under which its parameter applies."""
    rng = random.Random(seed)  # noqa: S311

    def corner(space: Sequence[SearchParameter]) -> Values:
        return next(_combinations(space, lambda values: [rng.choice(_ends(values))]))

    corners = [corner(space) for _ in range(MAX_CHECKED)]
    for parameter in space:
        for value in _ends(parameter.values):
            fixed = {**parameter.when, parameter.key: (value,)}
            corners.append(corner([replace(other, values=fixed.get(other.key, other.values)) for other in space]))
    return corners


def trial_recipes(recipe: Recipe, trials: Sequence[Values]) -> list[Recipe]:
    """The recipe with the values of each trial. Raises UserError for the first that is invalid."""
    recipes = []
    for values in trials:
        try:
            recipes.append(with_changes(recipe, values))
        except UserError as error:
            settings = ", ".join(f"{key}={value}" for key, value in values.items())
            raise UserError(f"sweep.space: with {settings}: {error}") from None
    return recipes
