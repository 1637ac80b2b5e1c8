"""Checks before any computation: nodes, shared folders, data files and disk space, in seconds."""

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
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.storage import Folder
from raydiv.utils.units import size_text
from raydiv.utils.versions import versions

NODE_TIMEOUT_S = 120
"""Seconds that a node has for its report; it may have to unpack the job's files first."""

SAME_VERSIONS = ("python", "ray", "torch", "raydiv", "deepspeed", "transformers")
"""Packages that must have the same version on all nodes, for messages between nodes and for the results."""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """The report of a node: its versions, an error by folder (empty if shared), and the data files that it lacks."""

    host: str
    versions: dict[str, str]
    folders: dict[str, str]
    missing: list[str]


CACHE, PROBE = "RAYDIV_CACHE", ".raydiv-probe-"


def require_ready(recipe: Recipe, run: Path, files: Mapping[str, int], *, new: bool) -> None:
    """Check the nodes, and for a ``new`` run in the directory ``run`` the disk space. Raises as the two checks do."""
    folders = {"output_dir": Folder(str(run.parent)), CACHE: shared_dir()}
    if recipe.checkpoint.storage is not None:
        folders["checkpoint.storage"] = Folder(recipe.checkpoint.storage.rstrip("/"))
    require_nodes(folders, files)
    if new:
        require_disk_space(recipe, architecture_of(recipe), run)


def require_nodes(folders: Mapping[str, Folder], files: Mapping[str, int]) -> None:
    """Check that all nodes have the same versions and share ``folders`` (by recipe key) and ``files`` (size by path).

    Needs a Ray session; does nothing on one node. Raises UserError for a node that differs, RuntimeError for one that
    fails.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    driver = ray.get_runtime_context().get_node_id()
    hosts = {
        node["NodeID"]: node["NodeManagerHostname"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU") and node["NodeID"] != driver
    }
    if not hosts:
        return
    token = uuid.uuid4().hex
    with _probe_files(folders, token):
        inspect = ray.remote(num_cpus=0, max_retries=0)(_inspect_node)
        tasks = {
            inspect.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                dict(folders), dict(files), token
            ): host
            for node, host in hosts.items()
        }
        _, unfinished = ray.wait(list(tasks), num_returns=len(tasks), timeout=NODE_TIMEOUT_S)
        if unfinished:
            silent = ", ".join(tasks[task] for task in unfinished)
            raise RuntimeError(f"nodes of the cluster have not answered for {NODE_TIMEOUT_S} s: {silent}")
        reports = [_get_report(task, host) for task, host in tasks.items()]
        problems = _version_problems(reports) + _folder_problems(reports, folders) + _missing_file_problems(reports)
    if problems:
        raise UserError("; ".join(problems))


def _get_report(task: Any, host: str) -> NodeReport:
    import ray

    try:
        report: NodeReport = ray.get(task)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"{host}, a node of the cluster, fails: {one_line(error, 300)}") from None
    return report


@contextmanager
def _probe_files(folders: Mapping[str, Folder], token: str) -> Iterator[None]:
    """A file of the driver in each folder while the block runs; afterwards all probe files are removed."""
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


def _inspect_node(folders: Mapping[str, Folder], files: Mapping[str, int], token: str) -> NodeReport:
    """Runs on another node: read the driver's file in each folder, and write one."""
    host, errors = platform.node(), dict.fromkeys(folders, "")
    for key, folder in folders.items():
        try:
            if folder.read(f"{PROBE}{token}").decode() != token:
                errors[key] = "the driver's probe file has other content"
            folder.write(f"{PROBE}{token}-{uuid.uuid4().hex}", host.encode())
        except OSError as error:
            errors[key] = error.strerror or str(error)
        except UserError as error:  # a bucket that this node cannot reach
            errors[key] = str(error)
    missing = [path for path, size in files.items() if not Path(path).is_file() or Path(path).stat().st_size != size]
    return NodeReport(host, versions(), errors, missing)


def _version_problems(reports: list[NodeReport]) -> list[str]:
    here = versions()
    differences = [
        f"{name} is {report.versions[name]} on {report.host} and {here[name]} here"
        for report in reports
        for name in SAME_VERSIONS
        if report.versions[name] != here[name]
    ]
    if not differences:
        return []
    return [
        f"nodes have different versions ({', '.join(differences)}): install the same on all (cluster/constraints.txt)"
    ]


def _folder_problems(reports: list[NodeReport], folders: Mapping[str, Folder]) -> list[str]:
    problems = []
    for key, folder in folders.items():
        errors = {report.host: report.folders[key] for report in reports if report.folders[key]}
        if errors:
            host, error = next(iter(errors.items()))
            problems.append(
                f"{key}: {host} does not see the same {folder.uri} as the driver ({error}): use storage that all nodes "
                "mount and can write to"
            )
    return problems


def _missing_file_problems(reports: list[NodeReport]) -> list[str]:
    return [
        f"data: {report.host} does not see the same {report.missing[0]} as the driver: use storage that all nodes mount"
        for report in reports
        if report.missing
    ][:1]


def require_disk_space(recipe: Recipe, architecture: Architecture, run: Path) -> None:
    """Raise UserError where the model and checkpoints of a new run in the directory ``run`` would fill its disk."""
    sizes, checkpoints = sizes_on_disk(architecture, recipe), 0
    if recipe.checkpoint.storage is None:
        # those kept, one being written, and the best one; without checkpoint.every the one at SIGTERM
        best = recipe.checkpoint.best_metric is not None
        checkpoints = 1 if recipe.checkpoint.every is None else recipe.checkpoint.keep + 1 + best
    total = sizes["model"] + checkpoints * sizes["checkpoint"]
    folder = next(parent for parent in (run, *run.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise UserError(
            f"output_dir: {folder} has {size_text(free)} free, and this run writes up to {size_text(total)} (model "
            f"{size_text(sizes['model'])}, {checkpoints} checkpoints of {size_text(sizes['checkpoint'])}): free some "
            "space, lower checkpoint.keep, or set another output_dir or checkpoint.storage"
        )
