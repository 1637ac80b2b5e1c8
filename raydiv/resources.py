"""What a run takes of a cluster: how much of it, in which shares, and whether there is so much; needs a Ray session."""

from __future__ import annotations

from collections.abc import Mapping

from raydiv.config.recipe import Cluster
from raydiv.errors import UserError


def cpus(cluster: Cluster) -> float:
    """CPUs that a run may take: the cluster's, unless the recipe says fewer."""
    import ray

    return cluster.cpus or float(ray.cluster_resources().get("CPU", 1))


def cpus_per_worker(cluster: Cluster) -> float:
    """CPUs that a training worker reserves; by default an equal share of nine tenths, so that others can still start."""
    if cluster.cpus_per_worker is not None:
        return cluster.cpus_per_worker
    return round(0.9 * cpus(cluster) / cluster.num_workers, 3)


def threads_per_worker(cluster: Cluster) -> int:
    """Threads of a training worker: its share of the CPUs, rounded to whole ones."""
    return max(1, round(cpus_per_worker(cluster)))


def side_by_side(cluster: Cluster, at_most: int | None) -> tuple[int, Cluster]:
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


HOST_SHARE = 0.85
"""Of a node's memory, what training workers on CPUs may have, beside the driver, Ray's daemons and its object store."""


def worker_memory(cluster: Cluster) -> int:
    """Bytes of a training worker's GPU, or its share of a node's memory; ``cluster.worker_memory_gb`` where it is given."""
    import ray

    if cluster.worker_memory_gb is not None:
        return round(cluster.worker_memory_gb * 2**30)
    if cluster.use_gpu:
        return int(ray.get(ray.remote(num_gpus=1)(_gpu_memory).remote()))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    on_each = -(-cluster.num_workers // max(1, len(nodes)))
    return round(HOST_SHARE * min(_host_memory(node) for node in nodes) / on_each)


def _host_memory(node: Mapping[str, float]) -> float:
    """All memory of a node: Ray counts the object store's apart."""
    return node.get("memory", 0.0) + node.get("object_store_memory", 0.0)


def _gpu_memory() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def require_resources(cluster: Cluster) -> None:
    """Raise UserError when the cluster can never start the training workers."""
    import ray

    have = ray.cluster_resources()
    kind, each = ("GPU", 1.0) if cluster.use_gpu else ("CPU", cluster.cpus_per_worker or 1.0)
    wanted, there = cluster.fewest * each, have.get(kind, 0.0)
    if cluster.cpus is not None and cluster.cpus > have.get("CPU", 0.0):
        raise UserError(f"cluster.cpus: {cluster.cpus:g}, and the cluster has {have.get('CPU', 0.0):g}")
    if kind == "CPU":
        there = cpus(cluster)
    if wanted > there:
        key = "num_workers" if cluster.min_workers is None else "min_workers"
        owner = "the cluster has" if cluster.use_gpu or cluster.cpus is None else "cluster.cpus is"
        less = "(or set use_gpu: false)" if cluster.use_gpu else "or cluster.cpus_per_worker"
        raise UserError(
            f"cluster.{key}: {cluster.fewest} workers need {wanted:g} {kind}s, and {owner} {there:g}; "
            f"lower it {less}, or add nodes"
        )
