"""``raydiv examples``: list the shipped recipes, and copy one to a folder.

The repository keeps them in ``configs/``; a wheel holds the same files as ``raydiv/configs/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from raydiv.utils.errors import UserError
from raydiv.utils.nearest import nearest

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Example:
    """A shipped recipe: the ``command`` it is written for (train, study ...), and the first sentence of its comment."""

    name: str
    command: str
    description: str


def examples() -> list[Example]:
    """The shipped recipes, by name. Raises UserError where this installation has none."""
    return [_describe(name, path) for name, path in _recipes().items()]


def copy_example(name: str, destination: Path | None = None) -> list[Path]:
    """Copy a recipe and those that it extends to ``destination``; returns the files, the recipe first.

    ``destination`` is a folder or a new YAML file, by default the current folder. Raises UserError, and copies nothing,
    for an unknown name, a recipe that exists already, and a parent that exists with different content.
    """
    known = _recipes()
    if name not in known:
        raise UserError(f"{name}: no such example{nearest(name, known)}")
    target = destination or Path()
    if target.suffix not in (".yaml", ".yml"):
        target = target / known[name].name
    if target.exists():
        raise UserError(f"{target}: exists already; choose another file or folder: raydiv examples {name} DEST")
    copies = {target: known[name].read_text()}
    for parent in _parents(known[name]):
        copies[target.parent / parent.name] = parent.read_text()
    for path, text in copies.items():
        if path.exists() and path.read_text() != text:
            raise UserError(
                f"{path}: exists already with different content; choose another folder: raydiv examples {name} DEST"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    for path, text in copies.items():
        path.write_text(text)
    return list(copies)


def _recipes() -> dict[str, Path]:
    """Name -> file of the shipped recipes; the name includes the folder, as in ``papers/kldo``."""
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (folder / "quickstart.yaml").is_file():
            return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}
    raise UserError(
        f"no recipes in or beside {PACKAGE}: this is neither an installed wheel nor a checkout; install raydiv with pip"
    )


def _parents(recipe: Path) -> list[Path]:
    """The files that a recipe extends, its parent first, without bundled recipes, which need no copy."""
    parent = yaml.safe_load(recipe.read_text()).get("extends", "bundled:")
    return [] if parent.startswith("bundled:") else [recipe.parent / parent, *_parents(recipe.parent / parent)]


def _describe(name: str, path: Path) -> Example:
    """The example that a recipe's leading comment describes: first lines with commands, then prose."""
    comment = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    commands = [line for line in comment if line.startswith("raydiv ")]
    prose = " ".join(line for line in comment if line and line not in commands)
    sentence, _, rest = prose.partition(". ")
    return Example(name, commands[0].split()[1], sentence + "." if rest else sentence)
