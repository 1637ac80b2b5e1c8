"""The model of W1, the workload that ``raydiv bench`` is read on: a small random Llama with a word tokenizer.

Built at first use, identical on every machine, and cached. ``raydiv.data.bundled.w1`` has its examples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydiv.utils.cache import cache_dir, digest
from raydiv.utils.storage import atomic

W1 = "bundled:w1"

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>")
"""The first tokens of the vocabulary; each of the others is a word."""

SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

MODEL: dict[str, Any] = {
    "vocab_size": 65_024,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    **SPECIAL_IDS,
}

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def w1_model() -> Path:
    """The directory of the model and its tokenizer."""
    target = cache_dir("models") / f"w1-{digest(MODEL, SPECIAL, TEMPLATE)[:8]}"
    if not target.is_dir():
        with atomic(target) as folder:
            _random_model(folder)
            write_tokenizer(folder)
    return target


def word(number: int) -> str:
    return f"w{number}"


def _random_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer into a model's folder: a word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unknown, *roles = SPECIAL
    words = [*SPECIAL, *(word(number) for number in range(len(SPECIAL), MODEL["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        additional_special_tokens=roles,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
