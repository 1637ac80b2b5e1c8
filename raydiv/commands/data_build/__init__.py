"""Building data: a compliance-refusal or a preference set out of harmful and harmless prompts, with its card."""

from raydiv.commands.data_build.build import build_data

__all__ = ["build_data"]
