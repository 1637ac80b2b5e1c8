"""Chat templates and tokenisation. Prompt and response are tokenised separately, so the prompt is always a prefix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raydiv.config.recipe import template_text
from raydiv.model.resolve import load_error
from raydiv.utils.cache import digest
from raydiv.utils.errors import UserError, one_line

Messages = list[dict[str, str]]

Ids = Sequence[int] | np.ndarray
"""Token ids."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of one example; ``prompt_cut`` and ``response_cut`` count the tokens that were truncated."""

    prompt: list[int]
    response: list[int]
    prompt_cut: int
    response_cut: int


class Chat:
    """A tokenizer with its chat template.

    Raises UserError when the directory has no tokenizer, the tokenizer no EOS, or there is no template or one that
    fails.
    """

    def __init__(self, directory: Path, template: str | None = None, trust_remote_code: bool = False) -> None:
        self.tokenizer = load_tokenizer(directory, trust_remote_code)
        if template is not None:
            try:
                self.tokenizer.chat_template = template_text(template)
            except ValueError as error:
                raise UserError(f"data.template: {error}") from None
        if not self.tokenizer.chat_template:
            raise UserError(f"data.template: missing, and the tokenizer of {directory} has no chat template")
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"model.id: the tokenizer of {directory} has no EOS token, so answers would never end")
        self.prompt_ids("a prompt")  # raises where the template fails

    @property
    def fingerprint(self) -> str:
        """Digest of everything that determines the ids of a text."""
        tokenizer = self.tokenizer
        rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
        return digest(rules, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id)

    def prompt_ids(self, prompt: str | Messages, generation: bool = True) -> list[int]:
        """Ids of the templated conversation, with the generation prompt or up to the end of the user's turn.

        They begin with exactly one BOS where the tokenizer adds one, whether or not the template writes it. Raises
        UserError when the template fails.
        """
        try:
            return self._prompts([prompt], generation)[0]
        except ValueError as error:
            raise UserError(f"data.template: {error}") from None

    def tokenize(
        self, prompts: Sequence[str | Messages], responses: Sequence[str], max_prompt_length: int, max_length: int
    ) -> list[TokenizedExample]:
        """Ids of examples; equal prompts are tokenised once.

        A long prompt is truncated at its beginning (after the BOS), a long response at its end (with its EOS). Raises
        ValueError when the template fails on a prompt.
        """
        if not prompts:
            return []
        unique = {_prompt_key(prompt): prompt for prompt in prompts}
        prompt_ids = dict(zip(unique, self._prompts(list(unique.values())), strict=True))
        eos, examples = self.tokenizer.eos_token_id, []
        for prompt, ids in zip(prompts, self._ids(list(responses)), strict=True):
            response = ids if ids[-1:] == [eos] else [*ids, eos]
            whole = prompt_ids[_prompt_key(prompt)]
            cut = whole if len(whole) <= max_prompt_length else self._truncate_left(whole, max_prompt_length)
            room = max_length - len(cut)
            cuts = (len(whole) - len(cut), max(0, len(response) - room))
            examples.append(TokenizedExample(cut, response[:room], *cuts))
        return examples

    def tokenize_one(
        self, prompt: str | Messages, response: str, max_prompt_length: int, max_length: int
    ) -> TokenizedExample:
        """Ids of one example, as ``tokenize`` gives them."""
        return self.tokenize([prompt], [response], max_prompt_length, max_length)[0]

    def _truncate_left(self, ids: list[int], length: int) -> list[int]:
        """The BOS, where there is one, and the last of ``ids``: ``length`` in all."""
        first = ids[:1] if ids[0] == self.tokenizer.bos_token_id and length > 1 else []
        return first + ids[len(ids) - length + len(first) :]

    def _prompts(self, prompts: Sequence[str | Messages], generation: bool = True) -> list[list[int]]:
        """Ids of templated conversations. Raises ValueError when the template fails on one."""
        conversations = [as_messages(prompt) for prompt in prompts]
        try:
            rendered = self.tokenizer.apply_chat_template(
                conversations, add_generation_prompt=generation, tokenize=False
            )
        except Exception as error:  # a template is a program, and may raise anything
            reason = one_line(error, 200)
            if any(turn["content"] and turn["content"] in str(error) for turns in conversations for turn in turns):
                reason = type(error).__name__  # the message repeats a prompt, and messages must not contain prompts
            raise ValueError(f"the chat template fails: {reason}") from None
        bos, prompt_ids = self.tokenizer.bos_token_id, self._ids(rendered)
        if self._adds_bos:
            prompt_ids = [ids if ids[:1] == [bos] else [bos, *ids] for ids in prompt_ids]
        return prompt_ids

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("").input_ids[:1] == [bos]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts, without special tokens that the tokenizer would add."""
        if not texts:
            return []
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return encoded.input_ids  # type: ignore[no-any-return]

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, without added special tokens."""
        return self._ids([text])[0] if text else []

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory. Raises UserError when it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        # always explicit: without a value transformers asks on the terminal, and accepts a piped "y"
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise load_error(directory, error, f"has no usable tokenizer: {one_line(error, 200)}") from None


def as_messages(prompt: str | Messages) -> Messages:
    """The messages of a prompt: a string is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _prompt_key(prompt: str | Messages) -> object:
    return prompt if isinstance(prompt, str) else ("messages", json.dumps(prompt, sort_keys=True))
