"""Whole runs on several nodes with addresses, and disks, of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import BRIDGE, Nodes, permitted, several_nodes
from small_run import recipe_of

from raydiv.config import Recipe, save_recipe
from raydiv.run import RunDirectory

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
    assert RunDirectory.of(recipe).steps_taken() == 4


def test_a_folder_that_is_another_on_the_other_node_is_refused_before_anything_is_computed(
    nodes: Nodes, tmp_path: Path, tiny_model: Path, files: dict[str, str]
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    nodes.add(cpus=1, own_folder=runs)
    nodes.wait_for(2)
    ended = trained(nodes, recipe_of(tiny_model, files, runs, "apart", *APART), tmp_path / "recipe.yaml")
    assert ended.returncode == 2, ended.stderr
    assert f"output_dir: {runs} is not on" in ended.stderr
    assert "name a folder that all nodes share" in ended.stderr
    assert list(runs.iterdir()) == []
