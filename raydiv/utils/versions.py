"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

__version__ = "0.1.0"
"""Raydiv's own, which pyproject.toml reads here."""

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "peft", "mlflow")


def versions() -> dict[str, str]:
    """Of Python, of raydiv and of the packages whose behaviour a result depends on."""
    found = {name: metadata.version(name) for name in PACKAGES}
    # this raydiv may be one that a job brought along, and installed nowhere
    return {"python": platform.python_version(), "raydiv": __version__, **found}
