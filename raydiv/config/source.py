"""The recipe's sources of examples and prompts."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    model_serializer,
    model_validator,
)

from raydiv.config.section import Section
from raydiv.utils.secrets import REMEDY, has_password

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
"""Kinds of the files that sources consist of; ``raydiv.data.readers`` has a reader for each."""

SUFFIXES = {kind: kind for kind in KINDS} | {".ndjson": ".jsonl"}
"""The kind of file that a suffix stands for."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""The compression that a suffix after that of the kind stands for."""

SEEKABLE = (".parquet", ".arrow")
"""Kinds that are read from several places, and so are not compressed as a whole."""


def file_kind(name: str) -> tuple[str, str | None] | None:
    """The kind of a file by its name, and its compression if it has one; None for a name of unknown suffix."""
    path = PurePath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    kind = SUFFIXES.get(path.with_suffix("").suffix if compression else path.suffix)
    return None if kind is None or (compression and kind in SEEKABLE) else (kind, compression)


class Source(Section):
    """A source of examples or prompts. A source with a path alone may be written as that path."""

    path: str = Field(
        description="file, folder, pattern or saved datasets directory (also s3://, gs://); hf://org/name; bundled:NAME"
    )
    config: str | None = Field(default=None, description="configuration of an hf:// data set")
    split: str | None = Field(default=None, description="split of an hf:// or saved data set; train by default")
    revision: str | None = Field(default=None, description="commit, branch or tag of an hf:// data set")
    columns: dict[str, str] | None = Field(
        default=None, description="maps the column names of a known format to those of this source"
    )
    constants: dict[str, StrictBool | str] = Field(
        default_factory=dict, description="values of columns that this source does not have, such as aligned: true"
    )
    weight: float = Field(
        default=1.0,
        ge=1e-6,
        description="passes over this source in an epoch; 0.5 takes one half, and the other half in the next epoch",
    )

    @property
    def short_name(self) -> str:
        """The name of this source in results; sources with equal names are counted together.

        A hub set's name without its organisation, with its configuration if there is one (``Salad-Data:base_set``); the
        NAME of bundled:NAME; otherwise the last path segment without wildcards, without its suffixes.
        """
        if self.path.startswith("hf://"):
            name = self.path.rstrip("/").rpartition("/")[2]
            return name if self.config is None else f"{name}:{self.config}"
        segments = self.path.removeprefix("bundled:").split("/")
        names = [segment for segment in segments if segment and not set(segment) & set("*?[")]
        if not names:
            return self.path
        compressed = PurePath(names[-1].lower()).suffix in COMPRESSIONS
        return PurePath(PurePath(names[-1]).stem if compressed else names[-1]).stem

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, values: Any) -> Any:
        if not isinstance(values, str | dict | Source):
            raise ValueError("a source is a path, or a section with a path")
        return {"path": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _has_no_password(self) -> Source:
        if has_password(self.path):  # sources are named in reports and records
            raise ValueError(f"path has a password in its address; {REMEDY}")
        return self

    @model_validator(mode="after")
    def _options_apply(self) -> Source:
        if not self.path.startswith("hf://"):
            for key in ("config", "revision"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} does not apply to {self.path}, which is not on the hub (hf://org/name)")
        return self

    @model_serializer(mode="wrap")
    def _shortest(self, handler: SerializerFunctionWrapHandler) -> Any:
        """The path if all other keys have their defaults, else a section without the keys that have."""
        fields = Source.model_fields
        section = {
            key: value
            for key, value in handler(self).items()
            if value != fields[key].get_default(call_default_factory=True)
        }
        return section["path"] if section.keys() == {"path"} else section


Sources = Annotated[
    list[Source],
    BeforeValidator(
        lambda value: value if isinstance(value, list) else [value],
        json_schema_input_type=str | Source | list[str | Source],
    ),
    Field(min_length=1),
]
"""One source or several, each a path or a section."""


def unweighted(sources: list[Source] | None) -> list[Source] | None:
    """Sources that are read once. Raises ValueError for one with a weight."""
    for number, source in enumerate(sources or []):
        if source.weight != 1:
            raise ValueError(f"{number}.weight does not apply here: every prompt is measured once")
    return sources
