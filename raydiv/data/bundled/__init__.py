"""Data that ships with the package; README.md beside this file is its card."""

from importlib import resources
from pathlib import Path

from raydiv.utils.errors import UserError

FOLDER = Path(str(resources.files(__name__)))
QUICKSTART = FOLDER / "quickstart.yaml"


def bundled_file(source: str) -> Path:
    """Path of ``bundled:NAME``."""
    name = source.removeprefix("bundled:")
    known = sorted(path.stem for path in FOLDER.glob("*.jsonl"))
    if name not in known:
        raise UserError(f"{source}: no such bundled data (known: {', '.join(known)})")
    return FOLDER / f"{name}.jsonl"
