"""Before anything is computed: what would go wrong later, on whichever node, found in seconds."""

from __future__ import annotations

import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.commands.plan.architecture import Architecture, architecture_of
from raydiv.commands.plan.memory import sizes_on_disk
from raydiv.config import Recipe
from raydiv.utils.cache import shared_dir
from raydiv.utils.errors import UserError
from raydiv.utils.storage import Folder
from raydiv.utils.units import gib
from raydiv.utils.versions import versions

NODE_TIMEOUT_S = 120
"""Seconds that a node has to answer: it may have to unpack this raydiv first."""

SAME = ("python", "ray", "torch", "raydiv", "deepspeed", "transformers")
"""Versions in which nodes may not differ: what they send each other, and what they compute, goes by them."""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node found: its versions, of each folder why it is not the driver's (empty where it is), and what it has not."""

    host: str
    versions: dict[str, str]
    folders: dict[str, str]
    missing: list[str]


CACHE, PROBE = "RAYDIV_CACHE", ".raydiv-probe-"


def require_ready(recipe: Recipe, run: Path, files: Mapping[str, int], *, new: bool) -> None:
    """What ``require_nodes`` and, of a ``new`` run, ``require_disk_space`` ask of a training run in the directory ``run``."""
    folders = {"output_dir": Folder(str(run.parent)), CACHE: shared_dir()}
    if recipe.checkpoint.storage is not None:
        folders["checkpoint.storage"] = Folder(recipe.checkpoint.storage.rstrip("/"))
    require_nodes(folders, files)
    if new:
        require_disk_space(recipe, architecture_of(recipe), run)


def require_nodes(folders: Mapping[str, Folder], files: Mapping[str, int]) -> None:
    """Raise UserError where a node has other versions, or not the folders and files that all are to share; needs a Ray session.

    ``folders``: each by the key that names it; ``files``: bytes by path. On one node there is nothing to ask.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mine = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: node["NodeManagerHostname"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU") and node["NodeID"] != mine
    }
    if not others:
        return
    token = uuid.uuid4().hex
    with _left(folders, token):
        look = ray.remote(num_cpus=0, max_retries=0)(_look)
        asked = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                dict(folders), dict(files), token
            ): host
            for node, host in others.items()
        }
        _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_TIMEOUT_S)
        if silent:
            hosts = ", ".join(asked[one] for one in silent)
            raise RuntimeError(f"nodes of the cluster have not answered for {NODE_TIMEOUT_S} s: {hosts}")
        seen = [_answer(one, host) for one, host in asked.items()]
        problems = [*_versions_differ(seen), *_not_shared(seen, folders), *_missing(seen)]
    if problems:
        raise UserError("; ".join(problems))


def _answer(asked: Any, host: str) -> NodeReport:
    import ray

    try:
        seen: NodeReport = ray.get(asked)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"{host}, a node of the cluster, fails: {' '.join(str(error).split())[:300]}") from None
    return seen


@contextmanager
def _left(folders: Mapping[str, Folder], token: str) -> Iterator[None]:
    """A file of the driver's in each folder while the block runs, and no one's after it."""
    try:
        for key, folder in folders.items():
            try:
                folder.write(f"{PROBE}{token}", token.encode())
            except OSError as error:
                raise UserError(f"{key}: {folder.uri} cannot be written: {error.strerror or error}") from None
        yield
    finally:
        for folder in folders.values():
            with suppress(OSError):
                for name in folder.file_names(""):
                    if name.startswith(f"{PROBE}{token}"):
                        folder.remove_file(name)


def _look(folders: Mapping[str, Folder], files: Mapping[str, int], token: str) -> NodeReport:
    """Runs on the other node."""
    host, found = platform.node(), {}
    for key, folder in folders.items():
        found[key] = ""
        try:
            if folder.read(f"{PROBE}{token}").decode() != token:
                found[key] = "what lies there is another file"
            folder.write(f"{PROBE}{token}-{uuid.uuid4().hex}", host.encode())
        except OSError as error:
            found[key] = error.strerror or str(error)
        except UserError as error:  # a bucket that is not reached from there
            found[key] = str(error)
    missing = [path for path, size in files.items() if not Path(path).is_file() or Path(path).stat().st_size != size]
    return NodeReport(host, versions(), found, missing)


def _versions_differ(seen: list[NodeReport]) -> list[str]:
    here = versions()
    differ = [
        f"{name} is {one.versions[name]} on {one.host} and {here[name]} here"
        for one in seen
        for name in SAME
        if one.versions[name] != here[name]
    ]
    said = f"nodes have other versions ({', '.join(differ)}): install the same on all (cluster/constraints.txt)"
    return [said] if differ else []


def _not_shared(seen: list[NodeReport], folders: Mapping[str, Folder]) -> list[str]:
    problems = []
    for key, folder in folders.items():
        wrong = {one.host: one.folders[key] for one in seen if one.folders[key]}
        if wrong:
            host, why = next(iter(wrong.items()))
            problems.append(
                f"{key}: {folder.uri} is not on {host} what it is here ({why}): name a folder that all nodes share, and may "
                "write"
            )
    return problems


def _missing(seen: list[NodeReport]) -> list[str]:
    return [
        f"data: {one.missing[0]} is not on {one.host} what it is here: put it on storage that all nodes share"
        for one in seen
        if one.missing
    ][:1]


def require_disk_space(recipe: Recipe, architecture: Architecture, folder: Path) -> None:
    """Raise UserError where a new run in ``folder`` would fill its disk: with the model that it writes, and its checkpoints."""
    sizes, kept = sizes_on_disk(architecture, recipe), 0
    model, each = sizes["model"], sizes["checkpoint"]
    if recipe.checkpoint.storage is None:
        # the newest ones, one that is written meanwhile, and the best; without any of a time, that of SIGTERM
        best = recipe.checkpoint.best_metric is not None
        kept = 1 if recipe.checkpoint.every is None else recipe.checkpoint.keep + 1 + best
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if model + kept * each > free:
        raise UserError(
            f"output_dir: {there} has {gib(free)} free, and this run writes up to {gib(model + kept * each)} (a model of "
            f"{gib(model)}, and {kept} checkpoints of {gib(each)} at a time): free some, lower checkpoint.keep, or name "
            "another disk, for checkpoints as checkpoint.storage"
        )
