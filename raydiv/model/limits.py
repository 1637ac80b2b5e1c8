"""Limits of a model that a recipe, its tokenizer or its data may exceed: positions, rows of the embedding, stops."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.model.chat import Chat, ChatPrompt
from raydiv.utils.errors import UserError, one_line


def require_limits(recipe: Recipe, config: Any, chat: Chat) -> None:
    """Raise UserError for lengths or tokens that a model with the config ``config`` has no position or row for."""
    positions = maximum_positions(config)
    if positions is not None and recipe.batch.max_length > positions and config.model_type in LEARNED:
        raise UserError(
            f"batch.max_length: {recipe.batch.max_length:,}, and the model has no position beyond "
            f"{positions:,}; set batch.max_length={positions}"
        )
    rows, end = config.vocab_size, chat.end_of_turn
    for key, token, number in (
        ("data.end_of_turn", end.token, end.id),
        ("model.id", chat.tokenizer.bos_token, chat.tokenizer.bos_token_id),
        *(("data.template", token, number) for token, number in _tokens_of_template(chat)),
    ):
        if number is not None and number >= rows:
            raise UserError(
                f"{key}: the token {token} has the id {number}, and the model's embedding has {rows:,} rows: the "
                "tokenizer is that of another model, or the embedding was not resized for it"
            )


def require_room_for_answers(max_new_tokens: int, config: Any, chat: Chat, prompts: Sequence[ChatPrompt]) -> None:
    """Raise UserError where a model has no positions for the longest of ``prompts`` and its answer."""
    positions = maximum_positions(config)
    if positions is None or config.model_type not in LEARNED or not prompts:
        return
    longest = max(len(chat.prompt_ids(prompt)) for prompt in prompts)
    if longest + max_new_tokens > positions:
        raise UserError(
            f"evaluate.max_new_tokens: {max_new_tokens} after a prompt of {longest:,} tokens exceed the model's "
            f"{positions:,} positions"
        )


def limit_notes(recipe: Recipe, config: Any, chat: Chat, directory: Path) -> Iterator[str]:
    """What is unusual and may be meant: longer examples than positions, unused tokens, an inconsistent config."""
    positions = maximum_positions(config)
    if positions is not None and recipe.batch.max_length > positions:
        yield (
            f"batch.max_length {recipe.batch.max_length:,} exceeds max_position_embeddings {positions:,}: the model "
            "was not trained at such positions"
        )
    beyond = len(chat.tokenizer) - config.vocab_size
    if beyond > 0:
        yield (
            f"the tokenizer has {beyond} tokens more than the embedding has rows ({config.vocab_size:,}); an example "
            "with one of them is an error"
        )
    problem = generation_config_problem(directory)
    if problem:
        yield f"generation_config.json is inconsistent, and other tools may refuse it: {problem}"


LEARNED = ("biogpt", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt", "mpt")
"""Types of models whose positions are rows of a table (mpt: of biases), so that there are no others."""


def maximum_positions(config: Any) -> int | None:
    """The number of positions by a text config; None where it names none, or has no positions, as under ALiBi."""
    if getattr(config, "alibi", False):
        return None
    name = "max_seq_len" if config.model_type == "mpt" else "max_position_embeddings"
    positions = getattr(config, name, None)
    return positions if isinstance(positions, int) and positions > 0 else None


def generation_config_problem(directory: Path) -> str | None:
    """Why transformers would refuse to save a model's generation config; None where it would not."""
    from transformers import GenerationConfig

    path = directory / "generation_config.json"
    if not path.is_file():
        return None
    try:
        GenerationConfig.from_dict(json.loads(path.read_text())).validate(strict=True)
    except (ValueError, TypeError) as error:
        lines = [line.removeprefix("- ") for line in str(error).splitlines() if line.startswith("- ")]
        return one_line(lines[0] if lines else error, 200)
    return None


def _tokens_of_template(chat: Chat) -> list[tuple[str, int]]:
    """The control tokens that the template writes around a user's message, and their ids."""
    if not chat.template.renders:
        return []
    ids = chat.prompt_ids("?")
    names = chat.control_tokens.find(chat.template.opening + chat.forged_turn(""))
    return [
        (name, number) for name in dict.fromkeys(names) if (number := chat.tokenizer.convert_tokens_to_ids(name)) in ids
    ]
