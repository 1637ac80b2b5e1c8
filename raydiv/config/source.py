"""Where examples and prompts come from, as a recipe says it."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    StrictBool,
    model_serializer,
    model_validator,
)

from raydiv.config.section import Section
from raydiv.utils.secrets import REMEDY, has_password

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt")
"""Kinds of files that sources are made of; ``raydiv.data.sources`` has a reader for each."""


class Source(Section):
    """One source of examples, where its place alone does not say enough."""

    path: str = Field(
        description="a file, folder, pattern or saved datasets directory, also on s3:// or gs://; hf://org/name; bundled:NAME"
    )
    config: str | None = Field(default=None, description="configuration of an hf:// data set")
    split: str | None = Field(default=None, description="split of an hf:// or saved data set; train by default")
    revision: str | None = Field(default=None, description="commit, branch or tag of an hf:// data set")
    columns: dict[str, str] | None = Field(
        default=None, description="names of a known format's columns, and what this source calls them"
    )
    constants: dict[str, StrictBool | str] = Field(
        default_factory=dict, description="values of columns that this source lacks, such as aligned: true"
    )
    weight: PositiveFloat = Field(
        default=1.0, description="passes over this source in an epoch; 0.5 takes another half of it every epoch"
    )

    @property
    def short_name(self) -> str:
        """By which figures of this source alone are known; sources of one name are counted as one.

        Of a hub set what follows its organisation, and the configuration where one is named (``Salad-Data:base_set``); of
        bundled:NAME the name; of another place its last segment without an extension, of a pattern that of its folder.
        """
        if self.path.startswith("hf://"):
            name = self.path.rstrip("/").rpartition("/")[2]
            return name if self.config is None else f"{name}:{self.config}"
        segments = self.path.removeprefix("bundled:").split("/")
        plain = [segment for segment in segments if segment and not any(mark in segment for mark in "*?[")]
        return PurePath(plain[-1]).stem if plain else self.path

    @model_validator(mode="before")
    @classmethod
    def _place_alone(cls, values: Any) -> Any:
        if not isinstance(values, str | dict | Source):
            raise ValueError("a source is a place, or a section with its path")
        return {"path": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _has_no_password(self) -> Source:
        if has_password(self.path):  # reports and records name their sources
            raise ValueError(f"path has a password in its address; {REMEDY}")
        return self

    @model_validator(mode="after")
    def _fits_its_place(self) -> Source:
        if not self.path.startswith("hf://"):
            for key in ("config", "revision"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} means nothing for {self.path}, which is not on the hub (hf://org/name)")
        return self

    @model_serializer(mode="wrap")
    def _briefly(self, handler: SerializerFunctionWrapHandler) -> Any:
        """As it would be written: the place alone where that says everything."""
        fields = Source.model_fields
        written = {
            key: value
            for key, value in handler(self).items()
            if value != fields[key].get_default(call_default_factory=True)
        }
        return written["path"] if written.keys() == {"path"} else written


Sources = Annotated[
    list[Source],
    BeforeValidator(
        lambda value: value if isinstance(value, list) else [value],
        json_schema_input_type=str | Source | list[str | Source],
    ),
    Field(min_length=1),
]
"""One source or several, each a place or a section."""


def unweighted(sources: list[Source] | None) -> list[Source] | None:
    """Sources that are gone through once. Raises ValueError for one with a weight."""
    for number, source in enumerate(sources or []):
        if source.weight != 1:
            raise ValueError(f"{number}.weight means nothing here: every prompt is measured once")
    return sources
