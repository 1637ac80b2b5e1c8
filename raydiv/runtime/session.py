"""A Ray session: the cluster at RAY_ADDRESS, or a local one for the length of the command."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from raydiv.config import Recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.local_session import LOOPBACK, local_session
from raydiv.runtime.resources import require_resources
from raydiv.utils import compat
from raydiv.utils.errors import UserError, one_line

AUTH_HELP = (
    "a cluster with token authentication needs RAY_AUTH_MODE=token, and its token in RAY_AUTH_TOKEN, in the file "
    "RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
)
"""Also for a wrong token, for which Ray reports only that it could not connect."""

DISK_FULL = (
    "Ray's object store is full, and so is the disk that it spills to (Ray uses at most 95% of it): free space on the "
    "disk of /tmp, or set RAY_TMPDIR to another folder before Ray starts; finished parts are kept"
)


SHARED_DEVICES = "RAY_TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES"
"""Ray Train's setting by which each worker of a node sees the GPUs of all of them; the default."""


@contextmanager
def ray_session(cluster: ClusterConfig, *, dashboard: bool = False) -> Iterator[None]:
    """Connect to Ray without its log output, and check that the recipe's workers fit.

    Ray is shut down when the block ends, unless it was initialized before. A local Ray starts a ``dashboard``, which
    Ray jobs need, only on request, and only this machine reaches it. Ray requires a token for it, the user's or one
    that it makes; nothing here turns that off.

    Every process of the session has ``worker_environment``.

    Raises UserError where the cluster cannot be joined or lacks resources, and RuntimeError where Ray's disk is full.
    """
    if cluster.use_gpu and os.environ.get(SHARED_DEVICES, "1") == "0":
        raise UserError(f"{SHARED_DEVICES}: must not be 0: DeepSpeed finds the GPU of a worker by its local rank")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray must neither hide an idle accelerator from workers nor warn about it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import ray

    from raydiv.runtime.model_pool import end_pool

    with nullcontext() if ray.is_initialized() else _own_session(cluster, dashboard):
        try:
            _configure_ray_data()
            require_resources(cluster)
            yield
        except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError):
            raise RuntimeError(DISK_FULL) from None
        finally:
            end_pool()


@contextmanager
def _own_session(cluster: ClusterConfig, dashboard: bool) -> Iterator[None]:
    """Ray at RAY_ADDRESS, else a local one, until the block ends."""
    import ray

    with nullcontext() if os.environ.get("RAY_ADDRESS") else local_session() as folder:
        try:
            _init_ray(cluster, dashboard, folder)
            yield
        finally:
            ray.shutdown()


def _init_ray(cluster: ClusterConfig, dashboard: bool, folder: Path | None) -> None:
    """Join the cluster at RAY_ADDRESS, or start a local one.

    Raises UserError where the cluster cannot be joined, and RuntimeError where a local one does not start.
    """
    import ray

    for attempt in range(1, STARTS + 1):
        try:
            _init_ray_once(cluster, dashboard, folder)
            return
        except Exception as error:  # of no type of its own
            ray.shutdown()
            if not compat.is_slow_start(error):
                raise
            print(f"Ray did not start within 30 s (attempt {attempt} of {STARTS})", file=sys.stderr)
    raise RuntimeError(f"Ray did not start in {STARTS} attempts of 30 s: this machine is too busy")


STARTS = 4
"""Attempts to start a local Ray, each of which may last 30 s."""


CONNECTION_SECONDS = 60.0
"""Seconds in which a cluster must answer."""


def _init_ray_once(cluster: ClusterConfig, dashboard: bool, folder: Path | None) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    local = {"include_dashboard": dashboard, "dashboard_host": "127.0.0.1", "_temp_dir": str(folder)}
    environment = worker_environment(cluster)
    try:
        with _core_log_silenced():
            if address and "://" not in address and ":" in address:
                compat.require_cluster(address, CONNECTION_SECONDS)
            ray.init(
                # without an address Ray joins the newest cluster that any user started on this machine
                address=address or "local",
                **({} if address else local),
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": environment if address else LOOPBACK | environment},
            )
            if folder is not None:
                compat.write_ray_address(folder)
    except ray.exceptions.AuthenticationError:
        raise UserError(
            f"RAY_ADDRESS: {address}: RAY_AUTH_MODE is token, and no token was found; {AUTH_HELP}"
        ) from None
    except ConnectionError as error:
        raise UserError(f"RAY_ADDRESS: cannot connect to {address}: {one_line(error, 200)}; {AUTH_HELP}") from None
    except RuntimeError as error:
        if not compat.is_version_mismatch(error):
            raise
        raise UserError(
            f"RAY_ADDRESS: {address}: {one_line(error)}; use the cluster's versions here, or raydiv submit"
        ) from None


def require_dashboard(command: str) -> None:
    """Raise UserError where the cluster has no dashboard that answers. A local Ray has one only on request."""
    import ray
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        # without an address: a cluster of this machine, which may have several
        list_nodes(ray.get_runtime_context().gcs_address, limit=1, timeout=20)
    except (RayStateApiException, OSError, ValueError) as error:
        raise UserError(
            f"{command} needs the dashboard of the Ray cluster, which does not answer: {one_line(error, 200)}"
        ) from None


KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**31),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
    "MALLOC_ARENA_MAX": "1",  # Ray runs the loop in a thread, whose own arena would hold no large block
}
"""Make glibc's allocator keep freed memory. ZeRO frees and allocates the same large tensors in every step; with new
pages from the kernel each time, a step of two workers takes a third longer. The cost: up to twice the memory.
"""


def training_environment(recipe: Recipe, roomy: bool) -> dict[str, str]:
    """Environment variables of training workers in addition to ``worker_environment``; ``cluster.env`` overrides them.

    ``roomy``: the workers have twice the memory that they need.
    """
    keep_memory = roomy and recipe.engine.zero_stage != 0 and not recipe.cluster.use_gpu
    return (KEEP_FREED_MEMORY if keep_memory else {}) | recipe.cluster.env


@contextmanager
def _core_log_silenced() -> Iterator[None]:
    """Keep log lines of Ray's C++ core off the terminal; its errors are raised all the same.

    RAY_BACKEND_LOG_LEVEL is not enough: the core prints the level that it is set to. So stderr is redirected as well.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


GPU_SETTINGS = {
    # cuDNN's attention makes a plan for each new shape, of tens of milliseconds, and keeps all of them: lengths of
    # examples and answers differ at each step, so that training would spend most of its time on plans
    "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    # micro-batches differ in size, which fragments the default allocator's blocks; pinned memory of checkpoints and
    # offload would be rounded up to a power of two
    "PYTORCH_ALLOC_CONF": "expandable_segments:True,pinned_max_round_threshold_mb:64",
}
"""Settings of torch in every process on GPUs; ``cluster.env`` overrides them."""


def worker_environment(cluster: ClusterConfig) -> dict[str, str]:
    """Environment variables of every process of the session: library and device settings, and ``cluster.env``."""
    device = GPU_SETTINGS if cluster.use_gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {"TOKENIZERS_PARALLELISM": "false", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **device, **cluster.env}


def _configure_ray_data() -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its logged errors are raised as well
    for name in ("ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
