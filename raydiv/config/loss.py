"""The recipe's ``loss`` section, generated from the signatures of the objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from raydiv.config.section import Section
from raydiv.losses import OBJECTIVES, Objective, Term
from raydiv.losses.position import SMALLEST_BETA, PositionRule, PositionWeights, RewardWeights, TokenConstraint

TYPES = sorted(name for name, objective in OBJECTIVES.items() if not objective.penalty)
"""What ``loss.type`` may be."""


def _field_definitions(definitions: dict[str, Any]) -> Any:
    """Field definitions as ``create_model`` takes them; no mapping has the type that it declares."""
    return definitions


class _Nullable(Section):
    """A section in which null leaves a key at its default, so that an override can undo a recipe's value."""

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class _Options(_Nullable):
    """One objective's options. Those that have no effect beside the others are refused, and not written out."""

    objective_name: ClassVar[str]

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.objective_name]

    @property
    def options(self) -> dict[str, Any]:
        """Every option of the objective, defaults included."""
        return {name: getattr(self, name) for name in self.objective.parameters}

    @model_validator(mode="after")
    def _refuse_unused_options(self) -> _Options:
        for name, condition in self.objective.unused_options(self.options).items():
            if name in self.model_fields_set:
                raise ValueError(f"{name} has no effect without {condition}; leave it out, or set it to null")
        return self

    @model_serializer(mode="wrap")
    def _omit_unused_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = self.objective.unused_options(self.options)
        return {name: value for name, value in handler(self).items() if name not in unused}


def _options(objective: Objective) -> Any:
    model = create_model(f"{objective.name}-options", __base__=_Options, **_field_definitions(objective.parameters))
    model.objective_name = objective.name
    return model


_OPTIONS: dict[str, Any] = {name: _options(objective) for name, objective in OBJECTIVES.items()}


class _Terms(_Nullable):
    """Terms by name; absent ones are not written out."""

    model_config = ConfigDict(populate_by_name=False)

    @model_serializer(mode="wrap")
    def _omit_absent_terms(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: term for name, term in handler(self).items() if term is not None}


_Mix: Any = create_model(
    "Mix",
    __base__=_Terms,
    __doc__="Objectives added to the main one: name, its options and its weight.",
    **_field_definitions(
        {
            name.replace("-", "_"): (
                create_model(f"{name}-term", __base__=options, weight=(Annotated[float, Gt(0)], ...)) | None,
                Field(default=None, alias=name),
            )
            for name, options in _OPTIONS.items()
        }
    ),
)


_OPTIONS_OF_KIND = {
    "flat": (),
    "decay": ("rate",),
    "first": ("tokens", "weight"),
    "common-length": ("weight",),
    "constrained": ("betas",),
    "rewarded": ("model", "temperature"),
}


class PositionConfig(_Nullable):
    """What each token of a response counts in its log-prob.

    ``flat``: each 1; ``decay``: token t, from 1, counts ``rate`` ** (t - 1); ``first``: the first ``tokens`` count
    ``weight`` each, the others 1, so that a weight below 1 moves the loss beyond the first tokens; ``common-length``:
    those beyond the length of the pair's shorter response count ``weight`` each, the others 1; ``constrained``: the
    log-ratio of token t is bounded above by 2 log 2 / b_t, with ``betas`` b_1, b_2, ...; the last is that of all later
    tokens; ``rewarded``: a token of an aligned response counts exp(-r / ``temperature``), where r is its log-ratio of
    ``model`` (a directory, a hub id, or a run's adapter) to the reference.
    """

    kind: Literal["flat", "decay", "first", "common-length", "constrained", "rewarded"] = "flat"
    rate: Annotated[float, Gt(0), Lt(1)] | None = None
    tokens: Annotated[int, Ge(1)] | None = None
    weight: Annotated[float, Gt(0)] | None = None
    betas: Annotated[list[Annotated[float, Ge(SMALLEST_BETA)]], MinLen(1)] | None = None
    model: str | None = None
    temperature: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @field_validator("temperature")
    @classmethod
    def _no_division_by_zero(cls, temperature: float | None) -> float | None:
        if temperature == 0:
            raise ValueError("must not be 0")
        return temperature

    @model_validator(mode="after")
    def _require_the_options_of_the_kind(self) -> PositionConfig:
        wanted = _OPTIONS_OF_KIND[self.kind]
        for name in ("rate", "tokens", "weight", "betas", "model", "temperature"):
            if name in wanted and getattr(self, name) is None:
                raise ValueError(f"kind {self.kind} needs {name}")
            if name not in wanted and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with kind {self.kind}; leave it out, or set it to null")
        return self

    @model_serializer(mode="wrap")
    def _omit_unused_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    @property
    def rule(self) -> PositionRule | None:
        """What the tokens count; None where each counts 1."""
        if self.kind == "flat" or self.weight == 1:
            return None
        if self.kind == "constrained":
            return TokenConstraint(tuple(self.betas or ()))
        if self.kind == "rewarded":
            return RewardWeights(self.model or "", self.temperature or 1.0)
        if self.kind == "common-length":
            return PositionWeights(late_weight=self.weight or 1.0)
        return PositionWeights(self.rate or 1.0, self.tokens or 0, self.weight or 1.0)


class LossConfig(_Options):
    """The objective: its name (``type``), its options, other objectives mixed in by weight, and what each position of a
    response counts for all of them.
    """

    type: str
    mix: _Mix = Field(default_factory=_Mix)
    position: PositionConfig = Field(default_factory=PositionConfig)

    @property
    def terms(self) -> list[Term]:
        """The main objective, then those mixed in."""
        mixed = [term for _, term in self.mix if term is not None]
        return [Term(self.objective, 1.0, self.options), *(Term(t.objective, t.weight, t.options) for t in mixed)]

    @property
    def paired_terms(self) -> list[str]:
        """Names of the objectives that need pairs."""
        return [term.name for term in self.terms if term.objective.data == "paired"]

    @property
    def is_bounded(self) -> bool:
        """Whether the loss is bounded below: by the main objective's ceiling, or by a penalty that is mixed in."""
        main = self.terms[0]
        has_penalty = any(term.objective.penalty for term in self.terms)
        return has_penalty or main.divergence == "none" or main.ceiling is not None

    @property
    def aligned_terms(self) -> list[str]:
        """Names of the objectives that need aligned examples."""
        return [term.name for term in self.terms if term.objective.needs_aligned]

    @property
    def unaligned_terms(self) -> list[str]:
        """Names of the objectives that need unaligned examples."""
        return [term.name for term in self.terms if term.objective.needs_unaligned]

    @property
    def mismatched_terms(self) -> list[str]:
        """Names of the objectives that need mismatched examples."""
        return [term.name for term in self.terms if term.objective.needs_mismatched]

    @property
    def needs_reference(self) -> bool:
        return any(term.objective.needs_reference for term in self.terms) or self.needs_reference_tokens

    @property
    def needs_reference_tokens(self) -> bool:
        """Whether the loss needs the reference's log-prob of each token."""
        return self.position.rule is not None and self.position.rule.by_token


if TYPE_CHECKING:
    LossSection = LossConfig
else:
    LossSection = Annotated[
        Union[  # noqa: UP007
            tuple(
                create_model(name, __base__=(LossConfig, options), type=(Literal[name], name))
                for name, options in _OPTIONS.items()
                if name in TYPES
            )
        ],
        Field(discriminator="type"),
    ]
