"""The files that are uploaded with a job: the command's recipe, with the recipes that it extends, and local files.

A relative path names a file of this machine. It is uploaded, and has the same path in the job's working directory.
Absolute paths and URIs are the cluster's. A run's output_dir must be one of these: a job's working directory is on one
node, and is deleted with the job.
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
from raydiv.config.bounded_yaml import parse_yaml
from raydiv.config.evaluate import JUDGES
from raydiv.config.load import load_tree
from raydiv.config.source import file_kind
from raydiv.utils.dotted import leaves
from raydiv.utils.errors import UserError

MAX_BUNDLE_BYTES = 100 * 2**20
"""Limit of the uploaded files, which Ray keeps in the memory of the head node."""

EXCLUDED = (
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
"""Names that are left out of an uploaded folder: they hold no data. Ray would leave out data that the last two list."""

SECRET_PATTERNS = (
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
"""Names, in lower case, of files that hold secrets: they are never uploaded."""

FILE_SECTIONS = ("model", "data", "separation", "evaluate", "sweep", "study")
"""Sections of a recipe whose strings may be paths of files."""

FILE_KEYS = ("loss.position.model",)
"""Keys of other sections whose values may be paths of files."""

INCLUDE_PREFIX = "study.include."
"""Keys that name folders of finished runs, which are not uploaded."""

CHOICE_OPTIONS = ("--part", "--against", "--kind", "--pooling", "--intervals", "--precision", "--dtype")
"""Options whose values are choices, never paths."""

MODEL_PREFIXES = ("model", *JUDGES)
"""Prefixes of a model's id or directory: ``data build --worse model:DIR``, ``--judge harmbench:DIR``."""

NOT_UPLOADED = "finished runs, caches and secrets are not uploaded with a job: use an absolute path on the cluster"

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True, slots=True)
class JobBundle:
    """A folder that is uploaded with a command, and the ``command`` as it runs there.

    ``files`` maps the paths in the folder to their sizes in bytes. ``remote_paths`` are absolute paths that the cluster
    must have. ``recipe`` is the command's, checked. ``secrets`` are files that were left out because of their names.
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
    """The bundle of the command ``words``; its folder exists while the block runs.

    ``recipe`` and ``overrides`` are those among the words. ``leaves_a_run``: the command writes into the recipe's
    output_dir.

    Raises UserError where the recipe is invalid, an output_dir is relative, a path leads out of the current folder or
    to a secret, no file of a folder would be uploaded, or the files are too large.
    """
    checked = None if recipe is None else _checked_recipe(recipe, overrides, leaves_a_run)
    tree = load_tree({} if recipe is None else recipe, overrides)
    # a bundled recipe holds the overrides; without one they stay in the command
    plain = [word for word in words if word not in overrides]
    command = list(words) if recipe is None else _with_bundled_recipe(plain, recipe)
    with TemporaryDirectory(prefix="raydiv-job-") as temporary:
        folder = Path(temporary)
        remote_paths: list[str] = []
        secrets: list[str] = []
        candidates = _path_candidates(tree, [word for word in command if word not in overrides])
        if recipe is not None:
            candidates.pop(RECIPE_FILE, None)
        for value, key in candidates.items():
            if _is_remote(value):
                remote_paths += [value] if "://" not in value else []
            else:
                for path in _local_paths(value):
                    secrets += _copy(path, key, folder)
        if recipe is not None:  # last, since an uploaded folder may have a file of this name
            (folder / RECIPE_FILE).write_text(yaml.safe_dump(tree, sort_keys=False))
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        _require_small(files)
        yield JobBundle(folder, command, files, remote_paths, checked, list(dict.fromkeys(secrets)))


def _checked_recipe(recipe: str, overrides: Sequence[str], leaves_a_run: bool) -> Recipe:
    checked = load_recipe(recipe, overrides)
    outputs = {"output_dir": checked.output_dir, "checkpoint.storage": checked.checkpoint.storage}
    for key, path in outputs.items():
        if leaves_a_run and path is not None and not _is_remote(path):
            raise UserError(f"{relative_path_error(key, path)} ({key}=/shared/runs)")
    return checked


def relative_path_error(key: str, path: str) -> str:
    """The message for a relative path that a job writes to."""
    return (
        f"{key}: {path} is relative, and a job's working directory is deleted with the job: use the absolute path of a "
        "folder that all nodes of the cluster share"
    )


def _with_bundled_recipe(words: list[str], recipe: str) -> list[str]:
    """A command with the bundle's recipe instead of its own, which is a separate word or follows ``--recipe=``."""
    place = next(i for i, word in enumerate(words) if i and word in (recipe, _option_prefix(word) + recipe))
    return [*words[:place], words[place].removesuffix(recipe) + RECIPE_FILE, *words[place + 1 :]]


def _option_prefix(word: str) -> str:
    """``--option=`` of a word that begins with it."""
    name, equals, _ = word.partition("=")
    return name + equals if name.startswith("--") else ""


def _path_candidates(tree: Mapping[str, Any], words: Sequence[str]) -> dict[str, str]:
    """Strings of a recipe and a command that may be paths, each with the key or word where it occurs first."""
    candidates: dict[str, str] = {}
    for key, value in leaves(tree):
        if isinstance(value, str) and (key.partition(".")[0] in FILE_SECTIONS or key in FILE_KEYS):
            candidates.setdefault(_without_model_prefix(value), key)
    command_end = 2 if words[0] == "data" else 1
    for previous, word in pairwise(words[command_end - 1 :]):
        if previous not in CHOICE_OPTIONS and word.partition("=")[0] not in CHOICE_OPTIONS:
            for value in _word_values(word):
                candidates.setdefault(_without_model_prefix(value), word)
    return candidates


def _word_values(word: str) -> Iterator[str]:
    """A word, and what follows each of its ``=`` (``--attack=templates=FILE``); of a mapping, its leaves."""
    parts = word.split("=")
    for start in range(len(parts)):
        text = "=".join(parts[start:])
        if not text.lstrip().startswith("{"):
            yield text
            continue
        try:
            section = parse_yaml(text)
        except ValueError:  # a Jinja template, or a value that the command refuses
            continue
        yield from (value for _, value in leaves(section) if isinstance(value, str))


def _without_model_prefix(value: str) -> str:
    prefix, _, model = value.partition(":")
    return model if prefix in MODEL_PREFIXES and model else value


def _is_remote(value: str) -> bool:
    """Whether a path is the cluster's: absolute, or a URI."""
    return value.startswith(("/", "~")) or "://" in value


def _local_paths(value: str) -> list[str]:
    """What a relative path names on this machine: a file, a folder, or the data files that a pattern matches."""
    if not value:
        return []
    try:
        if Path(value).exists():
            return [value]
    except OSError:  # a text, such as a template, is too long for a path
        return []
    matches = sorted(glob.glob(value, recursive=True)) if glob.has_magic(value) else []
    return [path for path in matches if file_kind(path) and Path(path).is_file()]


def _copy(path: str, key: str, folder: Path) -> list[str]:
    """Copy a relative path to the same path in the bundle; returns the secrets that are left out."""
    source, here = Path(path), Path.cwd().resolve()
    if not source.resolve().is_relative_to(here) or ".." in source.parts:
        raise UserError(
            f"{key}: {path} is not in this folder ({here}): run raydiv submit in a folder that contains it, or use an "
            "absolute path on the cluster"
        )
    if _looks_secret(source):
        raise UserError(f"{key}: {path} looks like a secret and is not uploaded; rename it if it is not")
    target = folder / source
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        shutil.copy2(source, target)
        return []
    copied = _CopyFilter()
    shutil.copytree(source, target, ignore=copied, dirs_exist_ok=True)
    # a folder of runs may also hold MLflow's database, which study.include does not read
    if not any(file.is_file() for file in target.rglob("*")) or (key.startswith(INCLUDE_PREFIX) and copied.runs):
        raise UserError(f"{key}: no file of {path} that the job needs would be uploaded: {NOT_UPLOADED}")
    return copied.secrets


class _CopyFilter:
    """The ``ignore`` function of ``shutil.copytree``: leaves out secrets, runs, EXCLUDED and links out of this folder.

    ``secrets`` and ``runs`` are those that were left out.
    """

    def __init__(self) -> None:
        self.secrets: list[str] = []
        self.runs: list[str] = []

    def __call__(self, folder: str, names: Iterable[str]) -> set[str]:
        here = Path.cwd().resolve()
        entries = [Path(folder) / name for name in names]
        secrets = [entry for entry in entries if _looks_secret(entry)]
        runs = [entry for entry in entries if all((entry / name).is_file() for name in (RECIPE_FILE, "metrics.jsonl"))]
        excluded = [entry for entry in entries if _matches([entry.name], EXCLUDED)]
        outside = [entry for entry in entries if not entry.resolve().is_relative_to(here)]
        self.secrets += map(str, secrets)
        self.runs += map(str, runs)
        return {entry.name for entry in (*secrets, *runs, *excluded, *outside)}


def _looks_secret(path: Path) -> bool:
    """Whether a part of a path, or of the path that it links to, has the name of a secret."""
    target, here = path.resolve(), Path.cwd().resolve()
    linked = target.relative_to(here).parts if target.is_relative_to(here) else ()  # links out of here are left out
    return _matches((name.lower() for name in (*path.parts, *linked)), SECRET_PATTERNS)


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _require_small(files: Mapping[str, int]) -> None:
    total = sum(files.values())
    if total > MAX_BUNDLE_BYTES:
        largest = max(files, key=lambda name: files[name])
        raise UserError(
            f"the job's files have {total / 2**20:.0f} MiB ({largest}: {files[largest] / 2**20:.0f}), and at most "
            f"{MAX_BUNDLE_BYTES / 2**20:.0f} are uploaded: put them where every node can read them, and name them by "
            "s3://..., gs://..., hf://... or an absolute path"
        )
