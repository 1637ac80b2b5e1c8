"""The model of ``loss.position.model``, by whose rewards the tokens of aligned responses are weighted."""

from __future__ import annotations

from pathlib import Path

from raydiv.config import Recipe
from raydiv.losses.position import RewardWeights
from raydiv.model.chat import Chat, load_tokenizer
from raydiv.model.load import ModelSource
from raydiv.model.resolve import model_directory
from raydiv.utils.errors import UserError

KEY = "loss.position.model"


def reward_directory(position: RewardWeights) -> Path:
    """The directory of the model or the adapter: ``position.model`` itself, or what that run trained.

    Raises UserError where there is none.
    """
    path = Path(position.model).expanduser()
    trained = path / "model"
    is_run = any((trained / name).is_file() for name in ("config.json", "adapter_config.json"))
    return model_directory(str(trained) if is_run else position.model, key=KEY)


def require_same_tokens(recipe: Recipe, position: RewardWeights, rows: int, chat: Chat) -> None:
    """Raise UserError where the model has other ids for the tokens of ``chat``, or too few of its ``rows``.

    ``rows`` is the number of rows of the embedding of the model that is trained.
    """
    source = ModelSource.from_recipe(recipe, reward_directory(position))
    tokens = chat.tokenizer.get_vocab()
    of_model = load_tokenizer(source.tokenizer_directory(), source.trust_remote_code).get_vocab()
    others = [token for token, number in tokens.items() if of_model.get(token) != number]
    if others:
        raise UserError(
            f"{KEY}: {position.model} has another id than model.id for {len(others):,} tokens, such as {others[0]!r}: "
            "it must have the tokenizer of the model that is trained"
        )
    found, needed = source.config().vocab_size, min(rows, len(tokens))
    if found < needed:
        raise UserError(f"{KEY}: {position.model}: its embedding has {found:,} rows, and the data needs {needed:,}")
