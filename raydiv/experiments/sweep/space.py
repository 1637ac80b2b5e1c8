"""From a space to values: all of a grid, its corners, or what Optuna suggests, each by the same walk."""

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
"""Values of the keys that apply, in the order of the space."""

MOST_CHECKED = 2000
"""Corners of a space that are checked; of more, so many at random."""

DRAWN_AGAIN = 200
"""How often a combination is drawn for each that is wanted: of a small space most may be there already."""

DIGITS = 4
"""Significant digits of a value from an interval: what a recipe is readable with."""


def grid(space: Sequence[SearchParameter]) -> list[Values]:
    """Every combination of lists."""
    return list(_walk(space, _listed))


def _walk(
    space: Sequence[SearchParameter],
    options: Callable[[Interval | Choices], Sequence[Any]],
    chosen: Values | None = None,
) -> Iterator[Values]:
    """Combinations of ``options``, one at a time; a parameter that does not apply beside the others has no value."""
    chosen = chosen or {}
    if not space:
        yield chosen
        return
    first, rest = space[0], space[1:]
    if not first.applies(chosen):
        yield from _walk(rest, options, chosen)
        return
    for value in options(first.values):
        yield from _walk(rest, options, chosen | {first.key: value})


def _listed(values: Interval | Choices) -> Sequence[Any]:
    assert not isinstance(values, Interval), "the recipe sees to it"
    return values


def _ends(values: Interval | Choices) -> Sequence[Any]:
    return values.ends if isinstance(values, Interval) else values


def suggest(space: Sequence[SearchParameter], trial: Any) -> Values:
    """Values that an Optuna trial suggests. Choices are suggested by number: they may be of any type."""
    chosen: Values = {}
    for parameter in space:
        if parameter.applies(chosen):
            chosen[parameter.key] = _suggested(parameter, trial)
    return chosen


def _suggested(parameter: SearchParameter, trial: Any) -> Any:
    key, values = parameter.key, parameter.values
    if not isinstance(values, Interval):
        return values[trial.suggest_categorical(key, list(range(len(values))))]
    low, high = values.ends
    if values.integer:
        return trial.suggest_int(key, low, high, log=values.log)
    found = trial.suggest_float(key, low, high, log=values.log, step=values.step)
    if values.step is not None:
        return found
    return min(max(float(f"{found:.{DIGITS}g}"), low), high)


def encoded(space: Sequence[SearchParameter], chosen: Values) -> dict[str, Any]:
    """Values as ``suggest`` would ask Optuna for them."""
    by_key = {parameter.key: parameter.values for parameter in space}
    return {
        key: value if isinstance(by_key[key], Interval) else _position(by_key[key], value)
        for key, value in chosen.items()
    }


def _position(choices: Interval | Choices, value: Any) -> int:
    assert not isinstance(choices, Interval)
    return choices.index(value)


def draw(space: Sequence[SearchParameter], count: int, seed: int, tried: Sequence[Values] = ()) -> list[Values]:
    """``count`` different combinations at random, none of them ``tried``; fewer where there are not so many."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    found: list[Values] = []
    for _ in range(DRAWN_AGAIN * count):
        chosen = suggest(space, study.ask())
        if chosen not in found and chosen not in tried:
            found.append(chosen)
        if len(found) == count:
            break
    return found


def untried(space: Sequence[SearchParameter], tried: Sequence[Values], seed: int) -> Values | None:
    """A combination at random that was not tried; None where there is none."""
    if all(not isinstance(parameter.values, Interval) for parameter in space):
        left = [values for values in islice(_walk(space, _listed), MOST_CHECKED) if values not in tried]
        return random.Random(seed).choice(left) if left else None  # noqa: S311
    return next(iter(draw(space, 1, seed, tried)), None)


def representatives(recipe: Recipe, seed: int = 0) -> list[Values]:
    """Values whose recipes stand for all that a search may try: what it will try, or the corners of its space."""
    sweep = recipe.sweep
    assert sweep is not None
    if sweep.search == "grid":
        return grid(sweep.parameters)
    if sweep.search == "random":
        assert sweep.trials is not None, "the recipe sees to it"
        return draw(sweep.parameters, sweep.trials, recipe.seed)
    corners = list(islice(_walk(sweep.parameters, _ends), MOST_CHECKED + 1))
    return corners if len(corners) <= MOST_CHECKED else _some_corners(sweep.parameters, seed)


def _some_corners(space: Sequence[SearchParameter], seed: int) -> list[Values]:
    """As many as are checked: every choice and end at least once beside random others, wherever it applies."""
    rng = random.Random(seed)  # noqa: S311
    drawn = [next(_walk(space, lambda values: [rng.choice(_ends(values))])) for _ in range(MOST_CHECKED)]
    for parameter in space:
        for value in _ends(parameter.values):
            beside = {key: list(values) for key, values in parameter.when.items()} | {parameter.key: [value]}
            wanted = [one if one.key not in beside else replace(one, values=tuple(beside[one.key])) for one in space]
            drawn.append(next(_walk(wanted, lambda values: [rng.choice(_ends(values))])))
    return drawn


def recipes_of(recipe: Recipe, several: Sequence[Values]) -> list[Recipe]:
    """The recipe under each of several values. Raises UserError for the first that no run could have."""
    found = []
    for values in several:
        try:
            found.append(with_changes(recipe, values))
        except UserError as error:
            said = ", ".join(f"{key}={value}" for key, value in values.items())
            raise UserError(f"sweep.space: with {said}: {error}") from None
    return found
