"""Who says what is tried next, as Ray Tune asks for it: a list, or Optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

from ray.tune.search import Searcher

from raydiv.config.sweep import SearchParameter, SweepConstraint, SweepObjective
from raydiv.experiments.sweep.space import Values, encoded, suggest, untried

ASKED_AGAIN = 5
"""How often Optuna is asked again where it suggests what was tried already; after that an untried combination is drawn."""

UNKNOWN = 1.0
"""Violation of a constraint whose metric a trial did not come to, as one that was stopped."""


class ListSearcher(Searcher):  # type: ignore[misc]
    """Trials by number: those of ``given`` numbers are as they are, the others what ``_new`` says."""

    def __init__(self, given: Mapping[int, Values]) -> None:
        super().__init__()
        self.tried: list[Values] = []
        self._given = dict(given)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Number and values of the next trial, or that there is none."""
        number = len(self.tried) + 1
        values = self._repeat(trial_id, self._given[number]) if number in self._given else self._new(trial_id)
        if values is None:
            return str(Searcher.FINISHED)
        self.tried.append(values)
        return {"number": number, "values": values}

    def _repeat(self, trial_id: str, values: Values) -> Values:
        return values

    def _new(self, trial_id: str) -> Values | None:
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A list does not learn."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its own record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as ``save``."""


class OptunaSearcher(ListSearcher):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), of one objective or several, under constraints.

    No values are suggested twice. ``given`` are what an earlier attempt tried: Optuna learns from them as they are told again.
    """

    def __init__(
        self,
        space: Sequence[SearchParameter],
        objectives: Sequence[SweepObjective],
        constraints: Sequence[SweepConstraint],
        seed: int,
        given: Mapping[int, Values],
    ) -> None:
        import optuna

        super().__init__(given)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._objectives, self._constraints = space, objectives, constraints
        # what is given takes no draw of the sampler: with its own seed it would begin as the earlier attempt did
        self._seed = seed + len(given)
        sampler = optuna.samplers.TPESampler(seed=self._seed, constant_liar=True)
        self._study = optuna.create_study(sampler=sampler, directions=[one.direction for one in objectives])
        self._trials: dict[str, Any] = {}

    def _repeat(self, trial_id: str, values: Values) -> Values:
        self._study.enqueue_trial(encoded(self._space, values))
        self._trials[trial_id] = self._study.ask()
        suggest(self._space, self._trials[trial_id])
        return values

    def _new(self, trial_id: str) -> Values | None:
        from optuna.trial import TrialState

        known = [*self.tried, *self._given.values()]
        for _ in range(ASKED_AGAIN):
            trial = self._study.ask()
            values = suggest(self._space, trial)
            if values not in known:
                self._trials[trial_id] = trial
                return values
            self._study.tell(trial, state=TrialState.FAIL)
        drawn = untried(self._space, known, self._seed + len(self.tried))
        return None if drawn is None else self._repeat(trial_id, drawn)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna what came out; of a trial that failed, or came to no objective, that it did."""
        from optuna.trial import TrialState

        trial, found = self._trials.pop(trial_id, None), result or {}
        if trial is None:
            return
        for number, one in enumerate(self._constraints):
            trial.set_constraint(str(number), one.violation(found[one.metric]) if one.metric in found else UNKNOWN)
        if error or not all(isfinite(found.get(one.metric, nan)) for one in self._objectives):
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, [found[one.metric] for one in self._objectives])
