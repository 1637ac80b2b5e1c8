"""Who says what is tried next, as Ray Tune asks for it: a list, or Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.tune.search import Searcher

from raydiv.config.sweep import Constraint, Objective, Parameter
from raydiv.sweeps.space import Values, encoded, suggest

ASKED_AGAIN = 50
"""How often Optuna is asked again where it suggests what was tried already: of a small space it may all be."""

UNKNOWN = 1.0
"""Violation of a constraint whose metric a trial did not come to, as one that was stopped."""


class Numbered(Searcher):  # type: ignore[misc]
    """Trials by number: ``first`` are suggested as they are, then what ``_more`` says."""

    def __init__(self, first: Sequence[Values]) -> None:
        super().__init__()
        self.tried: list[Values] = []
        self._first = list(first)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Number and values of the next trial, or that there is none."""
        values = self._next(trial_id)
        if values is None:
            return str(Searcher.FINISHED)
        self.tried.append(values)
        return {"number": len(self.tried), "values": values}

    def _next(self, trial_id: str) -> Values | None:
        return self._first[len(self.tried)] if len(self.tried) < len(self._first) else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A list does not learn."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its own record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as ``save``."""


class Asked(Numbered):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), of one objective or several, under constraints.

    No values are suggested twice. ``first`` are what an earlier attempt tried: Optuna learns from them as they are told again.
    """

    def __init__(
        self,
        space: Sequence[Parameter],
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint],
        seed: int,
        first: Sequence[Values],
    ) -> None:
        import optuna

        super().__init__(first)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._objectives, self._constraints = space, objectives, constraints
        sampler = optuna.samplers.TPESampler(
            seed=seed + len(first), constraints_func=_violations if constraints else None, constant_liar=True
        )
        self._study = optuna.create_study(sampler=sampler, directions=[one.direction for one in objectives])
        self._trials: dict[str, Any] = {}
        for values in first:
            self._study.enqueue_trial(encoded(space, values))

    def _next(self, trial_id: str) -> Values | None:
        from optuna.trial import TrialState

        for _ in range(ASKED_AGAIN):
            trial = self._study.ask()
            values = suggest(self._space, trial)
            if values not in self.tried:
                self._trials[trial_id] = trial
                return values
            self._study.tell(trial, state=TrialState.FAIL)
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna what came out; of a trial that failed, or came to no objective, that it did."""
        from optuna.trial import TrialState

        trial, found = self._trials.pop(trial_id, None), result or {}
        if trial is None:
            return
        violations = [one.violation(found[one.metric]) if one.metric in found else UNKNOWN for one in self._constraints]
        trial.set_user_attr("violations", violations)
        if error or any(one.metric not in found for one in self._objectives):
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, [found[one.metric] for one in self._objectives])


def _violations(trial: Any) -> list[float]:
    found: list[float] = trial.user_attrs["violations"]
    return found
