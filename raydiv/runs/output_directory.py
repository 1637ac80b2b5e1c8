"""What the directories of runs, sweeps and studies have in common: their paths, and that none is ever written over."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from raydiv.config import Recipe, load_recipe
from raydiv.utils.errors import UserError

RECORDS = {"sweep": "sweep.json", "study": "study.json", "run": "recipe.yaml"}
"""The file that a started sweep, study or run has. All three have a recipe.yaml, so the run comes last."""


class OutputDirectory:
    """``OUTPUT_DIR/NAME``. A subclass sets ``kind``, a key of RECORDS, and adds the paths of its own files."""

    kind: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / RECORDS[self.kind]
        self.recipe = path / "recipe.yaml"
        self.report = path / "report.html"
        self.pictures = path / "pictures"

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        return cls(recipe.output_path / recipe.name)

    def read_recipe(self) -> Recipe:
        return load_recipe(self.recipe)

    def has_started(self, *, resume: bool) -> bool:
        """Whether there is something to resume. Without ``resume``, a return means that the directory is free.

        Raises UserError where it has started and is not to be resumed, and where another kind of directory is there.
        """
        kind = directory_kind(self.path)
        if kind is None or (kind == self.kind and resume):
            return kind is not None
        remedy = "resume it (--resume), set " if kind == self.kind else "set "
        raise UserError(
            f"{self.path}: holds a {kind} already; {remedy}another name=... or output_dir=..., or remove the directory"
        )


def directory_kind(path: Path) -> str | None:
    """``sweep``, ``study`` or ``run``; None where none has started."""
    return next((kind for kind, record in RECORDS.items() if (path / record).is_file()), None)
