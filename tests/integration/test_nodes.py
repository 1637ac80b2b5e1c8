"""Whole runs on several nodes with their own addresses and disks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.nodes import BRIDGE, Nodes, permitted, several_nodes
from helpers.small_run import recipe_of, write_wide
from raydiv.config import Recipe, save_recipe
from raydiv.runs.directory import RunDirectory

pytestmark = [pytest.mark.long, pytest.mark.skipif(not permitted(), reason="network namespaces are not permitted")]

ONE_A_NODE = ("cluster.cpus_per_worker=1", f"cluster.env={{GLOO_SOCKET_IFNAME: {BRIDGE}}}")
"""A whole CPU for each worker puts each on its own node of one CPU; gloo needs the name of the shared network."""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """A head with one CPU."""
    with several_nodes(tmp_path) as nodes:
        nodes.start(cpus=1)
        nodes.wait_for(1)
        yield nodes


def train_on(nodes: Nodes, recipe: Recipe, path: Path) -> subprocess.CompletedProcess[str]:
    save_recipe(recipe, path)
    return nodes.run("-m", "raydiv", "train", str(path))


def test_workers_on_two_nodes_train_together(
    nodes: Nodes, tmp_path: Path, tiny_model: Path, files: dict[str, str]
) -> None:
    nodes.add(cpus=1)
    nodes.wait_for(2)
    recipe = recipe_of(tiny_model, files, tmp_path / "runs", "spread", "engine.zero_stage=3", *ONE_A_NODE)
    ended = train_on(nodes, recipe, tmp_path / "recipe.yaml")
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"2 workers on 2 nodes; .*all-reduce.* GB/s", ended.stderr)
    assert RunDirectory.of(recipe).metrics.steps_taken() == 4


def test_an_output_dir_that_nodes_do_not_share_is_refused_before_anything_is_computed(
    nodes: Nodes, tmp_path: Path, tiny_model: Path, files: dict[str, str]
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    nodes.add(cpus=1, disk=runs)
    nodes.wait_for(2)
    ended = train_on(nodes, recipe_of(tiny_model, files, runs, "apart", *ONE_A_NODE), tmp_path / "recipe.yaml")
    assert ended.returncode == 2, ended.stderr
    assert re.search(rf"output_dir: .*{runs} ", ended.stderr)
    assert list(runs.iterdir()) == []


ACTORS = """
import json, ray
ray.init(log_to_driver=False, logging_level=50)
addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
actors = ray._private.state.actors().values()
print(json.dumps([[actor["ActorClassName"], addresses[actor["Address"]["NodeID"]]] for actor in actors]))
"""
"""Prints every actor of the cluster, with its node's address."""


def test_pools_run_on_the_selected_node_and_workers_on_the_others(
    nodes: Nodes, tmp_path: Path, tiny_model: Path, files: dict[str, str]
) -> None:
    """Nodes are selected by custom resources, as by the groups of a cluster; no key sets the number of CPUs."""
    for number, (cpus, resource) in enumerate([(1, "trainer"), (1, "trainer"), (2, "helper")], 2):
        nodes.add(cpus, f'--resources={{"{resource}":{cpus}}}')
        nodes.wait_for(number)
    selectors = (
        "cluster.train.custom={trainer: 1}",
        "cluster.pool.custom={helper: 1}",
        "cluster.tokenize.custom={helper: 1}",
    )
    prompts = files["prompts"]
    measured = (f"separation.prompts={prompts}", f"evaluate.prompts={prompts}", "evaluate.max_new_tokens=4")
    overrides = (*selectors, *measured, ONE_A_NODE[1])
    recipe = recipe_of(tiny_model, files, tmp_path / "runs", "groups", *overrides)
    ended = train_on(nodes, recipe, tmp_path / "recipe.yaml")
    assert ended.returncode == 0, ended.stderr
    addresses: dict[str, set[str]] = {}
    for kind, address in json.loads(nodes.run("-c", ACTORS).stdout):
        addresses.setdefault(kind, set()).add(address)
    assert addresses.pop("RayTrainWorker") == {"10.213.0.2", "10.213.0.3"}
    pools = [found for kind, found in addresses.items() if kind.startswith(("ModelActor", "MapWorker"))]
    assert pools, addresses
    assert set().union(*pools) == {"10.213.0.4"}


@contextmanager
def peak_disk_usage(folder: Path) -> Iterator[list[int]]:
    """Running maximum of a disk's used bytes while the block runs."""
    ended, peaks = threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.1):
            peaks.append(max(peaks[-1], shutil.disk_usage(folder).used))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("size", [400, 16])
def test_objects_spill_to_a_nodes_disk_and_a_full_disk_is_reported(
    size: int, nodes: Nodes, tmp_path: Path, tiny_model: Path, files: dict[str, str]
) -> None:
    """144 MB of rows through object stores of 80 MiB, tokenized on the node with the small disk."""
    spill, data = tmp_path / "spill", tmp_path / "wide.parquet"
    spill.mkdir()
    write_wide(data)
    small = f"--object-store-memory={80 * 2**20} --object-spilling-directory={spill}"
    node = nodes.add(2, f'{small} --resources={{"helper":2}}', disk=spill, size=f"{size}m")
    nodes.wait_for(2)
    changes = (
        "cluster.num_workers=1",
        "cluster.tokenize.custom={helper: 1}",
        "loss={type: sft, mix: null}",
        "data.eval=null",
    )
    recipe = recipe_of(tiny_model, files | {"train": str(data)}, tmp_path / "runs", "r", *changes)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    # the disk as mounted in the node's namespace
    with peak_disk_usage(Path(f"/proc/{node.pid}/root{spill}")) as peaks:
        ended = nodes.run("-m", "raydiv", "prepare", str(tmp_path / "recipe.yaml"), "--json")
    if size > 144:
        assert peaks[-1] > 10 * 2**20
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["train"]["examples"] == 2400
    else:
        assert ended.returncode == 1, ended.stderr
        assert "Ray's object store is full, and so is the disk" in ended.stderr.splitlines()[-1]
