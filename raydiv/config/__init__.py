"""The recipe: its sections, its loading and its errors."""

from raydiv.config.load import changed, load_recipe, save_recipe, source_of
from raydiv.config.recipe import Recipe

__all__ = ["Recipe", "changed", "load_recipe", "save_recipe", "source_of"]
