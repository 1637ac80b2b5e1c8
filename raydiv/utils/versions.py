"""Versions of the packages that a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

__version__ = "0.1.0"
"""The version of raydiv; pyproject.toml reads it here."""

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "peft", "mlflow")


def versions() -> dict[str, str]:
    """Versions of Python, of raydiv and of PACKAGES."""
    # raydiv's own comes from this file: a job may bring raydiv along without installing it
    installed = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "raydiv": __version__, **installed}
