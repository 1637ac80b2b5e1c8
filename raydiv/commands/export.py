"""``raydiv export``: write the trained model of a run as a plain Hugging Face directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from raydiv.model.export import write_merged
from raydiv.runs.directory import RunDirectory
from raydiv.utils.errors import UserError
from raydiv.utils.storage import atomic, require_empty


def export(run: Path, destination: Path, adapter: bool = False) -> Path:
    """Export the trained model of a run directory; returns ``destination``. LoRA is merged, unless ``adapter``.

    A merged model is loaded again and compared with the trained one. Raises UserError when ``run`` has no trained model
    or no adapter, and when ``destination`` is not empty. Raises RuntimeError, and leaves nothing, when the models
    differ.
    """
    source = RunDirectory(run)
    if not source.holds_a_run or not source.model.is_dir():
        raise UserError(f"{run}: no trained model in this directory (a trained run has recipe.yaml and model/)")
    require_empty(destination)
    has_adapter = (source.model / "adapter_config.json").is_file()
    if adapter and not has_adapter:
        raise UserError(f"{run}: has no adapter, since it is a full fine-tune; omit --adapter")
    if destination.exists():
        destination.rmdir()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with atomic(destination) as temporary:
        if adapter or not has_adapter:
            shutil.copytree(source.model, temporary)
        else:
            write_merged(source.read_recipe(), source.model, temporary)
    return destination
