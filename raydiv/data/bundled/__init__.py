"""Data that ships with raydiv; README.md in this folder is its data card."""

from importlib import resources
from pathlib import Path

from raydiv.utils.errors import UserError

FOLDER = Path(str(resources.files(__name__)))
QUICKSTART = FOLDER / "quickstart.yaml"


def bundled_file(source: str) -> Path:
    """The file of ``bundled:NAME``. Raises UserError for an unknown name."""
    name = source.removeprefix("bundled:")
    known = sorted(path.stem for path in FOLDER.glob("*.jsonl"))
    if name not in known:
        raise UserError(f"{source}: unknown bundled data (known: {', '.join(known)})")
    return FOLDER / f"{name}.jsonl"
