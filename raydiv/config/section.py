"""The base of every recipe section."""

from math import inf
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

LARGEST = 2**63 - 1
"""Of an integer."""


def _with_booleans_as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_booleans_as_text(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else value


class Section(BaseModel):
    """A section that rejects unknown keys and infinities, and validates assignments."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, values: Any) -> Any:
        """Turn booleans into text unless the field is a boolean: pydantic would accept them as 0 or 1."""
        if not isinstance(values, dict):
            return values
        boolean_fields = {name for name, field in cls.model_fields.items() if field.annotation is bool}
        return {key: value if key in boolean_fields else _with_booleans_as_text(value) for key, value in values.items()}

    @model_validator(mode="before")
    @classmethod
    def _integers_are_of_64_bits(cls, values: Any) -> Any:
        """Refuse larger ones, also as floats such as 1e22, which pydantic would turn into integers."""
        if not isinstance(values, dict):
            return values
        for key, field in cls.model_fields.items():
            types = {get_origin(part) or part for part in (field.annotation, *get_args(field.annotation))}
            types |= {part.__origin__ for part in get_args(field.annotation) if hasattr(part, "__metadata__")}
            value = values.get(key)
            if int in types and float not in types and isinstance(value, int | float) and LARGEST < abs(value) < inf:
                raise ValueError(f"{key}: too large; integers are below 2**63")
        return values
