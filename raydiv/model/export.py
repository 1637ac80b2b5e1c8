"""Writing trained models: Hugging Face directories that transformers, peft and vLLM read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.config.source import Source
from raydiv.model.chat import Chat, chat_table
from raydiv.model.load import ModelSource
from raydiv.model.resolve import hub_origin
from raydiv.utils.compat import make_readable_by_transformers_4
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.storage import atomic

CHECKED_TOKENS, TOLERANCE = 32, 1e-3
"""Tokens that a written model is checked on, and the tolerance of its logits."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "spiece.model", "tekken.json", "chat_template.jinja", "chat_template.json"),
)
"""Files of a tokenizer. A base's own are copied: those that transformers 5 writes are not read by older versions."""

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of a base that takes images too, which its exported class needs."""


def write_model(
    model: Any, state: dict[str, Any], base: Path, recipe: Recipe, target: Path, check: Callable[[Path], None]
) -> None:
    """Write ``state`` (full weights by parameter name) as ``model``'s directory, or its adapters where it has them.

    Raises RuntimeError when a weight is empty or missing, and when ``check`` raises it of the directory, which is then
    kept as ``NAME.rejected``. Nothing is left at ``target``.
    """
    expected = {name for name, weight in model.named_parameters() if weight.requires_grad or recipe.model.lora is None}
    missing = sorted(name for name in expected if name not in state or state[name].numel() == 0)
    if missing or not state:
        raise RuntimeError(
            f"{len(missing)} gathered weights are empty or missing, {missing[0] if missing else 'all'} first; "
            "nothing was written"
        )
    base = ModelSource(base).base_directory() or base  # training may have started from an adapter
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed after writing it
    with atomic(target) as temporary:
        chat = Chat.from_recipe(recipe, base)
        generation = None
        if recipe.model.lora is None:
            generation = _take_generation_config(model, base, chat)
        model.save_pretrained(temporary, state_dict=state)
        if generation is None:
            _name_base(temporary / "adapter_config.json", recipe, base)
        _write_other_files(temporary, base, chat, recipe, generation)
        try:
            check(temporary)
        except RuntimeError as error:
            rejected = target.with_name(f"{target.name}.rejected")
            shutil.rmtree(rejected, ignore_errors=True)
            temporary.rename(rejected)
            raise RuntimeError(
                f"{error}. It is kept as {rejected}; the newest checkpoint holds the trained weights"
            ) from error


def write_whole(recipe: Recipe, trained: Path, directory: Path, dtype: str | None) -> None:
    """Write the trained model of a run as a whole model: adapters are merged into their base.

    ``dtype``: torch's name of the dtype of the written weights; by default that of the base, or of ``trained`` itself.
    The written model is loaded again. Raises RuntimeError where its logits are not those of the trained one in this
    dtype.
    """
    import torch

    source = replace(ModelSource.from_recipe(recipe, trained), precision="fp32", quantization=None)
    base = source.base_directory() or trained
    chosen = getattr(torch, dtype or replace(source, directory=base).stored_dtype())
    model = source.load().to(chosen)
    logits, chat = _logits(model), Chat.from_recipe(recipe, trained)
    generation = _take_generation_config(model, base, chat)
    model.save_pretrained(directory)
    del model  # memory may not hold two
    _write_other_files(directory, base, chat, recipe, generation)
    difference = float((_logits(replace(source, directory=directory).load().to(chosen)) - logits).abs().max())
    if not difference <= TOLERANCE:  # nan fails too
        raise RuntimeError(
            f"the written model is not the trained one: its logits differ by up to {difference:.3g}; it was removed"
        )


def push(directory: Path, repository: str) -> str:
    """Upload a model's directory to a repository of the hub, which is created as a private one; returns its address.

    Raises UserError where the hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Model exported by raydiv")
    except Exception as error:  # the hub client raises many unrelated types
        raise UserError(
            f"--push-to {repository}: the hub refuses ({type(error).__name__}: {one_line(error, 200)}); {directory} is "
            "written, and this machine needs a token that may write there (hf auth login, or HF_TOKEN)"
        ) from None
    return str(address)


def _name_base(path: Path, recipe: Recipe, base: Path) -> None:
    """Let an adapter's config name its base: the hub's id and commit, a bundled model's id, or else the directory.

    Written into the file, since peft would ask the hub for a base that its own config names by id.
    """
    here = recipe.model.id if recipe.model.id.startswith("bundled:") else str(base)
    name, revision = hub_origin(base) or (here, None)
    config = json.loads(path.read_text()) | {"base_model_name_or_path": name, "revision": revision}
    path.write_text(json.dumps(config, indent=2) + "\n")


def _logits(model: Any) -> Any:
    """A model's logits of a few tokens, in fp32."""
    import torch

    with torch.inference_mode():
        return model.eval()(
            torch.arange(CHECKED_TOKENS)[None] % model.config.get_text_config().vocab_size
        ).logits.float()


def _take_generation_config(model: Any, base: Path, chat: Chat) -> dict[str, Any]:
    """The generation config of the base, which stops also at the token that responses were trained to end with.

    It is taken away from ``model``: transformers refuses to save one whose flags do not fit together.
    """
    from transformers import GenerationConfig

    path, own = base / "generation_config.json", model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = json.loads(path.read_text()) if path.is_file() else {name: getattr(own, name) for name in names}
    model.generation_config = GenerationConfig()
    stops = config.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if chat.end_of_turn.id not in stops:
        config["eos_token_id"] = [chat.end_of_turn.id, *stops]
    return {name: value for name, value in config.items() if value is not None}


def _write_other_files(
    directory: Path, base: Path, chat: Chat, recipe: Recipe, generation: dict[str, Any] | None
) -> None:
    """Write what a model's directory has beside its weights: the tokenizer of its base, template, configs and card.

    ``generation``: the generation config of a whole model; None for an adapter.
    """
    _write_tokenizer(directory, base, chat)
    if generation is not None:
        _keep_config_of_base(directory, base)
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    make_readable_by_transformers_4(directory)
    (directory / "README.md").write_text(_model_card(recipe, chat, adapter=generation is None))


def _write_tokenizer(directory: Path, base: Path, chat: Chat) -> None:
    """Copy the base's tokenizer, with the chat template that was trained with."""
    copied = [name for name in TOKENIZER_FILES if (base / name).is_file()]
    if "tokenizer_config.json" not in copied:
        chat.tokenizer.save_pretrained(directory)
        return
    vocabulary = [name for name in getattr(chat.tokenizer, "vocab_files_names", {}).values() if (base / name).is_file()]
    # custom code too: configs and tokenizers name its files
    for name in dict.fromkeys([*copied, *vocabulary, *(path.name for path in base.glob("*.py"))]):
        shutil.copyfile(base / name, directory / name)
    template = chat.tokenizer.chat_template
    if chat.config.template is None or not isinstance(template, str):
        return
    (directory / "chat_template.jinja").write_text(template)
    (directory / "chat_template.json").unlink(missing_ok=True)
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text())
    if "chat_template" in content:
        path.write_text(json.dumps(content | {"chat_template": template}, indent=2) + "\n")


def _keep_config_of_base(directory: Path, base: Path) -> None:
    """Give the config the keys and values of the base's: training changes the dtype alone.

    Where only a part of the base was loaded, such as the language model of one for images, the config is that part's.
    """
    written, own = (json.loads((folder / "config.json").read_text()) for folder in (directory, base))
    if any(written.get(key) != own.get(key) for key in ("model_type", "architectures")):
        return
    for name in PROCESSOR_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, directory / name)
    dtype = written.get("dtype", written.get("torch_dtype"))
    for config in (own, own.get("text_config")):
        for name in ("dtype", "torch_dtype"):
            if isinstance(config, dict) and name in config:
                config[name] = dtype
    if not {"dtype", "torch_dtype"} & own.keys():
        own["torch_dtype"] = dtype
    own.pop("quantization_config", None)
    (directory / "config.json").write_text(json.dumps(own, indent=2) + "\n")


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _model_card(recipe: Recipe, chat: Chat, adapter: bool) -> str:
    """The model card; its metadata are those that the hub accepts, so that a model that is not there is not named."""
    from huggingface_hub import ModelCardData

    terms = [f"{term.weight:g} x {term.name} {term.options}" for term in recipe.loss.terms]
    length = recipe.optim.steps or f"{recipe.optim.epochs:g} epochs"
    method = "full fine-tune" if recipe.model.lora is None else f"LoRA, r {recipe.model.lora.r}"
    on_hub = HUB_ID.fullmatch(recipe.model.id) and not Path(recipe.model.id).exists()
    data = ModelCardData(
        base_model=recipe.model.id if on_hub else None,
        datasets=_hub_sets(recipe.data.train) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["raydiv", "safety-alignment", *(term.name for term in recipe.loss.terms)],
    )
    options = recipe.data.template_options
    lines = [f"- {name}: `{fact}`" for name, fact in chat_table(chat.facts()).items()]
    position = recipe.loss.position
    lines += [f"- what tokens count: `{json.dumps(position.model_dump())}`"] if position.rule else []
    lines += [f"- options of the template, in training: `{json.dumps(options)}`"] if options else []
    return f"""---
{data.to_yaml()}
---
# {recipe.name}

{recipe.model.id} aligned for safety by raydiv ({method}).

- objective: {" + ".join(terms)}
- data: {", ".join(source.path for source in recipe.data.train)}
- updates: {length} of {recipe.batch.examples} examples, peak rate {recipe.optim.lr:g}
{chr(10).join(lines)}

A model that refuses more is not thereby safe: see the run's report for attack success, over-refusal and coherence.
"""


def _hub_sets(sources: list[Source]) -> list[str]:
    return [source.path.removeprefix("hf://") for source in sources if source.path.startswith("hf://")]
