"""Writing trained models: Hugging Face directories with a tokenizer, the template in force and a model card."""

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
"""Tokens by which a merged model is compared, and how far its logits may be from what was merged."""


def write_model(
    model: Any, state: dict[str, Any], base: Path, recipe: Recipe, target: Path, check: Callable[[Path], None]
) -> None:
    """Write ``state`` (whole weights by parameter name) as ``model``'s directory: adapters alone where it has them.

    Raises RuntimeError when a weight is empty or missing, and what ``check`` raises of the directory: a partial model, or
    another one, is never left.
    """
    wanted = {name for name, weight in model.named_parameters() if weight.requires_grad or recipe.model.lora is None}
    wrong = sorted(name for name in wanted if name not in state or state[name].numel() == 0)
    if wrong or not state:
        raise RuntimeError(
            f"{len(wrong)} gathered weights are empty or missing, {wrong[0] if wrong else 'all'} first; nothing was written"
        )
    shutil.rmtree(target, ignore_errors=True)  # an attempt that died right after it
    with atomic(target) as temporary:
        if recipe.model.lora is not None:
            for adapter in model.peft_config.values():
                adapter.base_model_name_or_path = str(base)
        model.save_pretrained(temporary, state_dict=state)
        _write_tokenizer_and_card(temporary, base, recipe, adapter=recipe.model.lora is not None)
        check(temporary)


def write_merged(recipe: Recipe, adapters: Path, directory: Path) -> None:
    """Merge the adapters of ``adapters`` into their base and write the whole model to ``directory``.

    What was written is loaded again and compared. Raises RuntimeError where its logits are not those of the merged model.
    """
    whole = replace(ModelSource.from_recipe(recipe, adapters), precision="fp32", quantization=None)
    model = whole.load()
    merged = _logits(model)
    model.save_pretrained(directory)
    del model  # there may be no room for two
    _write_tokenizer_and_card(directory, adapters, recipe, adapter=False)
    apart = float((_logits(replace(whole, directory=directory).load()) - merged).abs().max())
    if not apart <= TOLERANCE:  # nor where it is nan
        raise RuntimeError(
            f"the written model is not the merged one: its logits differ by up to {apart:.3g}, and it was not kept"
        )


def _logits(model: Any) -> Any:
    """What a model says of a few tokens."""
    import torch

    with torch.inference_mode():
        return model.eval()(
            torch.arange(CHECKED_TOKENS)[None] % model.config.get_text_config().vocab_size
        ).logits.float()


def _write_tokenizer_and_card(directory: Path, tokenizer_from: Path, recipe: Recipe, adapter: bool) -> None:
    """Tokenizer, template and card beside the weights."""
    Chat(tokenizer_from, recipe.data.template, recipe.model.trust_remote_code).tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(_model_card(recipe, adapter))


def _model_card(recipe: Recipe, adapter: bool) -> str:
    terms = [f"{term.weight:g} x {term.name} {term.options}" for term in recipe.loss.terms]
    length = recipe.optim.steps or f"{recipe.optim.epochs:g} epochs"
    how = "full fine-tune" if recipe.model.lora is None else f"LoRA, r {recipe.model.lora.r}"
    return f"""---
base_model: {recipe.model.id}
library_name: {"peft" if adapter else "transformers"}
tags: [raydiv, safety-alignment]
---
# {recipe.name}

{recipe.model.id} aligned for safety by raydiv ({how}).

- objective: {" + ".join(terms)}
- data: {recipe.data.train}
- updates: {length} of {recipe.batch.examples} examples, peak rate {recipe.optim.lr:g}
- prompts use the tokenizer's chat template, which is the one trained with

A model that refuses more is not thereby safe: see the run's report for attack success, over-refusal and coherence.
"""
