"""The section ``study``: a grid of models, data, losses and seeds, whose cells are runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator, model_validator

from raydiv.config.section import Section
from raydiv.config.source import Source

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Of an axis's entries: they become names of runs."""

Axis = dict[str, Any]


class StudyConfig(Section):
    """A grid of models x data x losses x seeds; each cell is a run of this recipe with the changes that its entries name."""

    models: Axis = Field(
        default_factory=dict,
        description="name: model id, or keys of the section model and of others (optim.lr)",
    )
    data: Axis = Field(
        default_factory=dict, description="name: source of training examples, or keys of the section data"
    )
    losses: Axis = Field(default_factory=dict, description="name: loss type, or the section loss")
    seeds: list[NonNegativeInt] = Field(default_factory=list, description="by default the recipe's seed alone")
    baselines: Axis = Field(default_factory=dict, description="name: model that is measured as it is and not trained")
    include: list[str] = Field(
        default_factory=list,
        description="cells that are there already: run directories, folders of them, or mlflow:EXPERIMENT",
    )
    max_concurrent: PositiveInt | None = Field(
        default=None, description="most cells at once; by default, and never more than, what the cluster has room for"
    )
    keep_models: bool = Field(default=True, description="whether finished cells keep their weights")

    @field_validator("models", "data", "losses", "baselines", mode="before")
    @classmethod
    def _by_name(cls, value: Any, info: ValidationInfo) -> Any:
        """A list of words names itself: kldo is the loss kldo, hf://org/name the source NAME. An entry that is null is none."""
        if isinstance(value, dict):
            return {name: said for name, said in value.items() if said is not None}
        if not isinstance(value, list):
            return value
        if not all(isinstance(one, str) for one in value):
            raise ValueError("a list holds words alone; what says more needs a name: {NAME: {KEY: VALUE}}")
        named = {_short(one, info.field_name): one for one in value}
        if len(named) < len(value):
            raise ValueError("two of the list would be called the same; name them: {NAME: VALUE}")
        return named

    @field_validator("models", "data", "losses", "baselines")
    @classmethod
    def _named_well(cls, axis: Axis) -> Axis:
        for name, said in axis.items():
            if not re.fullmatch(NAME, name):
                raise ValueError(f"{name}: a name has letters, digits and . _ - alone")
            if not isinstance(said, str | Mapping):
                raise ValueError(f"{name}: must be a word or a mapping of keys, found {said!r}")
        return axis

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is there twice")
        return seeds

    @model_validator(mode="after")
    def _has_cells(self) -> StudyConfig:
        if not (self.models or self.data or self.losses or self.seeds or self.baselines or self.include):
            raise ValueError("no cells: name models, data, losses or seeds to compare, baselines, or cells to include")
        return self

    @property
    def trains(self) -> bool:
        """Whether there is a grid at all, beside baselines and what is included."""
        return bool(self.models or self.data or self.losses or self.seeds)


def short_id(model_id: str) -> str:
    """A short name for a model's id or directory: its last part."""
    return model_id.rstrip("/").rpartition("/")[2].rpartition(":")[2]


def _short(word: str, axis: str | None) -> str:
    return Source(path=word).short_name.replace(":", "-") if axis == "data" else short_id(word)
