"""The base of every recipe section."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Unknown keys fail, as do infinities; values are checked on assignment too."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _truth_values_are_no_numbers(cls, values: Any) -> Any:
        """Hand a truth value on as text where it is not wanted, since pydantic would read it as 0 or 1."""
        if not isinstance(values, dict):
            return values
        wanted = {name for name, field in cls.model_fields.items() if field.annotation is bool}
        return {
            key: str(value).lower() if isinstance(value, bool) and key not in wanted else value
            for key, value in values.items()
        }
