"""Objectives: pure functions from the global batch's log-probs to one scalar, with the facts about each.

The functions of this package use tensor *methods* only, and import torch for type checkers alone. So the recipe can
read their signatures, which are its ``loss`` section, without loading torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, float]
"""Running quantities that an objective carries from step to step (a moving average, a baseline)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """All examples of one optimizer step, over every rank and micro-batch, in example order.

    - ``logps`` [n]: log pi_theta(y|x), summed over what each response token counts (``loss.position``); the only
      differentiable field.
    - ``reference_logps`` [n]: the same under the reference.
    - ``aligned`` [n] (bool): the label.
    - ``tokens`` [n]: the sum of the response tokens' weights: their number where all count 1.
    - ``pairs`` [p, 2] (long): the positions of each pair's aligned and unaligned example.
    - ``mismatched_log_ratios`` [m]: log-ratios of examples whose response belongs to another prompt, by a fixed
      derangement; without gradient, empty unless an objective needs them.
    """

    logps: Tensor
    reference_logps: Tensor
    aligned: Tensor
    tokens: Tensor
    pairs: Tensor
    mismatched_log_ratios: Tensor

    @property
    def log_ratios(self) -> Tensor:
        """Log pi_theta(y|x) - log pi_ref(y|x), [n], in nats."""
        return self.logps - self.reference_logps

    def paired(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The ``values`` [n] of each pair's aligned and of its unaligned example, [p] each."""
        return values[self.pairs[:, 0]], values[self.pairs[:, 1]]


@dataclass(frozen=True, slots=True)
class Value:
    """The value of an objective: the scalar to minimise, the divergence that it estimates, and the next state."""

    loss: Tensor
    divergence: Tensor | None = None
    state: State = field(default_factory=dict)


Positive = Annotated[float, Gt(0)]
EmaRate = Annotated[float, Gt(0), Le(1)]
"""The weight of the new value in an exponential moving average."""
LabelSmoothing = Annotated[float, Ge(0), Lt(0.5)]
"""The assumed probability that a pair's label is flipped."""

Options = Mapping[str, Any]
Scope = Literal["example", "pair", "batch"]
"""Whose log-probs an example's coefficient depends on, at a given state: its own, its pair's, the step's."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One objective with its facts; those that depend on the options are functions of them.

    - ``reward_scale``: the option that scales log-ratios to rewards; None where the reward is the log-ratio.
    - ``divergence``: the name of the divergence that it estimates; "none" if it estimates none.
    - ``ceiling``: the largest value that the estimate can take; None if it is unbounded.
    - ``scope``: determines how many passes a step needs.
    - ``listed_values``: values of numeric options at which ``raydiv losses`` lists these facts, besides the defaults.
    - ``needs_reference``, ``needs_mismatched``, ``needs_aligned``, ``needs_unaligned``: what it needs of the data.
    - ``penalty``: it can only be mixed into another objective.
    - ``requires``: options that have an effect only under certain values of another one, as ``option: (other,
      values)``.
    - ``state``: the running quantities before the first step.
    """

    name: str
    function: Callable[..., Value]
    paper: str
    data: Literal["unpaired", "paired"]
    reward_scale: str | None
    divergence: Callable[[Options], str]
    ceiling: Callable[[Options], float | None]
    scope: Callable[[Options], Scope]
    listed_values: Mapping[str, tuple[float, ...]]
    needs_reference: bool
    needs_mismatched: bool
    needs_aligned: bool
    needs_unaligned: bool
    penalty: bool
    requires: Mapping[str, tuple[str, tuple[str, ...]]]
    state: State

    @property
    def parameters(self) -> dict[str, tuple[Any, Any]]:
        """The function's keyword-only parameters as ``name: (annotation, default)``: the objective's recipe section."""
        types = get_type_hints(self.function, include_extras=True)
        return {
            parameter.name: (types[parameter.name], parameter.default)
            for parameter in inspect.signature(self.function).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    @property
    def defaults(self) -> dict[str, Any]:
        """The keyword-only parameters at their defaults."""
        return {name: default for name, (_, default) in self.parameters.items()}

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return self.description.partition("\n")[0]

    @property
    def description(self) -> str:
        """The function's docstring."""
        return inspect.getdoc(self.function) or ""

    def unused_options(self, options: Options) -> dict[str, str]:
        """Those of ``options`` that have no effect beside the others, each with the condition that it requires."""
        return {
            name: f"{other}: {' or '.join(values)}"
            for name, (other, values) in self.requires.items()
            if name in options and options[other] not in values
        }


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the loss: an objective, its weight in the sum, and the values of all its options.

    Of several terms the first is the main one; the others are mixed in.
    """

    objective: Objective
    weight: float
    options: Options

    @property
    def name(self) -> str:
        return self.objective.name

    @property
    def reward_scale(self) -> float:
        """The factor that turns a log-ratio into a reward; 1 where no option scales it."""
        option = self.objective.reward_scale
        return 1.0 if option is None else float(self.options[option])

    @property
    def divergence(self) -> str:
        return self.objective.divergence(self.options)

    @property
    def ceiling(self) -> float | None:
        return self.objective.ceiling(self.options)

    @property
    def scope(self) -> Scope:
        return self.objective.scope(self.options)


OBJECTIVES: dict[str, Objective] = {}


def widest_scope(terms: Sequence[Term]) -> Scope:
    """Whose log-probs a coefficient of the weighted sum depends on."""
    scopes = {term.scope for term in terms}
    return "batch" if "batch" in scopes else "pair" if "pair" in scopes else "example"


def objective_names(condition: Callable[[Objective], bool]) -> str:
    """The names of the objectives that satisfy ``condition``, for messages."""
    return ", ".join(sorted(name for name, candidate in OBJECTIVES.items() if condition(candidate)))


def objective(
    *,
    paper: str,
    data: Literal["unpaired", "paired"],
    divergence: str | Callable[[Options], str],
    ceiling: Callable[[Options], float | None] = lambda options: None,
    reward_scale: str | None = "beta",
    scope: Scope | Callable[[Options], Scope] | None = None,
    listed_values: Mapping[str, tuple[float, ...]] | None = None,
    needs_reference: bool = True,
    needs_mismatched: bool = False,
    needs_aligned: bool = True,
    needs_unaligned: bool = True,
    penalty: bool = False,
    requires: Mapping[str, tuple[str, tuple[str, ...]]] | None = None,
    state: State | None = None,
) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Register a function as the objective of the same name, with hyphens for underscores. See Objective for the facts.

    Without a ``scope``, coefficients are taken to depend on the pair where ``data`` is paired, else on the whole step.
    """
    default_scope: Scope = "pair" if data == "paired" else "batch"

    def register(function: Callable[..., Value]) -> Callable[..., Value]:
        name = function.__name__.replace("_", "-")
        assert name not in OBJECTIVES, f"duplicate objective {name}"
        options = inspect.signature(function).parameters
        assert reward_scale is None or reward_scale in options, f"{name} has no option {reward_scale}: see reward_scale"
        OBJECTIVES[name] = Objective(
            name,
            function,
            paper,
            data,
            reward_scale,
            divergence if callable(divergence) else lambda options: divergence,
            ceiling,
            scope if callable(scope) else lambda options: scope or default_scope,
            listed_values or {},
            needs_reference,
            needs_mismatched,
            needs_aligned,
            needs_unaligned,
            penalty,
            requires or {},
            state or {},
        )
        return function

    return register
