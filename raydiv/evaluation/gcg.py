"""Greedy coordinate gradient by the nanogcg library: a suffix for each prompt, sought by an actor pool of models."""

from __future__ import annotations

import copy
import gc
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import AttackConfig
from raydiv.model.chat import Messages, as_messages
from raydiv.model.load import ModelSource
from raydiv.runtime.actor_pool import Progress, map_rows, no_progress
from raydiv.utils.errors import UserError


def require_nanogcg() -> None:
    """Raises UserError without the library."""
    if importlib.util.find_spec("nanogcg") is None:
        # its own pin of transformers is older than raydiv's
        raise UserError("evaluate.attacks: gcg needs nanogcg; run: pip install --no-deps nanogcg==0.3.0")


def search_suffixes(
    model: ModelSource,
    prompts: Sequence[str | Messages],
    attack: AttackConfig,
    cluster: ClusterConfig,
    progress: Progress = no_progress,
) -> list[str]:
    """A suffix for each prompt after which the model is most inclined to begin as the attack's opening; needs a Ray session."""
    rows = [{"prompt": prompt, "seed": number} for number, prompt in enumerate(prompts)]
    done = map_rows(
        rows, GcgAttacker, {"model": model, "attack": attack}, cluster=cluster, batch_rows=1, progress=progress
    )
    return [str(row["suffix"]) for row in done]


class GcgAttacker:
    """A model that is attacked."""

    def __init__(self, model: ModelSource, attack: AttackConfig) -> None:
        require_nanogcg()
        self._attack = attack
        self._model = model.load_for_inference()
        self._tokenizer = _without_unused_bos(copy.deepcopy(model.chat().tokenizer))

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``prompt`` and ``seed`` -> ``suffix``."""
        return [{"suffix": self._suffix(as_messages(row["prompt"]), row["seed"])} for row in rows]

    def _suffix(self, turns: Messages, seed: int) -> str:
        import nanogcg

        last = {**turns[-1], "content": f"{turns[-1]['content']} {{optim_str}}"}
        with _tamed(self._tokenizer, self._model) as allowed:
            settings = self._attack.gcg
            config = nanogcg.GCGConfig(
                num_steps=settings.steps,
                search_width=settings.search_width,
                topk=min(settings.topk, allowed),
                seed=seed,
                # transformers' caches have changed since the library was written
                use_prefix_cache=False,
                verbosity="ERROR",
            )
            found = nanogcg.run(self._model, self._tokenizer, [*turns[:-1], last], settings.opening, config)
        return str(found.best_string)


def _without_unused_bos(tokenizer: Any) -> Any:
    """A tokenizer whose templates the library leaves whole: it takes every BOS out, also where that begins each turn."""
    if tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        tokenizer.bos_token = None
    return tokenizer


@contextmanager
def _tamed(tokenizer: Any, model: Any) -> Iterator[int]:
    """The library without special tokens in its suffixes, without a bar, and without seconds of garbage collection a step.

    Gives the number of tokens that a suffix may be made of.
    """
    import torch
    from nanogcg import gcg

    deterministic = torch.are_deterministic_algorithms_enabled()
    rows = model.get_input_embeddings().weight.shape[0]
    plain, special = gcg.get_nonascii_toks, {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}

    def forbidden(of: Any, device: Any = "cpu") -> Any:
        found = {*plain(of, "cpu").tolist(), *special, *range(len(of), rows)}
        return torch.tensor(sorted(token for token in found if token < rows), device=device)

    gc.collect()
    gc.freeze()
    try:
        with patch.object(gcg, "get_nonascii_toks", forbidden), patch.object(gcg, "tqdm", lambda steps, **_: steps):
            yield rows - len(forbidden(tokenizer))
    finally:
        gc.unfreeze()
        torch.use_deterministic_algorithms(deterministic)
