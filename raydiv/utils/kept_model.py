"""The model that an actor of a pool keeps between measurements; other processes keep none."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

_kept: dict[str, Any] = {"keeps": False, "key": None, "model": None}


def keep_model() -> None:
    """From now on ``kept_model`` keeps the last model in this process. Its files must not change meanwhile."""
    _kept["keeps"] = True


def kept_model(key: Any, load: Callable[[], Any]) -> Any:
    """The model ``key``, loaded unless it is the one that this process keeps. Whoever gets it leaves it as it was."""
    if not _kept["keeps"]:
        return load()
    if _kept["key"] != key:
        _kept.update(key=None, model=None)  # its memory is needed for the next one
        gc.collect()
        _kept.update(model=load(), key=key)
    return _kept["model"]
