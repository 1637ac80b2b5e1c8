"""``raydiv export``: write the trained model of a run as a plain Hugging Face directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from raydiv.model.export import write_whole
from raydiv.runs.directory import RunDirectory
from raydiv.utils.claim import claim
from raydiv.utils.errors import UserError
from raydiv.utils.storage import atomic, read_json, require_empty


def export(run: Path, destination: Path, adapter: bool = False, dtype: str | None = None) -> Path:
    """Export the trained model of a run directory; returns ``destination``. LoRA is merged, unless ``adapter``.

    ``dtype``: of the weights of a whole model, bf16, fp16 or fp32; by default the base's. The written model is loaded
    again and compared with the trained one. Raises UserError when ``run`` has no trained model or no adapter, and when
    ``destination`` is not empty. Raises RuntimeError, and leaves nothing, when the models differ.
    """
    source = RunDirectory(run)
    with claim(destination, print, key="DEST", remedy="wait until it has ended, or name another folder"):
        return _export(source, destination, adapter, dtype)


def _export(source: RunDirectory, destination: Path, adapter: bool, dtype: str | None) -> Path:
    if not source.holds_a_run or not source.model.is_dir():
        raise UserError(f"{source.path}: no trained model in this directory (a trained run has recipe.yaml and model/)")
    require_empty(destination)
    has_adapter = (source.model / "adapter_config.json").is_file()
    if adapter and not has_adapter:
        raise UserError(f"{source.path}: has no adapter, since it is a full fine-tune; omit --adapter")
    if adapter and dtype:
        raise UserError("--dtype: an adapter is written as it was trained; omit --dtype or --adapter")
    if destination.exists():
        destination.rmdir()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with atomic(destination) as temporary:
        if adapter:
            shutil.copytree(source.model, temporary)
        else:
            write_whole(source.read_recipe(), source.model, temporary, DTYPES[dtype] if dtype else _base_dtype(source))
    return destination


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""torch's names of the values of ``--dtype``."""


def _base_dtype(run: RunDirectory) -> str | None:
    """The dtype of the weights that a run started from, which its full fine-tune may be kept in more precision than."""
    return read_json(run.result).get("base_dtype") if run.result.exists() else None
