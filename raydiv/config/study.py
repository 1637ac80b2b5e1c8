"""The section ``study``: a grid of models, data, losses and seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator, model_validator

from raydiv.config.section import Section
from raydiv.config.source import Source

ENTRY_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""The name of an axis's entry, which becomes part of the names of runs."""

Axis = dict[str, Any]
"""Entries by name: a string, or a mapping of keys."""


class StudyConfig(Section):
    """A grid of models x data x losses x seeds; a cell is a run of this recipe with the keys that its entries set."""

    models: Axis = Field(
        default_factory=dict,
        description="name: model id, or keys of the section model and of others (optim.lr)",
    )
    data: Axis = Field(
        default_factory=dict, description="name: source of training examples, or keys of the section data"
    )
    losses: Axis = Field(default_factory=dict, description="name: loss type, or the section loss")
    seeds: list[NonNegativeInt] = Field(default_factory=list, description="default: the recipe's seed")
    baselines: Axis = Field(default_factory=dict, description="name: model that is measured without training")
    include: list[str] = Field(
        default_factory=list,
        description="finished runs to add as cells: run directories, folders of them, or mlflow:EXPERIMENT",
    )
    max_concurrent: PositiveInt | None = Field(
        default=None,
        description="maximum of concurrent cells; default and upper limit: as many as the cluster has room for",
    )
    keep_models: bool = Field(default=True, description="whether finished cells keep their weights")

    @field_validator("models", "data", "losses", "baselines", mode="before")
    @classmethod
    def _as_mapping(cls, value: Any, info: ValidationInfo) -> Any:
        """Name the strings of a list (kldo: loss kldo, hf://org/name: source NAME), and drop entries that are null."""
        if isinstance(value, dict):
            return {name: entry for name, entry in value.items() if entry is not None}
        if not isinstance(value, list):
            return value
        entries: Axis = {}
        for entry in value:
            if not isinstance(entry, str):
                raise ValueError(f"{entry!r}: not supported in a list; name the entry: {{NAME: {{KEY: VALUE}}}}")
            name = _entry_name(entry, info.field_name)
            if name in entries:
                raise ValueError(f"{entries[name]}, {entry}: duplicate name {name}; name the entries: {{NAME: VALUE}}")
            entries[name] = entry
        return entries

    @field_validator("models", "data", "losses", "baselines")
    @classmethod
    def _valid_entries(cls, axis: Axis) -> Axis:
        for name, entry in axis.items():
            if not re.fullmatch(ENTRY_NAME, name):
                raise ValueError(f"{name!r}: invalid name; use letters, digits and . _ -, with a letter or digit first")
            if not isinstance(entry, str | Mapping):
                raise ValueError(f"{name!r}: must be a string or a mapping of keys, found {entry!r}")
        return axis

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("duplicate seed; list each seed once")
        return seeds

    @model_validator(mode="after")
    def _has_cells(self) -> StudyConfig:
        if not (self.models or self.data or self.losses or self.seeds or self.baselines or self.include):
            raise ValueError("no cells; set models, data, losses or seeds to compare, baselines, or include")
        return self

    @property
    def trains(self) -> bool:
        """Whether the study has cells to train: an axis or seeds are set."""
        return bool(self.models or self.data or self.losses or self.seeds)


def short_id(model_id: str) -> str:
    """The last part of a model's id or directory."""
    return model_id.rstrip("/").rpartition("/")[2].rpartition(":")[2]


def _entry_name(entry: str, axis: str | None) -> str:
    return Source(path=entry).short_name.replace(":", "-") if axis == "data" else short_id(entry)
