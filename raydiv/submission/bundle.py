"""What goes with a command to a cluster: its recipe with what that extends, and the files here that it names.

A relative path is of this machine: what it names goes along, and lies at the same path there. Absolute paths and addresses are
the cluster's. So a run's output_dir has to be one of these: a job's own folder is on one node, and goes when the job does.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from raydiv.config import Recipe, load_recipe
from raydiv.config.load import merged
from raydiv.config.tree import leaves
from raydiv.errors import UserError

MOST_BYTES = 100 * 2**20
"""Of files that go with a job. Ray keeps them in the memory of the head node."""

NEVER = (
    ".git",
    ".hg",
    ".svn",
    ".venv",
    "venv",
    "__pycache__",
    "*.pyc",
    ".*_cache",
    "node_modules",
    "wandb",
    "mlruns",
    "mlartifacts",
)
"""Folders and files that are no data: left out of a folder that goes along."""

SECRET = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "id_rsa*",
    "id_ed25519*",
    ".netrc",
    ".aws",
    ".ssh",
    ".kube",
    "*credentials*",
    "*auth_token*",
)
"""Names of files that hold secrets: they go nowhere."""

PLACES = ("model", "data", "separation", "evaluate", "sweep", "study", "loss")
"""Sections whose words may be names of files."""

RECIPE = "recipe.yaml"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder that goes with a command, and the command as it runs there.

    ``files`` are those in it, by their path, with their bytes; ``there``: absolute paths that the cluster is to have;
    ``recipe``: that of the command, checked.
    """

    folder: Path
    words: list[str]
    files: dict[str, int]
    there: list[str]
    recipe: Recipe | None


@contextmanager
def bundled(
    words: Sequence[str], recipe: str | None, overrides: Sequence[str], *, leaves_a_run: bool
) -> Iterator[Bundle]:
    """The bundle of a command, ``words``, while the block runs. ``recipe`` and ``overrides`` are those among the words.

    ``leaves_a_run``: the command writes into the recipe's output_dir.

    Raises UserError where the recipe is wrong, an output_dir is relative, a path leads out of this folder or to a secret, or
    there is too much.
    """
    with TemporaryDirectory(prefix="raydiv-job-") as temporary:
        folder = Path(temporary)
        there: list[str] = []
        named: dict[str, str] = {}
        kept = [word for word in words if word not in overrides]
        checked = None
        if recipe is not None:
            tree = merged(recipe, overrides)
            checked = load_recipe(recipe, overrides)
            if leaves_a_run and not _of_the_cluster(checked.output_dir):
                raise UserError(
                    f"output_dir: {checked.output_dir} is relative, and a job's own folder goes when the job does: say a "
                    "folder that all nodes of the cluster share (output_dir=/shared/runs)"
                )
            (folder / RECIPE).write_text(yaml.safe_dump(tree, sort_keys=False))
            for path, value in leaves({section: tree[section] for section in PLACES if section in tree}):
                named.setdefault(str(value), path) if isinstance(value, str) else None
            kept[kept.index(recipe)] = RECIPE
        for word in kept[1:]:
            if word != RECIPE:
                named.setdefault(word.rpartition("=")[2], word)
        for value, where in named.items():
            if _of_the_cluster(value):
                there += [value] if "://" not in value else []
            elif _exists(value):
                _put(value, where, folder)
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        _require_few(files)
        yield Bundle(folder, kept, files, there, checked)


def _of_the_cluster(value: str) -> bool:
    return value.startswith(("/", "~")) or "://" in value


def _exists(value: str) -> bool:
    try:
        return bool(value) and Path(value).exists()
    except OSError:  # a text, such as a template, is no name
        return False


def _put(value: str, where: str, folder: Path) -> None:
    """Copy what a relative path names to the same path in the bundle."""
    source, here = Path(value), Path.cwd().resolve()
    if not source.resolve().is_relative_to(here) or ".." in source.parts:
        raise UserError(
            f"{where}: {value} is not in this folder ({here}): start from one that it is in, or say an absolute path that the "
            "cluster has"
        )
    if _matches(source.parts, SECRET):
        raise UserError(f"{where}: {value} has the name of a secret, and goes nowhere; rename it if it is none")
    target = folder / source
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=_left_out, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def _left_out(folder: str, names: Iterable[str]) -> set[str]:
    """Of a folder's entries, those that go nowhere: links that lead out of it too."""
    here = Path.cwd().resolve()
    inside = Path(folder)
    return {
        name
        for name in names
        if _matches([name], (*NEVER, *SECRET))
        or not (inside / name).resolve().is_relative_to(here)
        or ((inside / name / RECIPE).is_file() and (inside / name / "metrics.jsonl").is_file())
    }


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for name in names for pattern in patterns)


def _require_few(files: Mapping[str, int]) -> None:
    total = sum(files.values())
    if total > MOST_BYTES:
        largest = max(files, key=lambda name: files[name])
        raise UserError(
            f"{total / 2**20:.0f} MiB of files would go with the job ({largest}: {files[largest] / 2**20:.0f}), more than "
            f"{MOST_BYTES / 2**20:.0f}: put them where every node reads them (s3://..., gs://..., hf://..., or a shared folder "
            "by its absolute path), and say that in their place"
        )
