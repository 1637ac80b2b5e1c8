"""Limits of a model that a recipe, its tokenizer or its data may exceed: positions, rows of the embedding, stops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raydiv.config import Recipe
from raydiv.model.chat import Chat
from raydiv.utils.errors import UserError, one_line


def require_limits(recipe: Recipe, config: Any, chat: Chat) -> None:
    """Raise UserError for lengths or tokens that a model with the config ``config`` has no position or row for."""
    positions = maximum_positions(config)
    if positions is not None and recipe.batch.max_length > positions and not is_rotary(config):
        raise UserError(
            f"batch.max_length: {recipe.batch.max_length:,}, and the model has learned positions up to "
            f"max_position_embeddings {positions:,}; set batch.max_length={positions}"
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


def limit_notes(recipe: Recipe, config: Any, chat: Chat, directory: Path) -> Iterator[str]:
    """What is unusual and may be meant: longer examples than positions, unused tokens, an inconsistent config."""
    positions = maximum_positions(config)
    if positions is not None and recipe.batch.max_length > positions and is_rotary(config):
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


def maximum_positions(config: Any) -> int | None:
    """The number of positions by a text config; None where there is no limit, as under ALiBi."""
    if getattr(config, "alibi", False):
        return None
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def is_rotary(config: Any) -> bool:
    """Whether positions are rotations, which exist beyond the maximum, and not rows of a table."""
    names = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim", "rotary_pct", "rotary_emb_base")
    return any(getattr(config, name, None) is not None for name in names)


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
