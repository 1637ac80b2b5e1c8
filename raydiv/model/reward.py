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


def reward_directory(recipe: Recipe, rows: int, chat: Chat) -> Path | None:
    """The directory of the model or the adapter: ``loss.position.model`` itself, or what that run trained; None where
    the recipe takes no rewards.

    ``rows`` is the number of rows of the embedding of the model that is trained. Raises UserError where there is no
    model, or it has other ids for the tokens of ``chat`` or too few of the rows.
    """
    position = recipe.loss.position.rule
    if not isinstance(position, RewardWeights):
        return None
    trained = Path(position.model).expanduser() / "model"
    is_run = any((trained / name).is_file() for name in ("config.json", "adapter_config.json"))
    directory = model_directory(str(trained) if is_run else position.model, key=KEY)
    _require_same_tokens(ModelSource.from_recipe(recipe, directory), position, rows, chat)
    return directory


def _require_same_tokens(source: ModelSource, position: RewardWeights, rows: int, chat: Chat) -> None:
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
