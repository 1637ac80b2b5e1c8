"""Writing trained models: Hugging Face directories with tokenizer, chat template and model card."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.model.chat import Chat
from raydiv.model.load import ModelSource
from raydiv.utils.storage import atomic

CHECKED_TOKENS, TOLERANCE = 32, 1e-3
"""Tokens that a written model is checked on, and the tolerance of its logits."""


def write_model(
    model: Any, state: dict[str, Any], base: Path, recipe: Recipe, target: Path, check: Callable[[Path], None]
) -> None:
    """Write ``state`` (full weights by parameter name) as ``model``'s directory, or its adapters where it has them.

    Raises RuntimeError when a weight is empty or missing, and whatever ``check`` raises of the directory. Then nothing
    is left at ``target``.
    """
    expected = {name for name, weight in model.named_parameters() if weight.requires_grad or recipe.model.lora is None}
    missing = sorted(name for name in expected if name not in state or state[name].numel() == 0)
    if missing or not state:
        raise RuntimeError(
            f"{len(missing)} gathered weights are empty or missing, {missing[0] if missing else 'all'} first; "
            "nothing was written"
        )
    shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed after writing it
    with atomic(target) as temporary:
        if recipe.model.lora is not None:
            for adapter in model.peft_config.values():
                adapter.base_model_name_or_path = str(base)
        chat = Chat.from_recipe(recipe, base)
        _stop_at_end_of_turn(model, chat)
        model.save_pretrained(temporary, state_dict=state)
        _write_tokenizer_and_card(temporary, chat, recipe, adapter=recipe.model.lora is not None)
        check(temporary)


def write_merged(recipe: Recipe, adapters: Path, directory: Path) -> None:
    """Merge the adapters of ``adapters`` into their base and write the whole model to ``directory``.

    The written model is loaded again. Raises RuntimeError where its logits are not those of the merged model.
    """
    source = replace(ModelSource.from_recipe(recipe, adapters), precision="fp32", quantization=None)
    model = source.load()
    merged, chat = _logits(model), Chat.from_recipe(recipe, adapters)
    _stop_at_end_of_turn(model, chat)
    model.save_pretrained(directory)
    del model  # memory may not hold two
    _write_tokenizer_and_card(directory, chat, recipe, adapter=False)
    difference = float((_logits(replace(source, directory=directory).load()) - merged).abs().max())
    if not difference <= TOLERANCE:  # nan fails too
        raise RuntimeError(
            f"the written model is not the merged one: its logits differ by up to {difference:.3g}; it was removed"
        )


def _logits(model: Any) -> Any:
    """A model's logits of a few tokens, in fp32."""
    import torch

    with torch.inference_mode():
        return model.eval()(
            torch.arange(CHECKED_TOKENS)[None] % model.config.get_text_config().vocab_size
        ).logits.float()


def _stop_at_end_of_turn(model: Any, chat: Chat) -> None:
    """Let the written ``generation_config.json`` stop at the token that responses were trained to end with."""
    config = model.generation_config
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if chat.end_of_turn.id not in stops:
        config.eos_token_id = [chat.end_of_turn.id, *(stop for stop in stops if stop is not None)]


def _write_tokenizer_and_card(directory: Path, chat: Chat, recipe: Recipe, adapter: bool) -> None:
    """Write tokenizer, chat template and card into a model's directory."""
    chat.tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(_model_card(recipe, adapter))


def _model_card(recipe: Recipe, adapter: bool) -> str:
    terms = [f"{term.weight:g} x {term.name} {term.options}" for term in recipe.loss.terms]
    length = recipe.optim.steps or f"{recipe.optim.epochs:g} epochs"
    method = "full fine-tune" if recipe.model.lora is None else f"LoRA, r {recipe.model.lora.r}"
    return f"""---
base_model: {recipe.model.id}
library_name: {"peft" if adapter else "transformers"}
tags: [raydiv, safety-alignment]
---
# {recipe.name}

{recipe.model.id} aligned for safety by raydiv ({method}).

- objective: {" + ".join(terms)}
- data: {recipe.data.train}
- updates: {length} of {recipe.batch.examples} examples, peak rate {recipe.optim.lr:g}
- prompts use the tokenizer's chat template, as in training

A model that refuses more is not thereby safe: see the run's report for attack success, over-refusal and coherence.
"""
