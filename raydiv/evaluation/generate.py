"""Generation of answers up to the end of the turn, greedy or sampled: by an actor pool, by vLLM, or by a server."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydiv.config.cluster import ClusterConfig
from raydiv.evaluation.server import TOKEN_IDS, Server
from raydiv.evaluation.vllm_engine import Vllm
from raydiv.model.chat import Chat, ChatPrompt, as_messages
from raydiv.model.load import ModelSource
from raydiv.runtime.model_pool import map_rows
from raydiv.utils.errors import UserError
from raydiv.utils.progress import Progress, no_progress

BATCH_ROWS = {"cpu": 32, "cuda": 256}
"""Most prompts in a batch by type of device; changes speed and memory alone."""

CACHE_SHARE = 0.6
"""Share of a GPU's free memory for the keys and values of a batch; logits and the growth of the cache need the rest."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to answer; the answer starts with ``opening``. With a ``seed`` it is sampled at temperature 1, else
    greedy. ``control_tokens``: those in the prompt's texts are tokens, whatever the recipe says.
    """

    prompt: ChatPrompt
    opening: str = ""
    seed: int | None = None
    control_tokens: bool = False


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """A model's answer: ``text`` without special tokens; token ids of prompt and answer (with opening and end of turn).

    ``thought``: the thinking block before the text, None without one. ``text`` is None where the thought does not end.
    ``error`` says why there is no answer.
    """

    text: str | None
    prompt_ids: list[int]
    ids: list[int]
    thought: str | None = None
    error: str | None = None

    @property
    def written(self) -> str:
        """The text; of a thought that does not end, the thought."""
        return str((self.thought or "") if self.text is None else self.text)


def generate(
    model: ModelSource,
    requests: Sequence[Request],
    max_new_tokens: int,
    cluster: ClusterConfig,
    progress: Progress = no_progress,
    engine: Server | Vllm | None = None,
) -> list[GeneratedAnswer]:
    """One answer per request, of at most ``max_new_tokens`` tokens after its opening.

    By ``engine``, else by a pool; both but a server need a Ray session. Raises UserError for a request that the server
    cannot be given.
    """
    chat = model.chat()
    prompts = [chat.prompt_ids(request.prompt, control_tokens=request.control_tokens) for request in requests]
    openings = [chat.text_ids(request.opening) for request in requests]
    stops = sorted({chat.end_of_turn.id, chat.tokenizer.eos_token_id} - {None})
    rows = [
        {"ids": prompt + opening, "seed": request.seed}
        for prompt, opening, request in zip(prompts, openings, requests, strict=True)
    ]
    completions: Sequence[list[int] | str] = []
    if engine is None:
        completions = complete(model, rows, max_new_tokens, stops, cluster, progress)
    elif isinstance(engine, Vllm):
        completions = engine.complete(model, rows, max_new_tokens, stops, cluster, progress)
    elif rows:
        if engine.takes_token_ids(prompts[0]):
            served = [_completion(row, max_new_tokens, stops) for row in rows]
        else:
            served = [_chat_request(engine, request, max_new_tokens) for request in requests]
        completions = _served(engine, chat, served, progress)
    generated = []
    for request, prompt, opening, completion in zip(requests, prompts, openings, completions, strict=True):
        if isinstance(completion, str):
            generated.append(GeneratedAnswer(None, prompt, [chat.end_of_turn.id], error=completion))
            continue
        ids = opening + completion
        thought, text = chat.split_answer(request.prompt, ids)
        generated.append(GeneratedAnswer(text, prompt, ids, thought))
    return generated


def _completion(row: dict[str, Any], max_new_tokens: int, stops: Sequence[int]) -> dict[str, Any]:
    """A row as a request to a server's completions."""
    request = {"prompt": row["ids"], "max_tokens": max_new_tokens, "stop_token_ids": list(stops), **TOKEN_IDS}
    return request | _sampling(row["seed"])


def _chat_request(server: Server, request: Request, max_new_tokens: int) -> dict[str, Any]:
    """A request to a server's chat endpoint, whose template is the server's. Raises UserError where it has no place."""
    messages = as_messages(request.prompt)
    if request.opening or request.control_tokens or messages[-1]["role"] == "assistant":
        raise UserError(
            f"{server.url}: takes no token ids, so that an answer cannot be begun for the model, and no control tokens "
            "be sent: leave prefill and forged-turn out, or use a server with completions"
        )
    return {"messages": messages, "max_tokens": max_new_tokens} | _sampling(request.seed)


def _sampling(seed: int | None) -> dict[str, Any]:
    return {"temperature": 0} if seed is None else {"temperature": 1, "top_p": 1, "seed": seed}


def _served(
    server: Server, chat: Chat, requests: Sequence[dict[str, Any]], progress: Progress
) -> list[list[int] | str]:
    """The ids of a server's reply to each request, or why there is none. A text is tokenised."""
    completions: list[list[int] | str] = []
    for request, reply in zip(requests, server.replies(requests, progress), strict=True):
        if reply.error is not None:
            completions.append(reply.error)
            continue
        ids = chat.text_ids(reply.text) if reply.ids is None else reply.ids
        has_stop = bool(ids) and ids[-1] in request.get("stop_token_ids", ())
        completions.append(ids if has_stop or not reply.finished else [*ids, chat.end_of_turn.id])
    return completions


def complete(
    model: ModelSource,
    rows: Sequence[dict[str, Any]],
    max_new_tokens: int,
    stops: Sequence[int],
    cluster: ClusterConfig,
    progress: Progress = no_progress,
) -> list[list[int]]:
    """Ids that a model generates after the ``ids`` of each row, up to and including the first of ``stops``, or a token
    that the model's own generation config stops at. A row may have a ``seed``.
    """
    arguments = {"model": model, "max_new_tokens": max_new_tokens, "stops": stops}
    completions = _map_prompts(rows, TextGenerator, arguments, cluster, progress)
    return [[int(token) for token in result["answer"]] for result in completions]


def choice_probabilities(
    model: ModelSource,
    rows: Sequence[dict[str, Any]],
    choices: Sequence[int],
    cluster: ClusterConfig,
    progress: Progress = no_progress,
) -> list[list[float]]:
    """Probabilities of the tokens ``choices`` [c] as the next one after the ``ids`` of each row, among each other."""
    results = _map_prompts(rows, ChoiceScorer, {"model": model, "choices": choices}, cluster, progress)
    return [result["probabilities"] for result in results]


def _map_prompts(
    rows: Sequence[dict[str, Any]],
    worker: type,
    arguments: dict[str, Any],
    cluster: ClusterConfig,
    progress: Progress,
) -> list[Any]:
    """The worker's result for each row of ``ids``, by the pool of models."""
    return map_rows(
        rows,
        worker,
        arguments,
        cluster=cluster,
        batch_rows=BATCH_ROWS["cuda" if cluster.use_gpu else "cpu"],
        progress=progress,
        length=lambda row: len(row["ids"]),
    )


class TextGenerator:
    """Actor that generates completions."""

    def __init__(self, model: ModelSource, max_new_tokens: int, stops: Sequence[int]) -> None:
        from transformers import GenerationConfig

        self._model, self._max_new_tokens = model.load_for_inference(), max_new_tokens
        model_eos = self._model.generation_config.eos_token_id
        own = model_eos if isinstance(model_eos, list) else [] if model_eos is None else [model_eos]
        self._stops = {*stops, *own}
        # the model's other settings are dropped: a repetition penalty, for example, would make answers not greedy
        self._config = GenerationConfig(
            do_sample=False, eos_token_id=sorted(self._stops), pad_token_id=stops[0], return_dict_in_generate=True
        )

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``ids`` -> ``answer`` ids, up to and including a stop."""
        sizes = [len(row["ids"]) + self._max_new_tokens for row in rows]
        spans = batches_of_cache(sizes, self._cached_tokens())
        return [answer for span in spans for answer in self._answers(rows[span])]

    def _cached_tokens(self) -> int | None:
        """Tokens whose keys and values fit; None on a CPU."""
        if self._model.device.type != "cuda":
            return None
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * size * self._model.dtype.itemsize
        return int(CACHE_SHARE * torch.cuda.mem_get_info(self._model.device)[0] / token_bytes)

    def _answers(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers to one batch, whose prompts are padded on the left.

        When half of its rows have ended, the others go on without them: refusals are short.
        """
        device = self._model.device
        ids, mask = (padded.to(device) for padded in _padded_left(rows))
        start, cache = ids.shape[1], None
        noise = _GumbelNoise([row.get("seed") for row in rows], device)
        answers: list[list[int]] = [[] for _ in rows]
        going = list(range(len(rows)))
        with torch.inference_mode(), _generation_config(self._model, self._config):
            while going:
                output = self._model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    max_length=start + self._max_new_tokens,
                    logits_processor=[noise] if noise.has_seeds else [],
                    stopping_criteria=[_HalfEnded(self._stops, len(going), device)],
                )
                ids, cache = output.sequences, output.past_key_values
                for row, answer in zip(going, ids[:, start:].tolist(), strict=True):
                    answers[row] = until_stop(answer, self._stops)
                full = ids.shape[1] == start + self._max_new_tokens
                stay = [] if full else [n for n, row in enumerate(going) if answers[row][-1] not in self._stops]
                going = [going[n] for n in stay]
                kept = torch.tensor(stay, dtype=torch.long, device=device)
                mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)[kept]
                ids = ids[kept]
                noise.keep(stay)
                if self._can_select(cache):
                    cache.reorder_cache(kept)
                else:
                    cache = None  # computed again
        return [{"answer": answer} for answer in answers]

    def _can_select(self, cache: Any) -> bool:
        """Whether the rows of a cache can be selected: it is of transformers' own kind, and holds the whole state."""
        from transformers import DynamicCache

        return type(cache) is DynamicCache and not getattr(self._model, "_is_stateful", False)


def until_stop(answer: list[int], stops: Collection[int]) -> list[int]:
    """An answer up to and including its first stop."""
    end = next((position for position, token in enumerate(answer) if token in stops), len(answer))
    return answer[: end + 1]


class ChoiceScorer:
    """Actor that scores the next token of texts."""

    def __init__(self, model: ModelSource, choices: Sequence[int]) -> None:
        from transformers import GenerationConfig

        self._model, self._choices = model.load_for_inference(), list(choices)
        self._config = GenerationConfig(
            do_sample=False, max_new_tokens=1, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of ``ids`` -> ``probabilities`` of the choices."""
        batches = [rows[start : start + SCORED_ROWS] for start in range(0, len(rows), SCORED_ROWS)]
        return [result for batch in batches for result in self._score(batch)]

    def _score(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        ids, mask = _padded_left(rows)
        with torch.inference_mode(), _generation_config(self._model, self._config):
            output = self._model.generate(
                input_ids=ids.to(self._model.device), attention_mask=mask.to(self._model.device)
            )
        probabilities = output.logits[0][:, self._choices].float().softmax(-1)
        return [{"probabilities": row} for row in probabilities.tolist()]


SCORED_ROWS = 8
"""Rows of a batch whose next tokens are scored. Their prompts are long, so that more rows are no faster."""


def _padded_left(rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """``ids`` of the rows, padded on the left, and their attention mask; both [rows, longest]."""
    length = max(len(row["ids"]) for row in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row["ids"]) :] = torch.as_tensor(row["ids"])
        mask[number, length - len(row["ids"]) :] = 1
    return ids, mask


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """``generate`` takes settings that it is not given from the model, whose own other workers need again."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def batches_of_cache(sizes: Sequence[int], limit: int | None) -> list[slice]:
    """Consecutive batches of rows, each padded to the largest of its ``sizes`` in tokens and, where it has more than
    one row, of at most ``limit`` tokens.
    """
    spans, start, largest = [], 0, 0
    for row, size in enumerate(sizes):
        largest = max(largest, size)
        if limit is not None and row > start and largest * (row + 1 - start) > limit:
            spans.append(slice(start, row))
            start, largest = row, size
    return [*spans, slice(start, len(sizes))]


class _HalfEnded:
    """Stops ``generate`` when half of its rows have ended with a stop."""

    def __init__(self, stops: Collection[int], rows: int, device: torch.device) -> None:
        self._stops = torch.tensor(sorted(stops), device=device)
        self._ended = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self._ended |= torch.isin(ids[:, -1], self._stops)
        return (2 * self._ended.sum() >= len(self._ended)).expand_as(self._ended)


class _GumbelNoise:
    """Gumbel noise on the logits of rows with a seed: the argmax is then a sample at temperature 1.

    Each row has its own generator, so that its answer does not depend on the batch. It draws on the model's device, so
    answers differ between kinds of devices.
    """

    def __init__(self, seeds: Sequence[int | None], device: torch.device) -> None:
        self._generators = [None if seed is None else torch.Generator(device).manual_seed(seed) for seed in seeds]

    @property
    def has_seeds(self) -> bool:
        return any(generator is not None for generator in self._generators)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        self._generators = [self._generators[row] for row in rows]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        noisy = scores.float().clone()
        for row, generator in enumerate(self._generators):
            if generator is not None:
                noisy[row] -= torch.empty_like(noisy[row]).exponential_(generator=generator).log()
        return noisy
