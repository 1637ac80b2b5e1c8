"""Plain functions run on several ranks: real processes, real gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

LOADED = "helpers.loaded"
"""A module that imports what takes seconds; the process that all ranks are forked from loads it once."""


def run_on_ranks(
    function: Callable[..., Any], ranks: int, folder: Path, *arguments: Any, fresh: bool = False
) -> list[Any]:
    """``[function(*arguments) of rank 0, of rank 1, ...]``; an exception in any rank is raised here.

    ``fresh`` ranks are new processes, which share no memory and whose allocator follows the environment.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    entry_arguments = (function, ranks, port, str(folder), dict(os.environ), arguments)
    if not fresh:
        _ready_to_fork()
    mp.start_processes(
        _entry, entry_arguments, nprocs=ranks, join=True, start_method="spawn" if fresh else "forkserver"
    )
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


def _ready_to_fork() -> None:
    """Start the process that ranks are forked from, with raydiv and the tests on its path, unless it runs already."""
    from multiprocessing import forkserver

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        multiprocessing.set_forkserver_preload([LOADED])
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _entry(
    rank: int,
    function: Callable[..., Any],
    ranks: int,
    port: int,
    folder: str,
    environment: dict[str, str],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= environment | {
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
    }
    import warnings

    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        result = function(*arguments)
        (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))
        dist.barrier()  # a rank that ends early closes the connections of the others
    finally:
        dist.destroy_process_group()
