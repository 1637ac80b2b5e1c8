"""Whole runs on several nodes with addresses, and disks, of their own."""

from __future__ import annotations

import json
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

pytestmark = [pytest.mark.long, pytest.mark.skipif(not permitted(), reason="this machine lets us make no networks")]

APART = ("cluster.cpus_per_worker=1", f"cluster.env={{GLOO_SOCKET_IFNAME: {BRIDGE}}}")
"""A whole CPU for each worker puts them on nodes that have one each; gloo is told which network they share."""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """A head with one CPU."""
    with several_nodes(tmp_path) as found:
        found.start(cpus=1)
        found.wait_for(1)
        yield found


def trained(nodes: Nodes, recipe: Recipe, path: Path) -> subprocess.CompletedProcess[str]:
    save_recipe(recipe, path)
    return nodes.run("-m", "raydiv", "train", str(path))


def test_workers_on_two_nodes_train_together(
    nodes: Nodes, tmp_path: Path, tiny_model: Path, files: dict[str, str]
) -> None:
    nodes.add(cpus=1)
    nodes.wait_for(2)
    recipe = recipe_of(tiny_model, files, tmp_path / "runs", "spread", "engine.zero_stage=3", *APART)
    ended = trained(nodes, recipe, tmp_path / "recipe.yaml")
    assert ended.returncode == 0, ended.stderr
    assert "2 workers on 2 nodes; an all-reduce of theirs takes" in ended.stderr
    assert RunDirectory.of(recipe).metrics.steps_taken() == 4


def test_a_folder_that_is_another_on_the_other_node_is_refused_before_anything_is_computed(
    nodes: Nodes, tmp_path: Path, tiny_model: Path, files: dict[str, str]
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    nodes.add(cpus=1, own=runs)
    nodes.wait_for(2)
    ended = trained(nodes, recipe_of(tiny_model, files, runs, "apart", *APART), tmp_path / "recipe.yaml")
    assert ended.returncode == 2, ended.stderr
    assert f"output_dir: {runs} is not on" in ended.stderr
    assert "name a folder that all nodes share" in ended.stderr
    assert list(runs.iterdir()) == []


ACTORS = """
import json, ray
ray.init(log_to_driver=False, logging_level=50)
addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
found = [[actor["ActorClassName"], addresses[actor["Address"]["NodeID"]]] for actor in ray._private.state.actors().values()]
print(json.dumps(found))
"""
"""Every actor that there was, and its node's address."""


def test_models_and_tokenizers_stay_on_the_node_without_gpus_and_workers_on_the_others(
    nodes: Nodes, tmp_path: Path, tiny_model: Path, files: dict[str, str]
) -> None:
    """The nodes are told apart by custom resources, as those of a cluster's groups are; no key says how many CPUs."""
    for number, (cpus, words) in enumerate([(1, "trainer"), (1, "trainer"), (2, "helper")], 2):
        nodes.add(cpus, f'--resources={{"{words}":{cpus}}}')
        nodes.wait_for(number)
    apart = (
        "cluster.train.custom={trainer: 1}",
        "cluster.pool.custom={helper: 1}",
        "cluster.tokenize.custom={helper: 1}",
    )
    prompts = files["prompts"]
    measured = (f"separation.prompts={prompts}", f"evaluate.prompts={prompts}", "evaluate.max_new_tokens=4")
    overrides = (*apart, *measured, APART[1])
    recipe = recipe_of(tiny_model, files, tmp_path / "runs", "groups", *overrides)
    ended = trained(nodes, recipe, tmp_path / "recipe.yaml")
    assert ended.returncode == 0, ended.stderr
    where: dict[str, set[str]] = {}
    for kind, address in json.loads(nodes.run("-c", ACTORS).stdout):
        where.setdefault(kind, set()).add(address)
    assert where.pop("RayTrainWorker") == {"10.213.0.2", "10.213.0.3"}
    pools = {kind: addresses for kind, addresses in where.items() if kind.startswith("MapWorker")}
    assert pools, where
    assert set().union(*pools.values()) == {"10.213.0.4"}


@contextmanager
def most_used(folder: Path) -> Iterator[list[int]]:
    """Bytes that a disk had in use while the block ran, the most of them last."""
    over, found = threading.Event(), [0]

    def look() -> None:
        while not over.wait(0.1):
            found.append(max(found[-1], shutil.disk_usage(folder).used))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("size", [400, 16])
def test_objects_spill_to_a_nodes_small_disk_and_a_full_one_is_said(
    size: int, nodes: Nodes, tmp_path: Path, tiny_model: Path, files: dict[str, str]
) -> None:
    """144 MB of rows through stores of 80, where they are tokenized on the node with the small disk."""
    spill, data = tmp_path / "spill", tmp_path / "wide.parquet"
    spill.mkdir()
    write_wide(data)
    small = f"--object-store-memory={80 * 2**20} --object-spilling-directory={spill}"
    node = nodes.add(2, f'{small} --resources={{"helper":2}}', own=spill, size=f"{size}m")
    nodes.wait_for(2)
    changes = (
        "cluster.num_workers=1",
        "cluster.tokenize.custom={helper: 1}",
        "loss={type: sft, mix: null}",
        "data.eval=null",
    )
    recipe = recipe_of(tiny_model, files | {"train": str(data)}, tmp_path / "runs", "r", *changes)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    # as that node sees it
    with most_used(Path(f"/proc/{node.pid}/root{spill}")) as used:
        ended = nodes.run("-m", "raydiv", "prepare", str(tmp_path / "recipe.yaml"), "--json")
    if size > 144:
        assert used[-1] > 10 * 2**20
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["train"]["examples"] == 2400
    else:
        assert ended.returncode == 1, ended.stderr
        assert "Ray's object store is full, and so is the disk" in ended.stderr.splitlines()[-1]
