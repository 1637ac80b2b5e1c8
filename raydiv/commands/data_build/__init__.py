"""``raydiv data build``: compliance-refusal or preference data from harmful and harmless prompts, with a data card."""

from raydiv.commands.data_build.build import build_data

__all__ = ["build_data"]
