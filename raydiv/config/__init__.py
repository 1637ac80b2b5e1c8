"""The recipe: its sections, its loading and its errors."""

from raydiv.config.load import load_recipe, parse_source, save_recipe, with_changes
from raydiv.config.recipe import Recipe

__all__ = ["Recipe", "load_recipe", "parse_source", "save_recipe", "with_changes"]
