"""Ray's runtime environment of a job: this raydiv itself, the bundle, and variables, of which none is a secret."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raydiv.runtime.submit.bundle import JobBundle
from raydiv.utils.errors import UserError
from raydiv.utils.secrets import has_password, has_token, is_secret_name

SEEN = (
    "is a secret by its name or its value, and whoever sees the cluster's jobs would see it; let the nodes have it from the "
    "cluster's own store (see cluster/README.md)"
)


def job_variables(named: Sequence[str]) -> dict[str, str]:
    """Variables ``NAME`` as they are here, or ``NAME=VALUE``.

    Raises UserError for one that is not set, and for one whose name or value says that it is a secret: whoever sees the
    cluster's jobs sees what they were given.
    """
    found = {}
    for one in named:
        name, equals, value = one.partition("=")
        if not equals:
            if name not in os.environ:
                raise UserError(f"--env {name}: is not set here; set it, or say {name}=VALUE")
            value = os.environ[name]
        if _secret(name, value):
            raise UserError(f"--env {name}: {SEEN}")
        found[name] = value
    return found


def runtime_environment(bundle: JobBundle, variables: Mapping[str, str], more: Mapping[str, Any]) -> dict[str, Any]:
    """Ray's runtime environment: the bundle, this raydiv itself, and what the user's own one (``more``) says beside."""
    return {
        **more,
        "working_dir": str(bundle.folder),
        "py_modules": [str(Path(__file__).parents[2]), *more.get("py_modules", [])],
        "env_vars": {
            "PYTHONUNBUFFERED": "1",
            **more.get("env_vars", {}),
            **variables,
        },
    }


def read_runtime_environment(path: Path | None) -> dict[str, Any]:
    """The user's own, as ``ray job submit --runtime-env`` takes it. Raises UserError where it is none, or holds a secret."""
    if path is None:
        return {}
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--runtime-env {path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"--runtime-env {path}: is no mapping")
    if "working_dir" in found:
        raise UserError(f"--runtime-env {path}: working_dir: the job's folder is made by raydiv; leave it out")
    variables = found.get("env_vars") or {}
    secret = [name for name, value in variables.items() if _secret(name, str(value))]
    if secret:
        raise UserError(f"--runtime-env {path}: env_vars.{secret[0]}: {SEEN}")
    return found | {"env_vars": {name: str(value) for name, value in variables.items()}}


def _secret(name: str, value: str) -> bool:
    return is_secret_name(name) or has_password(value) or has_token(value)
