"""Ray Tune's searchers: a list of trials, and Optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

from ray.tune.search import Searcher

from raydiv.config.sweep import SearchParameter, SweepConstraint, SweepObjective
from raydiv.experiments.sweep.space import Values, draw_untried, encode, suggest

MAX_ATTEMPTS = 5
"""Suggestions of Optuna that were tried before, after which an untried combination is drawn."""

UNKNOWN_VIOLATION = 1.0
"""Violation of a constraint whose metric is missing, as for a trial that was stopped."""


class ListSearcher(Searcher):  # type: ignore[misc]
    """Suggests ``trials`` by number; a subclass suggests trials of other numbers by ``_new``."""

    def __init__(self, trials: Mapping[int, Values]) -> None:
        super().__init__()
        self.suggested: list[Values] = []
        self._listed = dict(trials)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Number and values of the next trial; ``Searcher.FINISHED`` after the last one."""
        number = len(self.suggested) + 1
        values = self._repeat(trial_id, self._listed[number]) if number in self._listed else self._new(trial_id)
        if values is None:
            return str(Searcher.FINISHED)
        self.suggested.append(values)
        return {"number": number, "values": values}

    def _repeat(self, trial_id: str, values: Values) -> Values:
        return values

    def _new(self, trial_id: str) -> Values | None:
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A list does not depend on results."""

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: a sweep resumes from its own record."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing, as ``save`` writes nothing."""


class OptunaSearcher(ListSearcher):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), with objectives and constraints.

    It suggests no values twice. ``earlier`` are the trials of an earlier attempt, whose results Ray Tune reports again.
    """

    def __init__(
        self,
        space: Sequence[SearchParameter],
        objectives: Sequence[SweepObjective],
        constraints: Sequence[SweepConstraint],
        seed: int,
        earlier: Mapping[int, Values],
    ) -> None:
        import optuna

        super().__init__(earlier)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._objectives, self._constraints = space, objectives, constraints
        # earlier trials take no draw of the sampler: with the same seed it would repeat the draws of the earlier
        # attempt
        self._seed = seed + len(earlier)
        sampler = optuna.samplers.TPESampler(seed=self._seed, constant_liar=True)
        self._study = optuna.create_study(sampler=sampler, directions=[objective.direction for objective in objectives])
        self._trials: dict[str, Any] = {}

    def _repeat(self, trial_id: str, values: Values) -> Values:
        self._study.enqueue_trial(encode(self._space, values))
        self._trials[trial_id] = self._study.ask()
        suggest(self._space, self._trials[trial_id])
        return values

    def _new(self, trial_id: str) -> Values | None:
        from optuna.trial import TrialState

        tried = [*self.suggested, *self._listed.values()]
        for _ in range(MAX_ATTEMPTS):
            trial = self._study.ask()
            values = suggest(self._space, trial)
            if values not in tried:
                self._trials[trial_id] = trial
                return values
            self._study.tell(trial, state=TrialState.FAIL)
        untried = draw_untried(self._space, tried, self._seed + len(self.suggested))
        return None if untried is None else self._repeat(trial_id, untried)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Report a trial to Optuna: its objectives and violations, or its failure where an objective is missing."""
        from optuna.trial import TrialState

        trial, metrics = self._trials.pop(trial_id, None), result or {}
        if trial is None:
            return
        for index, constraint in enumerate(self._constraints):
            value = metrics.get(constraint.metric)
            trial.set_constraint(str(index), UNKNOWN_VIOLATION if value is None else constraint.violation(value))
        if error or not all(isfinite(metrics.get(objective.metric, nan)) for objective in self._objectives):
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, [metrics[objective.metric] for objective in self._objectives])
