"""What a run takes of a cluster: shares that find a place on its nodes, and what can never be had said at once."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray

from raydiv.config import load_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.runtime.resources import cpus_per_worker, pool_resources, require_resources, worker_resources
from raydiv.utils.errors import UserError

SMALL, LARGE = {"CPU": 8.0}, {"CPU": 96.0, "GPU": 8.0, "accelerator_type:A100": 1.0}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The resources of the nodes that there are."""
    found: list[dict[str, float]] = []

    def together() -> dict[str, float]:
        names = {name for node in found for name in node}
        return {name: sum(node.get(name, 0.0) for node in found) for name in names}

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in found])
    monkeypatch.setattr(ray, "cluster_resources", together)
    return found


@pytest.mark.parametrize(
    ("there", "cluster", "share"),
    [
        ([{"CPU": 2}], {"num_workers": 2}, 0.9),
        ([{"CPU": 2}], {"num_workers": 1}, 1.8),
        ([{"CPU": 1}, {"CPU": 1}], {"num_workers": 2}, 0.9),
        # three nodes of eight: two workers that take a third of all CPUs each would find no place
        ([SMALL] * 3, {"num_workers": 2}, 7.2),
        ([SMALL] * 3, {"num_workers": 4}, 3.6),
        ([SMALL, {"CPU": 2}], {"num_workers": 2}, 3.6),
        # a large head without GPUs lends its CPUs to nobody
        ([{"CPU": 96}, LARGE, LARGE], {"num_workers": 16, "use_gpu": True}, 10.8),
        ([LARGE, LARGE], {"num_workers": 2, "use_gpu": True}, 86.4),
        ([SMALL], {"num_workers": 2, "cpus": 4}, 1.8),
        ([SMALL], {"num_workers": 2, "cpus_per_worker": 1}, 1),
    ],
)
def test_a_workers_share_of_cpus_is_the_most_that_all_find_on_a_node(
    there: list[dict[str, float]], cluster: dict[str, Any], share: float, nodes: list[dict[str, float]]
) -> None:
    nodes.extend(there)
    made = ClusterConfig(**cluster)
    assert cpus_per_worker(made) == pytest.approx(share)
    require_resources(made)


def test_a_worker_reserves_what_tells_its_nodes_apart(nodes: list[dict[str, float]]) -> None:
    nodes.extend([LARGE | {"fast": 8.0}, LARGE])
    cluster = ClusterConfig(num_workers=4, use_gpu=True, train={"custom": {"fast": 2}, "accelerator": "A100"})
    assert worker_resources(cluster) == {"CPU": 21.6, "GPU": 1.0, "fast": 2.0}
    require_resources(cluster)
    with pytest.raises(UserError, match=r"5 workers with .* 2 fast, A100 each, and there is room for 4"):
        require_resources(cluster.model_copy(update={"num_workers": 5}))


@pytest.mark.parametrize(
    ("there", "cluster", "said"),
    [
        ([{}], {}, "1 workers need 1 CPUs, and the cluster has 0"),  # a head that computes nothing
        ([SMALL], {"num_workers": 9}, "9 workers need 9 CPUs, and the cluster has 8"),
        (
            [SMALL],
            {"use_gpu": True},
            r"1 workers need 1 GPUs, and the cluster has 0; lower it \(or set use_gpu: false\)",
        ),
        (
            [SMALL] * 2,
            {"cpus_per_worker": 9},
            r"1 workers with 9 CPU each, and there is room for 0 .*nodes: 8 CPU; 8 CPU",
        ),
        ([SMALL], {"cpus": 9}, r"cluster\.cpus: 9, and the cluster has 8"),
        ([LARGE], {"use_gpu": True, "train": {"accelerator": "H100"}}, r"1 GPU, H100 each, and there is room for 0"),
        ([LARGE], {"use_gpu": True, "pool": {"accelerator": "L4"}}, r"cluster\.pool: an actor wants .*L4, and no node"),
        ([SMALL], {"tokenize": {"custom": {"far": 1}}}, r"cluster\.tokenize: an actor wants 1 CPU, 1 far, and no node"),
        ([SMALL], {"pool": {"cpus": 16}}, r"cluster\.pool: an actor wants 16 CPU, and no node"),
    ],
)
def test_what_can_never_be_had_is_said_with_what_is_there(
    there: list[dict[str, float]], cluster: dict[str, Any], said: str, nodes: list[dict[str, float]]
) -> None:
    nodes.extend(there)
    with pytest.raises(UserError, match=said):
        require_resources(ClusterConfig(**cluster))


@pytest.mark.parametrize("head", [SMALL, {}], ids=["a head", "one that computes nothing"])
def test_nodes_that_an_autoscaler_brings_are_waited_for(
    head: dict[str, float], nodes: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(time, "sleep", lambda _: nodes.append(dict(LARGE)))
    nodes.append(dict(head))
    require_resources(ClusterConfig(num_workers=16, use_gpu=True, wait_s=100))
    assert asked == [[{"CPU": 1.0, "GPU": 1.0}] * 16, []]  # a request that stayed would keep the nodes
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(UserError, match=r"17 workers need 17 GPUs, .*after 10 s: cluster\.wait_s"):
        require_resources(ClusterConfig(num_workers=17, use_gpu=True, wait_s=10))
    assert now[0] >= 10
    assert asked[2:] == [[{"CPU": 1.0, "GPU": 1.0}] * 17, []]


@pytest.mark.parametrize(
    ("there", "cluster", "model", "actors", "cpus", "gpus"),
    [
        ([SMALL], {}, True, 8, 1, 0),
        ([SMALL], {"pool_actors": 2}, True, 2, 4, 0),
        ([SMALL], {"pool_actors": 2}, False, 8, 1, 0),
        ([SMALL], {"pool": {"cpus": 4}}, True, 2, 4, 0),
        ([SMALL], {"tokenize": {"cpus": 2}}, False, 4, 2, 0),
        ([{"CPU": 1}, {"CPU": 1}], {"pool_actors": 1}, True, 1, 1, 0),  # two CPUs of one actor are on no node
        ([LARGE], {"use_gpu": True}, True, 8, 1, 1),
        ([LARGE], {"use_gpu": True}, False, 96, 1, 0),
        ([LARGE], {"use_gpu": True, "pool": {"gpus": 0.5}}, True, 16, 1, 0.5),
        (
            [LARGE, SMALL | {"plain": 8.0}],
            {"use_gpu": True, "pool": {"gpus": 0, "custom": {"plain": 1}}},
            True,
            8,
            1,
            0,
        ),
    ],
)
def test_pools(
    there: list[dict[str, float]],
    cluster: dict[str, Any],
    model: bool,
    actors: int,
    cpus: float,
    gpus: float,
    nodes: list[dict[str, float]],
) -> None:
    nodes.extend(there)
    pool = pool_resources(ClusterConfig(**cluster), model)
    assert (pool.actors, pool.cpus, pool.gpus) == (actors, cpus, gpus)


def test_a_pool_is_placed_as_ray_has_it(nodes: list[dict[str, float]]) -> None:
    nodes.append(dict(LARGE) | {"far": 4.0})
    section = {"accelerator": "A100", "custom": {"far": 0.5}, "placement": "SPREAD"}
    assert pool_resources(ClusterConfig(use_gpu=True, pool=section), True).options == {
        "resources": {"far": 0.5},
        "accelerator_type": "A100",
        "scheduling_strategy": "SPREAD",
    }


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.pool.gpus=1", "pool.gpus needs use_gpu"),
        ("cluster.pool.placement=STRICT_PACK", "cluster.pool.placement"),
        ("cluster.train.gpus=2", "cluster.train.gpus: unknown key"),
        ("cluster.train.custom={a: 0}", "cluster.train.custom"),
    ],
)
def test_what_a_recipe_cannot_ask_for(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe({"model": {"id": "m"}, "loss": {"type": "kldo"}, "optim": {"steps": 3}}, [override])
