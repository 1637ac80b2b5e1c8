"""The recipe's ``loss`` section, made from the signatures of the objectives: adding an objective changes nothing here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from annotated_types import Gt
from pydantic import Field, create_model, field_validator

from raydiv.config.section import Section
from raydiv.losses import OBJECTIVES, Objective


def _fields(definitions: dict[str, Any]) -> Any:
    """Field definitions for pydantic, whose type for them no mapping has."""
    return definitions


_OPTIONS: dict[str, Any] = {
    name: create_model(f"{name}-options", __base__=Section, **_fields(objective.parameters))
    for name, objective in OBJECTIVES.items()
}

_Mix: Any = create_model(
    "Mix",
    __base__=Section,
    __doc__="Objectives added to the main one: name, its options and its weight.",
    **_fields(
        {
            name.replace("-", "_"): (
                create_model(f"{name}-term", __base__=options, weight=(Annotated[float, Gt(0)], ...)) | None,
                Field(default=None, alias=name),
            )
            for name, options in _OPTIONS.items()
        }
    ),
)


class Loss(Section):
    """The objective: its name (``type``), its options, and other objectives mixed in by weight."""

    type: str
    mix: _Mix = Field(default_factory=_Mix)

    @field_validator("mix", mode="before")
    @classmethod
    def _null_mixes_nothing(cls, value: Any) -> Any:
        return {} if value is None else value

    @property
    def terms(self) -> list[tuple[Objective, float, dict[str, Any]]]:
        """(objective, weight, options) of the main objective, then of those mixed in."""
        options = self.model_dump(exclude={"type", "mix"})
        mixed = self.mix.model_dump(by_alias=True, exclude_none=True)
        return [
            (OBJECTIVES[self.type], 1.0, options),
            *((OBJECTIVES[name], term.pop("weight"), term) for name, term in mixed.items()),
        ]

    @property
    def needs_pairs(self) -> bool:
        return any(objective.data == "paired" for objective, _, _ in self.terms)

    @property
    def needs_mismatched(self) -> bool:
        return any(objective.mismatched for objective, _, _ in self.terms)

    @property
    def needs_reference(self) -> bool:
        return any(objective.reference for objective, _, _ in self.terms)


if TYPE_CHECKING:
    LossSection = Loss
else:
    LossSection = Annotated[
        Union[  # noqa: UP007
            tuple(
                create_model(name, __base__=(Loss, options), type=(Literal[name], name))
                for name, options in _OPTIONS.items()
            )
        ],
        Field(discriminator="type"),
    ]
