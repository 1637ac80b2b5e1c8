"""Chat templates in the shapes of published model families, written for these tests, and tokenizers with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helpers.models import byte_level_bpe

CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA_3 = """{% set date = date_string if date_string is defined else strftime_now('%d %b %Y') %}{{ bos_token }}\
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}\
{% else %}{% set system = '' %}{% endif %}<|start_header_id|>system<|end_header_id|>

Today: {{ date }}

{{ system }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}\
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

QWEN_2 = (
    """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are a model in the shape of Qwen.<|im_end|>
{% endif %}"""
    + CHATML
)

QWEN_3 = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' and loop.last and m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m['content'] }}\
{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endif %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{{ m['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]\
{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"""

FALCON = """{% for m in messages %}{% if not loop.first %}
{% endif %}{{ {'user': 'User', 'assistant': 'Falcon', 'system': 'System'}[m['role']] }}: {{ m['content'] }}{% endfor %}\
{% if add_generation_prompt %}
Falcon:{% endif %}"""

PHI_3 = """{% for m in messages %}<|{{ m['role'] }}|>
{{ m['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""

R1 = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}\
{% elif m['role'] == 'assistant' %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>
{% endif %}"""


@dataclass(frozen=True, slots=True)
class Family:
    """A template, the tokenizer's EOS and BOS, and the other special tokens; ``text_tokens`` are added, not special."""

    template: str
    eos: str
    special: tuple[str, ...] = ()
    bos: str | None = None
    text_tokens: tuple[str, ...] = ()


FAMILIES = {
    "ChatML": Family(CHATML, "<|endoftext|>", ("<|im_start|>", "<|im_end|>")),
    "Llama 3": Family(
        LLAMA_3, "<|end_of_text|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|begin_of_text|>"
    ),
    "Qwen 2.5": Family(QWEN_2, "<|im_end|>", ("<|endoftext|>", "<|im_start|>")),
    "Qwen 3": Family(
        QWEN_3,
        "<|im_end|>",
        ("<|endoftext|>", "<|im_start|>"),
        text_tokens=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "Gemma 2": Family(GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<bos>"),
    "Mistral": Family(MISTRAL, "</s>", ("[INST]", "[/INST]"), "<s>"),
    "Falcon": Family(FALCON, "<|endoftext|>"),
    "Phi 3": Family(PHI_3, "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),
    "R1": Family(R1, "<|eos|>", ("<|User|>", "<|Assistant|>"), "<|bos|>", ("<think>", "</think>")),
}
"""Families by name."""


def make_family_tokenizer(directory: Path, family: Family) -> Path:
    """A byte-level tokenizer of the family."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level_bpe([token for token in (family.bos, family.eos, *family.special) if token])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in family.text_tokens])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos)
    fast.chat_template = family.template
    fast.save_pretrained(directory)
    return directory
