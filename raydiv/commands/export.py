"""``raydiv export``: the trained model of a run as a plain Hugging Face directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from raydiv.model.export import write_merged
from raydiv.runs.directory import RunDirectory
from raydiv.utils.errors import UserError
from raydiv.utils.storage import atomic, require_empty


def export(run: Path, destination: Path, adapter: bool = False) -> Path:
    """The trained model of a run directory as a plain Hugging Face directory; under LoRA merged, or the ``adapter`` alone.

    A merged one is read anew and compared with what was merged. Raises UserError when ``run`` holds no trained model,
    ``destination`` is not empty, or there is no adapter; RuntimeError when what was written is another model: it is not left.
    """
    source = RunDirectory(run)
    if not source.holds_a_run or not source.model.is_dir():
        raise UserError(f"{run}: no trained model in it (a run directory has recipe.yaml and model/)")
    require_empty(destination)
    lora = (source.model / "adapter_config.json").is_file()
    if adapter and not lora:
        raise UserError(f"{run}: has no adapter: it was a full fine-tune; leave out --adapter")
    if destination.exists():
        destination.rmdir()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with atomic(destination) as temporary:
        if adapter or not lora:
            shutil.copytree(source.model, temporary)
        else:
            write_merged(source.read_recipe(), source.model, temporary)
    return destination
