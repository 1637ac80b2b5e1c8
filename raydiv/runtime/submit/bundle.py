"""What goes with a command to a cluster: its recipe with what that extends, and the files here that it names.

A relative path is of this machine: what it names goes along, and lies at the same path there. Absolute paths and addresses are
the cluster's. So a run's output_dir has to be one of these: a job's own folder is on one node, and goes when the job does.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from raydiv.config import Recipe, load_recipe
from raydiv.config.evaluate import JUDGES
from raydiv.config.load import merged
from raydiv.config.source import SUFFIXES
from raydiv.utils.dotted import leaves
from raydiv.utils.errors import UserError

MAX_BUNDLE_BYTES = 100 * 2**20
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
    ".gitignore",
    ".rayignore",
)
"""Folders and files that are no data: left out of a folder that goes along. By the last two Ray would leave out data itself."""

SECRET = (
    ".env",
    ".env.*",
    ".envrc",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "id_rsa*",
    "id_ecdsa*",
    "id_ed25519*",
    ".netrc",
    ".npmrc",
    ".pypirc",
    ".aws",
    ".ssh",
    ".kube",
    "*credentials*",
    "*secret*",
    "*api_key*",
    "*auth_token*",
    "hf_token*",
    "token",
    "*.token",
)
"""Names of files that hold secrets, in small letters: they go nowhere."""

PLACES = ("model", "data", "separation", "evaluate", "sweep", "study")
"""Sections whose words may be names of files."""

INCLUDED = "study.include."
"""Where finished runs are wanted, and nothing else."""

CHOICE_OPTIONS = ("--part", "--against", "--kind", "--pooling", "--intervals", "--precision")
"""Options of commands whose values are words that raydiv knows, and so no names of files."""

MODELS = ("model", *JUDGES)
"""What stands before a colon and a model's id or directory: ``data build --worse model:DIR``, ``--judge harmbench:DIR``."""

NOT_UPLOADED = (
    "finished runs do not go along with a job, nor do caches and secrets: say an absolute path that the cluster has"
)

RECIPE = "recipe.yaml"


@dataclass(frozen=True, slots=True)
class JobBundle:
    """A folder that goes with a command, and the command as it runs there.

    ``files`` are those in it, by their path, with their bytes; ``there``: absolute paths that the cluster is to have;
    ``recipe``: that of the command, checked; ``secrets``: what was left out of folders for its name.
    """

    folder: Path
    command: list[str]
    files: dict[str, int]
    remote_paths: list[str]
    recipe: Recipe | None
    secrets: list[str]


@contextmanager
def make_bundle(
    words: Sequence[str], recipe: str | None, overrides: Sequence[str], *, leaves_a_run: bool
) -> Iterator[JobBundle]:
    """The bundle of a command, ``words``, while the block runs. ``recipe`` and ``overrides`` are those among the words.

    ``leaves_a_run``: the command writes into the recipe's output_dir.

    Raises UserError where the recipe is wrong, an output_dir is relative, a path leads out of this folder or to a secret,
    nothing of a folder would go along, or there is too much.
    """
    checked = None if recipe is None else _checked(recipe, overrides, leaves_a_run)
    tree = merged({} if recipe is None else recipe, overrides)
    # without a recipe nothing else carries the overrides
    kept = list(words) if recipe is None else _renamed([word for word in words if word not in overrides], recipe)
    with TemporaryDirectory(prefix="raydiv-job-") as temporary:
        folder = Path(temporary)
        there: list[str] = []
        secrets: list[str] = []
        named = _named(tree, [word for word in kept if word not in overrides])
        if recipe is not None:
            named.pop(RECIPE, None)
        for value, where in named.items():
            if _of_the_cluster(value):
                there += [value] if "://" not in value else []
            else:
                for path in _here(value):
                    secrets += _put(path, where, folder)
        if recipe is not None:  # last, since a folder that goes along may have a file of this name
            (folder / RECIPE).write_text(yaml.safe_dump(tree, sort_keys=False))
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        _require_few(files)
        yield JobBundle(folder, kept, files, there, checked, list(dict.fromkeys(secrets)))


def _checked(recipe: str, overrides: Sequence[str], leaves_a_run: bool) -> Recipe:
    checked = load_recipe(recipe, overrides)
    kept = {"output_dir": checked.output_dir, "checkpoint.storage": checked.checkpoint.storage}
    for key, place in kept.items():
        if leaves_a_run and place is not None and not _of_the_cluster(place):
            raise UserError(f"{relative_path_error(key, place)} ({key}=/shared/runs)")
    return checked


def relative_path_error(where: str, place: str) -> str:
    """What is wrong with a relative place that a job writes to."""
    return (
        f"{where}: {place} is relative, and a job's own folder goes when the job does: say a folder that all nodes of the "
        "cluster share"
    )


def _renamed(words: list[str], recipe: str) -> list[str]:
    """A command with the bundle's recipe in the place of its own, which stands by itself or behind ``--recipe=``."""
    own = next(number for number, word in enumerate(words) if number and word in (recipe, _option(word) + recipe))
    return [*words[:own], words[own].removesuffix(recipe) + RECIPE, *words[own + 1 :]]


def _option(word: str) -> str:
    """``--option=`` of a word that begins so."""
    name, equals, _ = word.partition("=")
    return name + equals if name.startswith("--") else ""


def _named(tree: Mapping[str, Any], words: Sequence[str]) -> dict[str, str]:
    """What may be the name of a file in a recipe and in a command, and where each stands first."""
    found: dict[str, str] = {}
    for path, value in leaves({section: tree[section] for section in PLACES if section in tree}):
        if isinstance(value, str):
            found.setdefault(_place(value), path)
    command = 2 if words[0] == "data" else 1
    for before, word in pairwise(words[command - 1 :]):
        if before not in CHOICE_OPTIONS and word.partition("=")[0] not in CHOICE_OPTIONS:
            for value in _values(word):
                found.setdefault(_place(value), word)
    return found


def _values(word: str) -> Iterator[str]:
    """A word of a command and what follows each of its ``=``, as in ``--attack=templates=FILE``; of a section its leaves."""
    parts = word.split("=")
    for number in range(len(parts)):
        text = "=".join(parts[number:])
        if not text.lstrip().startswith("{"):
            yield text
            continue
        try:
            section = yaml.safe_load(text)
        except yaml.YAMLError:  # Jinja text, or nothing that the command could read
            continue
        yield from (value for _, value in leaves(section) if isinstance(value, str))


def _place(value: str) -> str:
    """A value as a path, without what a model is for."""
    kind, _, model = value.partition(":")
    return model if kind in MODELS and model else value


def _of_the_cluster(value: str) -> bool:
    return value.startswith(("/", "~")) or "://" in value


def _here(value: str) -> list[str]:
    """What of this machine a relative path names: a file, a folder, or the files of data that a pattern matches."""
    if not value:
        return []
    try:
        if Path(value).exists():
            return [value]
    except OSError:  # a text, such as a template, is no name
        return []
    found = sorted(glob.glob(value, recursive=True)) if glob.has_magic(value) else []
    return [path for path in found if Path(path).suffix in SUFFIXES and Path(path).is_file()]


def _put(value: str, where: str, folder: Path) -> list[str]:
    """Copy what a relative path names to the same path in the bundle; returns what it leaves out as secrets."""
    source, here = Path(value), Path.cwd().resolve()
    if not source.resolve().is_relative_to(here) or ".." in source.parts:
        raise UserError(
            f"{where}: {value} is not in this folder ({here}): start from one that it is in, or say an absolute path that the "
            "cluster has"
        )
    if _is_secret(source):
        raise UserError(f"{where}: {value} has the name of a secret, and goes nowhere; rename it if it is none")
    target = folder / source
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        shutil.copy2(source, target)
        return []
    left = _Left()
    shutil.copytree(source, target, ignore=left, dirs_exist_ok=True)
    # beside runs there may be a file of MLflow's, which is none
    if not any(path.is_file() for path in target.rglob("*")) or (where.startswith(INCLUDED) and left.runs):
        raise UserError(f"{where}: nothing that is wanted of {value} would be there: {NOT_UPLOADED}")
    return left.secrets


class _Left:
    """Of a folder's entries, those that go nowhere, links that lead out of here too, as ``shutil.copytree`` asks for them.

    ``secrets`` and ``runs`` are those that were found.
    """

    def __init__(self) -> None:
        self.secrets: list[str] = []
        self.runs: list[str] = []

    def __call__(self, folder: str, names: Iterable[str]) -> set[str]:
        here = Path.cwd().resolve()
        entries = [Path(folder) / name for name in names]
        secrets = [entry for entry in entries if _is_secret(entry)]
        runs = [entry for entry in entries if all((entry / name).is_file() for name in (RECIPE, "metrics.jsonl"))]
        other = [
            entry for entry in entries if _matches([entry.name], NEVER) or not entry.resolve().is_relative_to(here)
        ]
        self.secrets += map(str, secrets)
        self.runs += map(str, runs)
        return {entry.name for entry in (*secrets, *runs, *other)}


def _is_secret(path: Path) -> bool:
    """Whether a path has the name of a secret in it, or leads to one through a link."""
    target, here = path.resolve(), Path.cwd().resolve()
    inside = target.relative_to(here).parts if target.is_relative_to(here) else ()  # what is not goes nowhere anyway
    return _matches((name.lower() for name in (*path.parts, *inside)), SECRET)


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _require_few(files: Mapping[str, int]) -> None:
    total = sum(files.values())
    if total > MAX_BUNDLE_BYTES:
        largest = max(files, key=lambda name: files[name])
        raise UserError(
            f"{total / 2**20:.0f} MiB of files would go with the job ({largest}: {files[largest] / 2**20:.0f}), more than "
            f"{MAX_BUNDLE_BYTES / 2**20:.0f}: put them where every node reads them (s3://..., gs://..., hf://..., or a shared folder "
            "by its absolute path), and say that in their place"
        )
