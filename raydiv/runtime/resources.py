"""The resources of a run: CPUs, GPUs and memory of training workers and actor pools. Needs a Ray session."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from raydiv.config.cluster import ClusterConfig, ReservedResources
from raydiv.utils.errors import UserError
from raydiv.utils.units import GIB

WORKER_CPU_FRACTION = 0.9
"""Fraction of a node's CPUs that training workers reserve; Ray Data and the driver need the rest."""

HOST_MEMORY_FRACTION = 0.85
"""Fraction of a node's memory for training workers on CPUs; the driver and Ray itself need the rest."""

ACCELERATOR_PREFIX = "accelerator_type:"
"""Ray counts a node's type of GPU as a resource with this prefix, of amount 1."""

MIN_AMOUNT = 0.001
"""Amount of a resource that only requires that a node has it."""

POLL_S, MAX_LISTED_NODES = 3.0, 5
"""Seconds between two checks for new nodes; nodes that a message lists."""

Resources = Mapping[str, float]
"""Amounts by Ray's names."""


def available_cpus(cluster: ClusterConfig) -> float:
    """CPUs that a run may use: ``cluster.cpus``, by default all."""
    import ray

    return cluster.cpus or float(ray.cluster_resources().get("CPU", 0.0))


def cpus_per_worker(cluster: ClusterConfig) -> float:
    """CPUs that a training worker reserves: ``cluster.cpus_per_worker``, by default nine tenths in equal shares.

    The default is the largest share with which all workers fit on the present nodes.
    """
    if cluster.cpus_per_worker is not None:
        return cluster.cpus_per_worker
    limit = WORKER_CPU_FRACTION * available_cpus(cluster) / cluster.num_workers
    nodes = _nodes()
    workers = range(1, cluster.num_workers + 1)
    shares = {WORKER_CPU_FRACTION * node.get("CPU", 0.0) / count for node in nodes for count in workers}
    for share in sorted(shares, reverse=True):
        if share and sum(_capacity(node, _worker_request(cluster, share)) for node in nodes) >= cluster.num_workers:
            return _round_down(min(share, limit))
    return _round_down(limit)


def _round_down(cpus: float) -> float:
    return int(cpus * 1000) / 1000


def threads_per_worker(cluster: ClusterConfig) -> int:
    """Threads of a training worker: its CPUs, rounded."""
    return max(1, round(cpus_per_worker(cluster)))


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What a training worker reserves, without its type of GPU, which Ray Train takes as an argument."""
    request = _worker_request(cluster, cpus_per_worker(cluster))
    return {name: amount for name, amount in request.items() if amount and not name.startswith(ACCELERATOR_PREFIX)}


def worker_memory(cluster: ClusterConfig) -> int:
    """Bytes of a training worker: ``cluster.worker_memory_gb``, else what is free on a GPU of the kind that it gets, or
    its share of a node's memory.
    """
    import ray

    if cluster.worker_memory_gb is not None:
        return round(cluster.worker_memory_gb * GIB)
    if cluster.use_gpu:
        section = cluster.train
        options = {"num_gpus": 1, "resources": section.custom, "accelerator_type": section.accelerator}
        return int(ray.get(ray.remote(**options)(free_gpu_memory).remote()))
    nodes = [node for node in _nodes() if node.get("CPU")]
    workers_per_node = -(-cluster.num_workers // max(1, len(nodes)))
    return round(HOST_MEMORY_FRACTION * min(_host_memory(node) for node in nodes) / workers_per_node)


def _host_memory(node: Resources) -> float:
    """All memory of a node; Ray counts the object store's separately."""
    return node.get("memory", 0.0) + node.get("object_store_memory", 0.0)


def free_gpu_memory() -> int:
    """Bytes of the first GPU that neither this process's CUDA context nor another process holds."""
    import torch

    return int(torch.cuda.mem_get_info(0)[0])


def concurrent_runs(cluster: ClusterConfig, limit: int | None) -> tuple[int, ClusterConfig]:
    """How many runs fit at the same time, at most ``limit``, and the part of the cluster that each may use.

    The parts, with the actors of their pools, never exceed the cluster: no run waits for what another one holds.
    """
    import ray

    if cluster.use_gpu:
        fitting = ray.cluster_resources().get("GPU", 0.0) // cluster.num_workers
    else:
        # a worker uses a whole CPU where the recipe sets none
        fitting = available_cpus(cluster) // (cluster.num_workers * (cluster.cpus_per_worker or 1.0))
    runs = max(1, min(int(fitting), limit or int(fitting)))
    actors = min(cluster.pool_actors or cluster.num_workers, cluster.num_workers) if cluster.use_gpu else None
    all_workers = cluster.num_workers if cluster.use_gpu else runs * cluster.num_workers
    memory = worker_memory(cluster.model_copy(update={"num_workers": all_workers})) / GIB
    part = {
        "cpus": round(available_cpus(cluster) / runs, 3),
        "worker_memory_gb": round(memory, 3),
        "pool_actors": actors or cluster.pool_actors,
    }
    return runs, cluster.model_copy(update=part)


@dataclass(frozen=True, slots=True)
class Pool:
    """At most ``actors`` at the same time, on ``devices`` CPUs or GPUs; each reserves ``cpus`` and ``gpus``.

    ``options`` are Ray's for an actor. ``per_actor`` is all that an actor reserves, by Ray's names.
    """

    actors: int
    devices: int
    cpus: float
    gpus: float
    options: dict[str, Any]
    per_actor: dict[str, float]


def pool_resources(cluster: ClusterConfig, model: bool) -> Pool:
    """Size and reservations of a pool: ``cluster.pool`` of actors with a ``model``, else ``cluster.tokenize``."""
    section = cluster.pool if model else cluster.tokenize
    gpus = 0.0
    if model and cluster.use_gpu:
        gpus = 1.0 if cluster.pool.gpus is None else cluster.pool.gpus
    nodes = _nodes()
    if gpus:
        devices = int(sum(node.get("GPU", 0.0) for node in nodes) / gpus)
        wanted, cpus = cluster.pool_actors or devices, section.cpus or 1.0
    else:
        devices = max(1, int(available_cpus(cluster) // (section.cpus or 1.0)))
        wanted = (cluster.pool_actors if model else None) or devices
        largest_node = max((node.get("CPU", 0.0) for node in nodes), default=1.0)
        cpus = section.cpus or float(max(1, min(devices // wanted, int(largest_node))))
    options: dict[str, Any] = {"resources": section.custom} if section.custom else {}
    options |= {"accelerator_type": section.accelerator} if section.accelerator else {}
    options |= {"scheduling_strategy": "SPREAD"} if section.placement == "SPREAD" else {}
    selectors = _node_selectors(section)
    per_actor = {"CPU": cpus, "GPU": gpus, **selectors}
    fitting = sum(_capacity(node, per_actor) for node in nodes) if selectors else devices
    return Pool(max(1, min(devices, wanted, fitting)), max(1, devices), cpus, gpus, options, per_actor)


def require_resources(cluster: ClusterConfig) -> None:
    """Raise UserError where training workers or pools do not fit on the cluster, also after ``cluster.wait_s``."""
    missing = _missing_resources(cluster)
    if missing is None:
        return
    if not cluster.wait_s:
        raise UserError(missing)
    with _autoscaler_request(cluster):
        end = time.monotonic() + cluster.wait_s
        while missing is not None:
            if time.monotonic() >= end:
                raise UserError(f"{missing} (waited for {cluster.wait_s} s: cluster.wait_s)")
            time.sleep(POLL_S)
            missing = _missing_resources(cluster)


@contextmanager
def _autoscaler_request(cluster: ClusterConfig) -> Iterator[None]:
    """Request the workers' resources from the autoscaler while the block runs; a request that stays keeps its nodes."""
    import ray
    from ray.autoscaler.sdk import request_resources

    request = _worker_request(cluster, cluster.cpus_per_worker or 1.0)
    per_worker = {name: amount for name, amount in request.items() if amount}
    with suppress(ray.exceptions.RayError, RuntimeError):  # nodes may join without an autoscaler
        request_resources(bundles=[per_worker] * cluster.least_workers)
    try:
        yield
    finally:
        with suppress(ray.exceptions.RayError, RuntimeError):
            request_resources(bundles=[])


def _missing_resources(cluster: ClusterConfig) -> str | None:
    messages = (
        missing_worker_resources(cluster),
        _missing_pool_resources(cluster, model=True),
        _missing_pool_resources(cluster, model=False),
    )
    return next(filter(None, messages), None)


def missing_worker_resources(cluster: ClusterConfig) -> str | None:
    """Why the training workers do not fit on the cluster; None where they do."""
    import ray

    total = ray.cluster_resources()
    if cluster.cpus is not None and cluster.cpus > total.get("CPU", 0.0):
        return f"cluster.cpus: {cluster.cpus:g}, but the cluster has {total.get('CPU', 0.0):g}"
    key = "cluster.num_workers" if cluster.min_workers is None else "cluster.min_workers"
    workers = cluster.least_workers
    if cluster.use_gpu:
        kind, needed, available = "GPU", float(workers), total.get("GPU", 0.0)
    else:
        kind, needed, available = "CPU", workers * (cluster.cpus_per_worker or 1.0), available_cpus(cluster)
    if needed > available:
        limit = "the cluster has" if cluster.use_gpu or cluster.cpus is None else "cluster.cpus is"
        alternative = "(or set use_gpu: false)" if cluster.use_gpu else "or cluster.cpus_per_worker"
        return (
            f"{key}: {workers} workers need {needed:g} {kind}s, but {limit} {available:g}; "
            f"lower it {alternative}, or add nodes"
        )
    # a default share of the CPUs adapts to the nodes
    request = _worker_request(cluster, cluster.cpus_per_worker or MIN_AMOUNT)
    fitting = sum(_capacity(node, request) for node in _nodes())
    if fitting < workers:
        return (
            f"{key}: {workers} workers need {_describe(request)} each, but only {fitting} fit on the nodes: "
            f"{_describe_nodes(request)}"
        )
    return None


def _missing_pool_resources(cluster: ClusterConfig, model: bool) -> str | None:
    """Why no actor of a pool fits on a node. Defaults always fit."""
    section, key = (cluster.pool, "cluster.pool") if model else (cluster.tokenize, "cluster.tokenize")
    if section == type(section)():
        return None
    request = pool_resources(cluster, model).per_actor
    if any(_capacity(node, request) for node in _nodes()):
        return None
    return f"{key}: an actor needs {_describe(request)}, and no node has them; nodes: {_describe_nodes(request)}"


def _worker_request(cluster: ClusterConfig, cpus: float) -> dict[str, float]:
    return {"CPU": cpus, "GPU": 1.0 if cluster.use_gpu else 0.0, **_node_selectors(cluster.train)}


def _node_selectors(section: ReservedResources) -> dict[str, float]:
    """The resources by which a section selects its nodes."""
    accelerator = {f"{ACCELERATOR_PREFIX}{section.accelerator}": MIN_AMOUNT} if section.accelerator else {}
    return {**section.custom, **accelerator}


def _capacity(node: Resources, request: Resources) -> int:
    """How many times a request fits on a node."""
    return min((int(node.get(name, 0.0) / amount + 1e-6) for name, amount in request.items() if amount), default=0)


def _nodes() -> list[dict[str, float]]:
    """The resources of each node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _describe(resources: Resources) -> str:
    parts = [
        name.removeprefix(ACCELERATOR_PREFIX) if name.startswith(ACCELERATOR_PREFIX) else f"{amount:g} {name}"
        for name, amount in resources.items()
        if amount > MIN_AMOUNT or (name.startswith(ACCELERATOR_PREFIX) and amount)
    ]
    return ", ".join(parts) or "nothing"


def _describe_nodes(request: Resources) -> str:
    """What each of the first nodes has of a request."""
    nodes = _nodes()
    amounts = [_describe({name: node.get(name, 0.0) for name in request}) for node in nodes[:MAX_LISTED_NODES]]
    more = len(nodes) - MAX_LISTED_NODES
    return "; ".join(amounts) + (f"; and {more} more" if more > 0 else "")
