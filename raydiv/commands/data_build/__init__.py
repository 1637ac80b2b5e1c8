"""``raydiv data build``: a compliance-refusal or preference set from harmful and harmless prompts, with its data card."""

from raydiv.commands.data_build.build import build_data

__all__ = ["build_data"]
