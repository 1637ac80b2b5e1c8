"""Chat template and tokens: prompt and response are tokenised apart, so the prompt is always a prefix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiv.cache import digest
from raydiv.config.recipe import template_text
from raydiv.errors import UserError

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token ids of one example; ``prompt_cut`` and ``response_cut`` count the tokens that truncation took."""

    prompt: list[int]
    response: list[int]
    prompt_cut: int
    response_cut: int


class Chat:
    """A tokenizer with its chat template.

    Raises UserError when the directory has no tokenizer, or no template is found and none is given.
    """

    def __init__(self, directory: Path, template: str | None = None) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.id: {directory} has no usable tokenizer: {' '.join(str(error).split())[:200]}"
            ) from None
        if template is not None:
            try:
                self.tokenizer.chat_template = template_text(template)
            except ValueError as error:
                raise UserError(f"data.template: {error}") from None
        if not self.tokenizer.chat_template:
            raise UserError(f"data.template: missing, and the tokenizer of {directory} has no chat template of its own")
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"model.id: the tokenizer of {directory} has no EOS token, so answers could never end")
        self.prompt("try it")

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides which ids a text becomes."""
        tokenizer = self.tokenizer
        rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
        return digest(rules, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id)

    def prompt(self, prompt: str | Messages, generation: bool = True) -> list[int]:
        """Ids of the templated conversation, up to where the assistant begins (``generation``) or the user's turn ends.

        Exactly one BOS where the tokenizer puts one, whether or not the template writes it.
        """
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=generation, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise UserError(f"data.template: the chat template fails: {error}") from None
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and self.tokenizer("").input_ids[:1] == [bos]:
            return [bos, *ids]
        return ids

    def example(self, prompt: str | Messages, response: str, max_prompt_length: int, max_length: int) -> Tokenized:
        """Ids of an example. A long prompt loses its beginning, a long response its end (and its EOS)."""
        prompt_ids = self.prompt(prompt)
        response_ids: list[int] = self.tokenizer(response, add_special_tokens=False).input_ids
        eos = self.tokenizer.eos_token_id
        if response_ids[-1:] != [eos]:
            response_ids.append(eos)
        kept = prompt_ids[-max_prompt_length:]
        room = max_length - len(kept)
        return Tokenized(kept, response_ids[:room], len(prompt_ids) - len(kept), max(0, len(response_ids) - room))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
