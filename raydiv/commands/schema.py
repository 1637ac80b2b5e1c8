"""``raydiv schema``: the JSON Schema of a recipe, for editors."""

from __future__ import annotations

from typing import Any

from raydiv.config import Recipe


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, with ``extends``, which loading resolves."""
    tree = Recipe.model_json_schema()
    tree["properties"]["extends"] = {
        "type": "string",
        "description": "the recipe that this one is based on: a file, relative to this one, or bundled:quickstart",
    }
    return tree
