"""Tiny random models, and a byte-level tokenizer of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_level_bpe(special: Sequence[str]) -> Tokenizer:
    """A byte-level tokenizer of up to 300 tokens, the ``special`` ones first, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["I am sorry, but I cannot help with that. Sure, here is how."] * 4, trainer)
    return tokenizer


def make_tokenizer(directory: Path, template: str | None = TEMPLATE) -> None:
    """The tokenizer of ``make_model``."""
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(special),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
    )
    fast.chat_template = template
    fast.save_pretrained(directory)


def make_model(directory: Path, tied: bool = True, seed: int = 0, hidden: int = 32) -> Path:
    """A random Llama of two layers with the tokenizer above; small enough to train in seconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def make_classifier(directory: Path, labels: dict[int, str], problem: str | None = None) -> Path:
    """A random text classifier with the tests' tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=len(labels),
        id2label=labels,
        label2id={label: number for number, label in labels.items()},
        problem_type=problem,
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # a random head says about the same of every text
    model.save_pretrained(directory)
    make_tokenizer(directory)
    return directory
