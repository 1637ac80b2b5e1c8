"""Greedy coordinate gradient (GCG) by the nanogcg library: a suffix for each prompt, searched by an actor pool."""

from __future__ import annotations

import copy
import gc
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import AttackConfig
from raydiv.model.chat import ChatPrompt, as_messages
from raydiv.model.load import ModelSource
from raydiv.model.template import Messages
from raydiv.runtime.model_pool import map_rows
from raydiv.utils.compat import patched_nanogcg
from raydiv.utils.errors import UserError
from raydiv.utils.progress import Progress, no_progress


def require_nanogcg() -> None:
    """Raises UserError when the library is not installed."""
    if importlib.util.find_spec("nanogcg") is None:
        # --no-deps: its pin of transformers is older than raydiv's
        raise UserError("evaluate.attacks: gcg needs nanogcg; run: pip install --no-deps nanogcg==0.3.0")


def search_suffixes(
    model: ModelSource,
    prompts: Sequence[ChatPrompt],
    attack: AttackConfig,
    cluster: ClusterConfig,
    progress: Progress = no_progress,
) -> list[str]:
    """For each prompt the suffix that makes the attack's opening most likely; needs a Ray session."""
    rows = [{"prompt": prompt, "seed": number} for number, prompt in enumerate(prompts)]
    results = map_rows(
        rows, GcgAttacker, {"model": model, "attack": attack}, cluster=cluster, batch_rows=1, progress=progress
    )
    return [str(row["suffix"]) for row in results]


class GcgAttacker:
    """Actor that searches suffixes for its model."""

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
        with _nanogcg(self._tokenizer, self._model) as allowed_tokens:
            settings = self._attack.gcg
            config = nanogcg.GCGConfig(
                num_steps=settings.steps,
                search_width=settings.search_width,
                topk=min(settings.topk, allowed_tokens),
                seed=seed,
                # the library's prefix cache does not work with current transformers
                use_prefix_cache=False,
                verbosity="ERROR",
            )
            result = nanogcg.run(self._model, self._tokenizer, [*turns[:-1], last], settings.opening, config)
        return str(result.best_string)


def _without_unused_bos(tokenizer: Any) -> Any:
    """The tokenizer, without BOS where it adds none: the library removes each BOS from a template, also one that starts
    a turn.
    """
    if tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        tokenizer.bos_token = None
    return tokenizer


@contextmanager
def _nanogcg(tokenizer: Any, model: Any) -> Iterator[int]:
    """Set nanogcg up: no special tokens in suffixes, no progress bar, and no seconds of garbage collection in each
    step.

    Yields the number of tokens allowed in a suffix. Restores torch's deterministic mode, which the library sets.
    """
    import torch
    from nanogcg.gcg import get_nonascii_toks

    deterministic = torch.are_deterministic_algorithms_enabled()
    rows = model.get_input_embeddings().weight.shape[0]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}

    def forbidden(tokenizer: Any, device: Any = "cpu") -> Any:
        tokens = {*get_nonascii_toks(tokenizer, "cpu").tolist(), *special, *range(len(tokenizer), rows)}
        return torch.tensor(sorted(token for token in tokens if token < rows), device=device)

    gc.collect()
    gc.freeze()
    try:
        with patched_nanogcg(forbidden):
            yield rows - len(forbidden(tokenizer))
    finally:
        gc.unfreeze()
        torch.use_deterministic_algorithms(deterministic)
