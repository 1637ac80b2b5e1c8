"""What an objective is: a pure function from the global batch's log-probs to one scalar, and the facts about it.

The functions of this package use tensor *methods* only and import torch for type checkers alone, so that the recipe can
read their signatures (which are their recipe sections) without loading torch.
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

    ``logps`` [n] is log pi_theta(y|x), summed over response tokens, the only differentiable field; ``reference_logps``
    [n] is the same under the reference; ``aligned`` [n] (bool) the label; ``tokens`` [n] the number of response tokens;
    ``pairs`` [p, 2] (long) the positions of each pair's aligned and unaligned example; ``mismatched_log_ratios`` [m]
    the log-ratios of the fixed derangement's (prompt, other response) examples, without gradient, empty unless the
    objective asks for them.
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
        """``values`` [n] of each pair's aligned and of its unaligned example, [p] each."""
        return values[self.pairs[:, 0]], values[self.pairs[:, 1]]


@dataclass(frozen=True, slots=True)
class Value:
    """What an objective returns: the scalar to minimise, the divergence that it estimates, and its next state."""

    loss: Tensor
    divergence: Tensor | None = None
    state: State = field(default_factory=dict)


Positive = Annotated[float, Gt(0)]
AverageWeight = Annotated[float, Gt(0), Le(1)]
"""Of a moving average: the share of what is new."""
Smoothing = Annotated[float, Ge(0), Lt(0.5)]
"""The probability with which a pair's label is taken to be flipped."""

Options = Mapping[str, Any]
Scope = Literal["example", "pair", "batch"]
"""Whose log-probs an example's coefficient depends on, given the state and the labels: its own, its pair's, the step's."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One objective with its facts; those that depend on the options are functions of them.

    ``divergence`` names what it estimates ("none": nothing); ``ceiling`` is the largest value that the estimate can take,
    None without one; ``scope`` says how many passes a step needs; ``telling`` has values of numeric options at which these are
    worth listing. ``reference``, ``mismatched`` and ``unaligned`` say what it needs besides aligned examples; a ``penalty`` is
    for mixing in alone. ``applies`` maps an option to the other option, and the values of it, under which it means anything.
    ``state`` holds the running quantities before the first step.
    """

    name: str
    function: Callable[..., Value]
    paper: str
    data: Literal["unpaired", "paired"]
    reward_scale: str | None
    divergence: Callable[[Options], str]
    ceiling: Callable[[Options], float | None]
    scope: Callable[[Options], Scope]
    telling: Mapping[str, tuple[float, ...]]
    reference: bool
    mismatched: bool
    unaligned: bool
    penalty: bool
    applies: Mapping[str, tuple[str, tuple[str, ...]]]
    state: State

    @property
    def parameters(self) -> dict[str, tuple[Any, Any]]:
        """Keyword-only parameters as ``name: (annotation, default)``: the objective's recipe section."""
        types = get_type_hints(self.function, include_extras=True)
        return {
            parameter.name: (types[parameter.name], parameter.default)
            for parameter in inspect.signature(self.function).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    @property
    def defaults(self) -> dict[str, Any]:
        """Keyword-only parameters at their defaults."""
        return {name: default for name, (_, default) in self.parameters.items()}

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return self.description.partition("\n")[0]

    @property
    def description(self) -> str:
        """The function's docstring."""
        return inspect.getdoc(self.function) or ""

    def idle(self, options: Options) -> dict[str, str]:
        """Those of ``options`` that mean nothing beside the others, each with the condition that it lacks."""
        return {
            name: f"{switch}: {' or '.join(values)}"
            for name, (switch, values) in self.applies.items()
            if name in options and options[switch] not in values
        }


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the training loss: an objective, its weight in the sum, and the values of all its options.

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


def named(fits: Callable[[Objective], bool]) -> str:
    """The names of the objectives that fit, for messages."""
    return ", ".join(sorted(name for name, candidate in OBJECTIVES.items() if fits(candidate)))


def objective(
    *,
    paper: str,
    data: Literal["unpaired", "paired"],
    reward_scale: str | None = "beta",
    divergence: str | Callable[[Options], str],
    ceiling: Callable[[Options], float | None] = lambda options: None,
    scope: Scope | Callable[[Options], Scope] | None = None,
    telling: Mapping[str, tuple[float, ...]] | None = None,
    reference: bool = True,
    mismatched: bool = False,
    unaligned: bool = True,
    penalty: bool = False,
    applies: Mapping[str, tuple[str, tuple[str, ...]]] | None = None,
    state: State | None = None,
) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Register a function as the objective of its own name (underscores become hyphens).

    Without a ``scope`` a paired objective's coefficients are taken to depend on the pair, an unpaired one's on the whole step.
    """
    reach: Scope | Callable[[Options], Scope] = scope or ("pair" if data == "paired" else "batch")

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
            reach if callable(reach) else lambda options: reach,
            telling or {},
            reference,
            mismatched,
            unaligned,
            penalty,
            applies or {},
            state or {},
        )
        return function

    return register
