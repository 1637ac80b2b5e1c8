"""Prepared examples on storage, made without Ray: from token ids, or from a recipe's sources."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiv.config import Recipe, load_recipe
from raydiv.data import tokenize as module
from raydiv.data.index import Index, OpenSource
from raydiv.data.tokens import KEY, ROW_GROUP_SIZE, StoredExamples, TokenShards, content_key
from raydiv.model.chat import Chat, Ids
from raydiv.utils.errors import UserError
from raydiv.utils.progress import Progress, no_progress

PLANTED = "PLANTED-TEXT"
"""Text of rows, which must not occur in any message."""

NOWHERE = TokenShards((), np.zeros(1, np.int64))
"""The shards of examples whose ids are not read."""


def write_shards(folder: Path, ids: Sequence[tuple[Ids, Ids]], sizes: Sequence[int]) -> TokenShards:
    """Write (prompt ids, response ids) to files of ``sizes`` rows."""
    folder.mkdir(parents=True)
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    assert starts[-1] == len(ids)
    for number, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
        kind = pa.list_(pa.int32())
        columns = {
            name: pa.array([np.asarray(row[side], np.int32) for row in ids[start:stop]], kind)
            for side, name in enumerate(("prompt_ids", "response_ids"))
        }
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=ROW_GROUP_SIZE)
    return TokenShards(tuple(str(folder / f"{number}.parquet") for number in range(len(sizes))), starts)


def stored_examples(
    ids: Sequence[tuple[Ids, Ids]],
    aligned: Sequence[bool],
    pair: Sequence[int],
    source: Sequence[int] | None = None,
    shards: TokenShards = NOWHERE,
) -> StoredExamples:
    """Examples with the labels of ``ids``; row i is row i of ``shards``."""
    rows = np.arange(len(ids))
    return StoredExamples(
        shards,
        rows,
        rows,
        np.array([len(prompt) for prompt, _ in ids], np.int32),
        np.array([len(response) for _, response in ids], np.int32),
        np.array(aligned, bool),
        np.array(pair, np.int64),
        np.array([0] * len(ids) if source is None else source, np.int16),
        np.array([content_key(prompt) for prompt, _ in ids], KEY),
        np.array([content_key(response) for _, response in ids], KEY),
    )


def recipe_of(tokenizer: Path, train: Any, loss: str = "kldo", **changes: Any) -> Recipe:
    """A recipe with the sources; ``changes`` are keys of data, except ``seed`` and ``batch``."""
    top: dict[str, Any] = {name: changes.pop(name) for name in ("seed", "batch") if name in changes}
    data = {"train": train, **changes}
    model = {"id": str(tokenizer)}
    return load_recipe({"model": model, "loss": {"type": loss}, "optim": {"steps": 1}, "data": data, **top})


def opened(recipe: Recipe, chat: Chat) -> tuple[list[OpenSource], list[OpenSource]]:
    """The recipe's sources of training and of held-out examples."""
    train, held_out = (
        [OpenSource(source, recipe.data, recipe.batch, chat) for source in sources]
        for sources in (recipe.data.train, recipe.data.eval_sources)
    )
    return train, held_out


def indices_of(
    sources: Sequence[OpenSource], recipe: Recipe, chat: Chat, progress: Progress = no_progress
) -> list[Index]:
    """The index of each source, tokenised in this process."""
    quarantine = recipe.data.on_bad_row == "quarantine"
    with patch.object(module, "map_stream", stream_here):
        return module.tokenize(sources, chat, recipe.cluster, quarantine=quarantine, progress=progress)


def stream_here(
    readers: Sequence[Callable[[], Iterable[Any]]], worker: type, arguments: dict[str, Any], **_: Any
) -> Iterator[Any]:
    """``row_stream.map_stream`` with one worker, in this process; rows and arguments are pickled all the same."""
    actor = worker(**pickle.loads(pickle.dumps(arguments)))
    for reader in readers:
        for row in pickle.loads(pickle.dumps(reader))():
            yield from pickle.loads(pickle.dumps(actor(pickle.loads(pickle.dumps([row])))))


def rows_here(rows: Sequence[Any], worker: type, arguments: dict[str, Any], **_: Any) -> Iterator[tuple[int, Any]]:
    """``model_pool.map_rows_unordered`` with one worker, in this process; all is pickled nevertheless."""
    actor = worker(**pickle.loads(pickle.dumps(arguments)))
    for position, row in enumerate(rows):
        yield position, *pickle.loads(pickle.dumps(actor(pickle.loads(pickle.dumps([row])))))


def refusal_of(prepare: Callable[[Recipe, Chat], object], recipe: Recipe, chat: Chat) -> str:
    """The message of the UserError: one line, without the text of any row."""
    with pytest.raises(UserError) as caught:
        prepare(recipe, chat)
    message = str(caught.value)
    assert PLANTED not in message
    assert "\n" not in message
    return message
