"""The resources of a run: shares that fit on the nodes, and an error at once for what never fits."""

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
    """The resources of the cluster's nodes, which a test fills."""
    resources: list[dict[str, float]] = []

    def total() -> dict[str, float]:
        names = {name for node in resources for name in node}
        return {name: sum(node.get(name, 0.0) for node in resources) for name in names}

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in resources])
    monkeypatch.setattr(ray, "cluster_resources", total)
    return resources


@pytest.mark.parametrize(
    ("present", "cluster", "share"),
    [
        ([{"CPU": 2}], {"num_workers": 2}, 0.9),
        ([{"CPU": 2}], {"num_workers": 1}, 1.8),
        ([{"CPU": 1}, {"CPU": 1}], {"num_workers": 2}, 0.9),
        # three nodes of eight: two workers with a third of all CPUs each would not fit
        ([SMALL] * 3, {"num_workers": 2}, 7.2),
        ([SMALL] * 3, {"num_workers": 4}, 3.6),
        ([SMALL, {"CPU": 2}], {"num_workers": 2}, 3.6),
        # the CPUs of a large head without GPUs are of no use to GPU workers
        ([{"CPU": 96}, LARGE, LARGE], {"num_workers": 16, "use_gpu": True}, 10.8),
        ([LARGE, LARGE], {"num_workers": 2, "use_gpu": True}, 86.4),
        ([SMALL], {"num_workers": 2, "cpus": 4}, 1.8),
        ([SMALL], {"num_workers": 2, "cpus_per_worker": 1}, 1),
    ],
)
def test_a_workers_share_of_cpus_is_the_largest_with_which_all_fit(
    present: list[dict[str, float]], cluster: dict[str, Any], share: float, nodes: list[dict[str, float]]
) -> None:
    nodes.extend(present)
    config = ClusterConfig(**cluster)
    assert cpus_per_worker(config) == pytest.approx(share)
    require_resources(config)


def test_a_worker_reserves_the_resources_that_select_its_nodes(nodes: list[dict[str, float]]) -> None:
    nodes.extend([LARGE | {"fast": 8.0}, LARGE])
    cluster = ClusterConfig(num_workers=4, use_gpu=True, train={"custom": {"fast": 2}, "accelerator": "A100"})
    assert worker_resources(cluster) == {"CPU": 21.6, "GPU": 1.0, "fast": 2.0}
    require_resources(cluster)
    with pytest.raises(UserError, match=r"cluster\.num_workers: 5 .* 2 fast, A100 .* 4 "):
        require_resources(cluster.model_copy(update={"num_workers": 5}))


@pytest.mark.parametrize(
    ("present", "cluster", "message"),
    [
        ([{}], {}, r"cluster\.num_workers: .*1 CPUs.* 0;"),  # a head with no CPUs
        ([SMALL], {"num_workers": 9}, r"cluster\.num_workers: .*9 CPUs.* 8;"),
        ([SMALL], {"use_gpu": True}, r"cluster\.num_workers: .*1 GPUs.* 0;.*use_gpu: false"),
        ([SMALL] * 2, {"cpus_per_worker": 9}, r"cluster\.num_workers: .*9 CPU .* 0 .*: 8 CPU; 8 CPU$"),
        ([SMALL], {"cpus": 9}, r"cluster\.cpus: 9, .* 8$"),
        ([LARGE], {"use_gpu": True, "train": {"accelerator": "H100"}}, r"cluster\.num_workers: .*1 GPU, H100 .* 0 "),
        ([LARGE], {"use_gpu": True, "pool": {"accelerator": "L4"}}, r"cluster\.pool: .*L4,"),
        ([SMALL], {"tokenize": {"custom": {"far": 1}}}, r"cluster\.tokenize: .*1 CPU, 1 far,"),
        ([SMALL], {"pool": {"cpus": 16}}, r"cluster\.pool: .*16 CPU,"),
    ],
)
def test_a_request_that_never_fits_is_refused_with_the_nodes(
    present: list[dict[str, float]], cluster: dict[str, Any], message: str, nodes: list[dict[str, float]]
) -> None:
    nodes.extend(present)
    with pytest.raises(UserError, match=message):
        require_resources(ClusterConfig(**cluster))


@pytest.mark.parametrize("head", [SMALL, {}], ids=["a head", "a head without CPUs"])
def test_require_resources_waits_for_an_autoscalers_nodes(
    head: dict[str, float], nodes: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Any] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: requests.append(bundles))
    monkeypatch.setattr(time, "sleep", lambda _: nodes.append(dict(LARGE)))
    nodes.append(dict(head))
    require_resources(ClusterConfig(num_workers=16, use_gpu=True, wait_s=100))
    assert requests == [[{"CPU": 1.0, "GPU": 1.0}] * 16, []]  # a request that stays keeps the nodes
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(UserError, match=r"17 GPUs.* 10 s: cluster\.wait_s"):
        require_resources(ClusterConfig(num_workers=17, use_gpu=True, wait_s=10))
    assert now[0] >= 10
    assert requests[2:] == [[{"CPU": 1.0, "GPU": 1.0}] * 17, []]


@pytest.mark.parametrize(
    ("present", "cluster", "model", "actors", "cpus", "gpus"),
    [
        ([SMALL], {}, True, 8, 1, 0),
        ([SMALL], {"pool_actors": 2}, True, 2, 4, 0),
        ([SMALL], {"pool_actors": 2}, False, 8, 1, 0),
        ([SMALL], {"pool": {"cpus": 4}}, True, 2, 4, 0),
        ([SMALL], {"tokenize": {"cpus": 2}}, False, 4, 2, 0),
        ([{"CPU": 1}, {"CPU": 1}], {"pool_actors": 1}, True, 1, 1, 0),  # no node has the two CPUs of one actor
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
def test_the_size_of_a_pool(
    present: list[dict[str, float]],
    cluster: dict[str, Any],
    model: bool,
    actors: int,
    cpus: float,
    gpus: float,
    nodes: list[dict[str, float]],
) -> None:
    nodes.extend(present)
    pool = pool_resources(ClusterConfig(**cluster), model)
    assert (pool.actors, pool.cpus, pool.gpus) == (actors, cpus, gpus)


def test_the_options_of_a_pools_actors_are_rays(nodes: list[dict[str, float]]) -> None:
    nodes.append(dict(LARGE) | {"far": 4.0})
    section = {"accelerator": "A100", "custom": {"far": 0.5}, "placement": "SPREAD"}
    assert pool_resources(ClusterConfig(use_gpu=True, pool=section), True).options == {
        "resources": {"far": 0.5},
        "accelerator_type": "A100",
        "scheduling_strategy": "SPREAD",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.pool.gpus=1", "pool.gpus needs use_gpu"),
        ("cluster.pool.placement=STRICT_PACK", "cluster.pool.placement"),
        ("cluster.train.gpus=2", "cluster.train.gpus: unknown key"),
        ("cluster.train.custom={a: 0}", "cluster.train.custom"),
    ],
)
def test_invalid_settings_name_their_key(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe({"model": {"id": "m"}, "loss": {"type": "kldo"}, "optim": {"steps": 3}}, [override])
