"""``raydiv env``: versions, devices and paths, for a bug report. Passwords and tokens in addresses are masked."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from typing import Any

from raydiv.utils.secrets import has_token, mask_password
from raydiv.utils.versions import PACKAGES, __version__

VARIABLES = ("RAYDIV_CACHE", "HF_HOME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES")

CREDENTIALS = re.compile(r"://\S*@")
"""The user and password of an address."""


def env() -> dict[str, dict[str, Any]]:
    """``versions``, ``devices`` and ``paths`` of this machine; None for a missing package and an unset variable."""
    gpu_versions, gpus = _gpus()
    platform_versions = {"raydiv": __version__, "python": platform.python_version(), "platform": platform.platform()}
    return {
        "versions": platform_versions | {name: _version(name) for name in (*PACKAGES, "datasets")} | gpu_versions,
        "devices": {"cpus": _cpus(), "memory_bytes": _memory(), "gpus": gpus},
        "paths": {"cache": _cache(), **{name: _mask(os.environ.get(name)) for name in VARIABLES}},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[dict[str, str | None], list[dict[str, Any]]]:
    """The versions of CUDA and NCCL of torch, and the GPUs that it sees."""
    try:
        import torch
    except (ImportError, OSError):  # not installed, or a shared library is missing
        return {"cuda": None, "nccl": None}, []
    cuda = torch.version.cuda
    nccl = torch.cuda.nccl.version() if cuda and torch.distributed.is_nccl_available() else None  # type: ignore[no-untyped-call]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    gpus = [{"name": device.name, "memory_bytes": device.total_memory} for device in devices]
    return {"cuda": cuda, "nccl": nccl and ".".join(map(str, nccl))}, gpus


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().total)


def _cache() -> str:
    """The local cache folder, or why there is none."""
    try:
        from raydiv.utils.cache import cache_dir

        return str(cache_dir())
    except (ImportError, OSError) as error:
        return f"none: {error}"


def _mask(value: str | None) -> str | None:
    """The value of a variable, with ``***`` for what may be secret."""
    if value is None:
        return None
    return "***" if has_token(value) else CREDENTIALS.sub("://***@", mask_password(value))
