"""Ray's runtime environment of a job: this raydiv, the bundle, and environment variables, none of them a secret."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydiv.config.bounded_yaml import read_yaml
from raydiv.runtime.submit.bundle import JobBundle
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.secrets import has_password, has_token, is_secret_name

REFUSED_VARIABLE = (
    "its name or value looks like a secret, and everyone who can list the cluster's jobs could read it; give it to "
    "the nodes from the cluster's secret store (see cluster/README.md)"
)


def job_variables(options: Sequence[str]) -> dict[str, str]:
    """Environment variables from ``NAME``, with its value here, or ``NAME=VALUE``.

    Raises UserError for a variable that is not set, and for one whose name or value looks like a secret.
    """
    variables = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            if name not in os.environ:
                raise UserError(f"--env {name}: not set here; set it, or give --env {name}=VALUE")
            value = os.environ[name]
        if _is_secret(name, value):
            raise UserError(f"--env {name}: {REFUSED_VARIABLE}")
        variables[name] = value
    return variables


def runtime_environment(bundle: JobBundle, variables: Mapping[str, str], more: Mapping[str, Any]) -> dict[str, Any]:
    """Ray's runtime environment: the bundle, this raydiv, the variables, and the user's environment ``more``."""
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
    """The user's runtime environment, a file as of ``ray job submit --runtime-env``.

    Raises UserError where the file cannot be read, sets working_dir, or holds a secret.
    """
    if path is None:
        return {}
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--runtime-env {path}: cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"--runtime-env {path}: not a YAML mapping")
    if "working_dir" in content:
        raise UserError(f"--runtime-env {path}: working_dir: not supported, since raydiv sets it; remove it")
    variables = content.get("env_vars") or {}
    secret = next((name for name, value in variables.items() if _is_secret(name, str(value))), None)
    if secret is not None:
        raise UserError(f"--runtime-env {path}: env_vars.{secret}: {REFUSED_VARIABLE}")
    return content | {"env_vars": {name: str(value) for name, value in variables.items()}}


def _is_secret(name: str, value: str) -> bool:
    return is_secret_name(name) or has_password(value) or has_token(value)
