"""Answers of a model behind an OpenAI-compatible server, such as vLLM's, SGLang's or a provider's."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raydiv.config.evaluate import EvaluateConfig
from raydiv.evaluation.replies import Reply, ReplyStore
from raydiv.utils.errors import UserError, one_line
from raydiv.utils.progress import Progress, no_progress
from raydiv.utils.secrets import has_password

T = TypeVar("T")

RETRIES = 6
"""Further attempts at a request that the server could not take, with growing pauses or the pause that it asks for."""

TIMEOUT_S = 600.0
"""Seconds for a reply: a server that is full holds requests back."""

NOT_TAKEN = (400, 404, 405, 422, 501)
"""Statuses of a server that has no completions, or none of token ids."""

TOKEN_IDS = {"skip_special_tokens": False, "return_token_ids": True}
"""Fields of vLLM: the reply has the token ids, and special tokens in its text."""


@dataclass(slots=True)
class Usage:
    """What a server was asked for: replies ``kept`` from before cost nothing."""

    requests: int = 0
    kept: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __str__(self) -> str:
        kept = f" ({self.kept} more replies were kept from before)" if self.kept else ""
        return f"{self.requests} requests{kept}, {self.prompt_tokens} prompt and {self.completion_tokens} new tokens"


@dataclass(slots=True)
class Server:
    """A client of the server at ``address``: its URL up to /v1, and #MODEL where it serves several models.

    A reply is kept by its request's content, so that a run that was stopped asks for the missing ones alone.
    """

    address: str
    config: EvaluateConfig
    url: str = field(init=False)
    usage: Usage = field(default_factory=Usage)
    _model: str = field(init=False)

    def __post_init__(self) -> None:
        self.url, _, self._model = self.address.partition("#")
        if has_password(self.url):
            raise UserError("the server's address has a password in it; name a variable with the key instead")

    @property
    def model(self) -> str:
        """The model that is asked. Raises UserError where the server cannot be reached, or serves several."""
        if not self._model:
            names = _run(self._model_names())
            if len(names) != 1:
                raise UserError(f"{self.url}: serves {', '.join(names) or 'no model'}; add #MODEL to its address")
            (self._model,) = names
        return self._model

    def takes_token_ids(self, prompt: Sequence[int]) -> bool:
        """Whether it completes a ``prompt`` of token ids; other servers have a chat endpoint alone.

        Raises UserError where that cannot be told.
        """
        (reply,) = self.replies([{"prompt": list(prompt), "max_tokens": 1, "temperature": 0, **TOKEN_IDS}], kept=False)
        if reply.error is not None and reply.status not in NOT_TAKEN:
            raise UserError(f"{self.url}: {reply.error}")
        return reply.error is None

    def replies(
        self, requests: Sequence[dict[str, Any]], progress: Progress = no_progress, *, kept: bool = True
    ) -> list[Reply]:
        """A reply to each request: one with ``messages`` goes to the chat endpoint, one with ``prompt`` to completions.

        A request that the server refuses, or does not take after RETRIES, has a reply with an ``error``. Raises
        UserError where it cannot be reached, or refuses the key.
        """
        bodies = [{"model": self.model, **request} for request in requests]
        store = ReplyStore(self.url) if kept else None
        return _run(self._replies(bodies, store, progress))

    async def _replies(
        self, bodies: Sequence[dict[str, Any]], store: ReplyStore | None, progress: Progress
    ) -> list[Reply]:
        known = [store.get(body) if store else None for body in bodies]
        self.usage.kept += sum(reply is not None for reply in known)
        slots, pace = asyncio.Semaphore(self.config.server_requests), _Pace(self.config.requests_per_minute)
        done = len(bodies) - known.count(None)

        async def reply(client: Any, body: dict[str, Any]) -> Reply:
            nonlocal done
            async with slots:
                await pace.wait()
                received = await self._ask(client, body)
            done += 1
            progress(done, len(bodies))
            if store and received.error is None:
                store.put(body, received)
            return received

        try:
            async with self._client() as client:
                new = iter(
                    await asyncio.gather(
                        *(reply(client, body) for body, found in zip(bodies, known, strict=True) if found is None)
                    )
                )
        finally:
            if store:
                store.save()
        return [next(new) if found is None else found for found in known]

    async def _ask(self, client: Any, body: dict[str, Any]) -> Reply:
        import openai

        endpoint = client.chat.completions if "messages" in body else client.completions
        extra = {key: body[key] for key in (*TOKEN_IDS, "stop_token_ids") if key in body}
        self.usage.requests += 1
        try:
            answer = await endpoint.create(
                **{key: value for key, value in body.items() if key not in extra}, extra_body=extra
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            variable = self.config.server_key_env
            remedy = f"check the key in {variable}" if variable else "name the variable with the key: server_key_env"
            raise UserError(f"{self.url}: refuses the request ({error.status_code}); {remedy}") from None
        except (openai.APIConnectionError, openai.APITimeoutError) as error:
            raise UserError(f"{self.url}: cannot be reached: {one_line(error.__cause__ or error, 200)}") from None
        except openai.APIStatusError as error:
            return Reply(error=f"{error.status_code} {one_line(error.message, 200)}", status=error.status_code)
        except (openai.APIResponseValidationError, ValueError) as error:
            return Reply(error=f"unreadable reply: {one_line(error, 200)}")
        if answer.usage:
            self.usage.prompt_tokens += answer.usage.prompt_tokens or 0
            self.usage.completion_tokens += answer.usage.completion_tokens or 0
        return _read(answer)

    async def _model_names(self) -> list[str]:
        import openai

        try:
            async with self._client() as client:
                return [model.id async for model in client.models.list()]
        except openai.OpenAIError as error:
            raise UserError(f"{self.url}: cannot be asked for its models: {one_line(error, 200)}") from None

    def _client(self) -> Any:
        """A client of the openai library, which retries. Raises UserError without the library, and without the key."""
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise UserError(f"{self.url}: needs the openai library; run: pip install 'raydiv[server]'") from None
        variable = self.config.server_key_env
        key = os.environ.get(variable, "") if variable else "none"
        if not key:
            raise UserError(f"evaluate.server_key_env: the variable {variable} is not set")
        return AsyncOpenAI(base_url=self.url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT_S)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also where a loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _read(answer: Any) -> Reply:
    """The reply in the server's answer."""
    if not answer.choices:
        return Reply(error="no choices in the reply")
    choice = answer.choices[0]
    message = getattr(choice, "message", None)
    text = choice.text if message is None else message.content
    if choice.finish_reason == "content_filter":
        return Reply(error="the server's content filter")
    if text is None:
        return Reply(error="no text in the reply")
    ids = getattr(choice, "token_ids", None)
    return Reply(text, ids, finished=choice.finish_reason == "stop")


class _Pace:
    """Spaces requests out evenly to at most ``per_minute``."""

    def __init__(self, per_minute: int | None) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._interval
        await asyncio.sleep(start - now)
