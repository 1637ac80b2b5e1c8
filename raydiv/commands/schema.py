"""``raydiv schema``: the JSON Schema of a recipe, for editors."""

from __future__ import annotations

from typing import Any

from raydiv.config import Recipe


def schema() -> dict[str, Any]:
    """The recipe's JSON Schema. Recipe files may also have ``extends``, which loading resolves."""
    tree = Recipe.model_json_schema()
    tree["properties"]["extends"] = {
        "type": "string",
        "description": "the recipe that this one changes: a file, relative to this one, or bundled:quickstart",
    }
    return tree
