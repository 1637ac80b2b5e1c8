"""What a run takes of a cluster: how much of it, in which shares, and whether there is so much; needs a Ray session."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from raydiv.config.cluster import ClusterConfig, PoolResources, ReservedResources
from raydiv.utils.errors import UserError

SHARE = 0.9
"""Of a node's CPUs, what training workers reserve."""

ACCELERATOR = "accelerator_type:"
"""Before the type of a node's GPU, as Ray has it."""

ANY = 0.001
"""Of a resource, an amount that says no more than that it is there."""

LOOKED_S, NAMED = 3.0, 5
"""Seconds between looks for new nodes; nodes that a message names."""


def cpus(cluster: ClusterConfig) -> float:
    """CPUs that a run may take: the cluster's, unless the recipe says fewer."""
    import ray

    return cluster.cpus or float(ray.cluster_resources().get("CPU", 0.0))


def cpus_per_worker(cluster: ClusterConfig) -> float:
    """CPUs that a training worker reserves; by default nine tenths of its node's in equal shares, so that others can start.

    These are the most with which all workers find a place on the nodes that there are.
    """
    if cluster.cpus_per_worker is not None:
        return cluster.cpus_per_worker
    most = SHARE * cpus(cluster) / cluster.num_workers
    nodes = _nodes()
    shares = {SHARE * node.get("CPU", 0.0) / count for node in nodes for count in range(1, cluster.num_workers + 1)}
    for share in sorted(shares, reverse=True):
        if share and sum(_places(node, _of_a_worker(cluster, share)) for node in nodes) >= cluster.num_workers:
            return _rounded_down(min(share, most))
    return _rounded_down(most)


def threads_per_worker(cluster: ClusterConfig) -> int:
    """Threads of a training worker: its share of the CPUs, rounded to whole ones."""
    return max(1, round(cpus_per_worker(cluster)))


def concurrent_runs(cluster: ClusterConfig, at_most: int | None) -> tuple[int, ClusterConfig]:
    """How many runs there is room for, ``at_most`` so many, and the part of the cluster that each then gets.

    The parts never add up to more than there is: no run waits for what another holds, its pools' actors included.
    """
    import ray

    have = ray.cluster_resources()
    if cluster.use_gpu:
        room = have.get("GPU", 0.0) // cluster.num_workers
    else:
        # a worker takes a whole CPU where the recipe does not say
        room = cpus(cluster) // (cluster.num_workers * (cluster.cpus_per_worker or 1.0))
    runs = max(1, min(int(room), at_most or int(room)))
    pool = min(cluster.pool_actors or cluster.num_workers, cluster.num_workers) if cluster.use_gpu else None
    all_workers = cluster.num_workers if cluster.use_gpu else runs * cluster.num_workers
    memory = worker_memory(cluster.model_copy(update={"num_workers": all_workers})) / 2**30
    part = {
        "cpus": round(cpus(cluster) / runs, 3),
        "worker_memory_gb": round(memory, 3),
        "pool_actors": pool or cluster.pool_actors,
    }
    return runs, cluster.model_copy(update=part)


HOST_MEMORY_FRACTION = 0.85
"""Of a node's memory, what training workers on CPUs may have, beside the driver, Ray's daemons and its object store."""


def worker_memory(cluster: ClusterConfig) -> int:
    """Bytes of a training worker's GPU, or its share of a node's memory; ``cluster.worker_memory_gb`` where it is given."""
    import ray

    if cluster.worker_memory_gb is not None:
        return round(cluster.worker_memory_gb * 2**30)
    if cluster.use_gpu:
        return int(ray.get(ray.remote(num_gpus=1)(_gpu_memory).remote()))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    on_each = -(-cluster.num_workers // max(1, len(nodes)))
    return round(HOST_MEMORY_FRACTION * min(_host_memory(node) for node in nodes) / on_each)


def _host_memory(node: Mapping[str, float]) -> float:
    """All memory of a node: Ray counts the object store's apart."""
    return node.get("memory", 0.0) + node.get("object_store_memory", 0.0)


def _gpu_memory() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def pool_resources(cluster: ClusterConfig, model: bool) -> Pool:
    """What the actors of a pool reserve, with a ``model`` each or, as tokenizers, without, and for how many there is room."""
    section = cluster.pool if model else cluster.tokenize
    each = (section.gpus if isinstance(section, PoolResources) else None) if cluster.use_gpu else 0
    gpus = (1.0 if each is None else each) if model else 0.0
    nodes = _nodes()
    if gpus:
        devices = int(sum(node.get("GPU", 0.0) for node in nodes) / gpus)
        wanted, own = cluster.pool_actors or devices, section.cpus or 1.0
    else:
        devices = max(1, int(cpus(cluster) // (section.cpus or 1.0)))
        wanted = (cluster.pool_actors if model else None) or devices
        largest = max((node.get("CPU", 0.0) for node in nodes), default=1.0)
        own = section.cpus or float(max(1, min(devices // wanted, int(largest))))
    options: dict[str, Any] = {"resources": section.custom} if section.custom else {}
    options |= {"accelerator_type": section.accelerator} if section.accelerator else {}
    options |= {"scheduling_strategy": "SPREAD"} if section.placement == "SPREAD" else {}
    place = {"CPU": own, "GPU": gpus, **_apart(section)}
    fit = sum(_places(node, place) for node in nodes) if _apart(section) else devices
    return Pool(max(1, min(devices, wanted, fit)), max(1, devices), own, gpus, options, place)


@dataclass(frozen=True, slots=True)
class Pool:
    """At most ``actors`` side by side, on ``devices`` CPUs or GPUs, each with ``cpus`` and ``gpus``; ``options`` are Ray's.

    ``each``: all that one reserves, by Ray's names.
    """

    actors: int
    devices: int
    cpus: float
    gpus: float
    options: dict[str, Any]
    each: dict[str, float]


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What a training worker reserves, by Ray's names, but for the type of its GPU."""
    return {
        name: amount
        for name, amount in _of_a_worker(cluster, cpus_per_worker(cluster)).items()
        if amount and not name.startswith(ACCELERATOR)
    }


def _of_a_worker(cluster: ClusterConfig, share: float) -> dict[str, float]:
    return {"CPU": share, "GPU": 1.0 if cluster.use_gpu else 0.0, **_apart(cluster.train)}


def _apart(section: ReservedResources) -> dict[str, float]:
    """What tells the nodes apart that a section names; Ray counts a node's type of GPU as a resource."""
    kind = {f"{ACCELERATOR}{section.accelerator}": ANY} if section.accelerator else {}
    return {**section.custom, **kind}


def _places(node: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How many that reserve so much a node has room for."""
    return min((int(node.get(name, 0.0) / amount + 1e-6) for name, amount in each.items() if amount), default=0)


def _nodes() -> list[dict[str, float]]:
    """The resources of each node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _rounded_down(share: float) -> float:
    return int(share * 1000) / 1000


def require_resources(cluster: ClusterConfig) -> None:
    """Raise UserError where the cluster has no room for training workers or pools, and gets none in ``cluster.wait_s``."""
    lack = _lack(cluster)
    if lack is None:
        return
    if not cluster.wait_s:
        raise UserError(lack)
    with _asked_for(cluster):
        end = time.monotonic() + cluster.wait_s
        while lack is not None:
            if time.monotonic() >= end:
                raise UserError(f"{lack} (after {cluster.wait_s} s: cluster.wait_s)")
            time.sleep(LOOKED_S)
            lack = _lack(cluster)


@contextmanager
def _asked_for(cluster: ClusterConfig) -> Iterator[None]:
    """Ask the autoscaler for room for the workers while the block runs; a request that stayed would keep nodes for ever."""
    import ray
    from ray.autoscaler.sdk import request_resources

    asked = _of_a_worker(cluster, cluster.cpus_per_worker or 1.0)
    each = {name: amount for name, amount in asked.items() if amount}
    with suppress(ray.exceptions.RayError, RuntimeError):  # without an autoscaler, nodes may come all the same
        request_resources(bundles=[each] * cluster.least_workers)
    try:
        yield
    finally:
        with suppress(ray.exceptions.RayError, RuntimeError):
            request_resources(bundles=[])


def _lack(cluster: ClusterConfig) -> str | None:
    """What there is no room for, with what is there."""
    lacks = (missing_worker_resources(cluster), _lack_of_a_pool(cluster, True), _lack_of_a_pool(cluster, False))
    return next(filter(None, lacks), None)


def missing_worker_resources(cluster: ClusterConfig) -> str | None:
    """Why training workers find no room; None where they do."""
    import ray

    have = ray.cluster_resources()
    kind, each = ("GPU", 1.0) if cluster.use_gpu else ("CPU", cluster.cpus_per_worker or 1.0)
    wanted, there = cluster.least_workers * each, have.get(kind, 0.0)
    if cluster.cpus is not None and cluster.cpus > have.get("CPU", 0.0):
        return f"cluster.cpus: {cluster.cpus:g}, and the cluster has {have.get('CPU', 0.0):g}"
    if kind == "CPU":
        there = cpus(cluster)
    key = "num_workers" if cluster.min_workers is None else "min_workers"
    if wanted > there:
        owner = "the cluster has" if cluster.use_gpu or cluster.cpus is None else "cluster.cpus is"
        less = "(or set use_gpu: false)" if cluster.use_gpu else "or cluster.cpus_per_worker"
        return (
            f"cluster.{key}: {cluster.least_workers} workers need {wanted:g} {kind}s, and {owner} {there:g}; "
            f"lower it {less}, or add nodes"
        )
    # a share that the recipe does not say is whatever is left
    asked = _of_a_worker(cluster, cluster.cpus_per_worker or ANY)
    room = sum(_places(node, asked) for node in _nodes())
    if room < cluster.least_workers:
        return (
            f"cluster.{key}: {cluster.least_workers} workers with {_words(asked)} each, and there is room for "
            f"{room} of them; nodes: {_words_of_nodes(asked)}"
        )
    return None


def _lack_of_a_pool(cluster: ClusterConfig, model: bool) -> str | None:
    """Only of one that the recipe says something of: what it does not say is fitted to the nodes."""
    section, key = (cluster.pool, "cluster.pool") if model else (cluster.tokenize, "cluster.tokenize")
    if section == type(section)():
        return None
    asked = pool_resources(cluster, model).each
    if any(_places(node, asked) for node in _nodes()):
        return None
    return f"{key}: an actor wants {_words(asked)}, and no node has that; nodes: {_words_of_nodes(asked)}"


def _words(amounts: Mapping[str, float]) -> str:
    parts = [
        name.removeprefix(ACCELERATOR) if name.startswith(ACCELERATOR) else f"{amount:g} {name}"
        for name, amount in amounts.items()
        if amount > ANY or (name.startswith(ACCELERATOR) and amount)
    ]
    return ", ".join(parts) or "nothing"


def _words_of_nodes(asked: Mapping[str, float]) -> str:
    """Of every node, the first few, what it has of that."""
    nodes = _nodes()
    told = [_words({name: node.get(name, 0.0) for name in asked}) for node in nodes[:NAMED]]
    return "; ".join(told) + (f"; and {len(nodes) - NAMED} more" if len(nodes) > NAMED else "")
