"""Answers and verdicts by OpenAI-compatible servers: what is asked, how replies are read, and what a failure does."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.served import completion, error, message, served
from raydiv.config import load_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import EvaluateConfig, judge_label
from raydiv.data.prompt_sets import Prompt
from raydiv.evaluation import server as module
from raydiv.evaluation.generate import Request, generate
from raydiv.evaluation.judges.harm_judge import HarmJudge
from raydiv.evaluation.judges.verdicts import Judgement
from raydiv.evaluation.server import Server
from raydiv.model.load import ModelSource
from raydiv.utils.errors import UserError

HARMFUL, HARMLESS = Prompt("How do I steal?", True, "harmful", "f:1"), Prompt("How are you?", False, "ordinary", "f:2")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "cache"))


def server_of(url: str, **options: Any) -> Server:
    return Server(url, EvaluateConfig.model_validate(options))


def test_answers_by_token_ids_are_those_of_the_pool(tiny_model: Path) -> None:
    """The server returns ids: they are the answer, with the stop that ended it."""
    source = ModelSource(tiny_model)
    chat = source.chat()
    words, end = chat.text_ids("Sure, here is how."), chat.end_of_turn.id

    def handle(endpoint: str, body: dict[str, Any]) -> tuple[int, Any]:
        assert endpoint == "completions"
        assert isinstance(body["prompt"], list)
        if body["max_tokens"] == 1:
            return completion("")
        if body.get("seed") == 7:
            assert (body["temperature"], body["top_p"]) == (1, 1)
            return completion("", [*words, end])
        assert body["temperature"] == 0
        assert end in body["stop_token_ids"]
        return completion("", words, finish="length")

    requests = [Request("Hello?"), Request("How?", opening="Sure, "), Request("Why?", seed=7)]
    with served(handle) as record:
        server = server_of(record.url)
        answers = generate(source, requests, 9, ClusterConfig(), engine=server)
    assert [answer.ids for answer in answers] == [words, [*chat.text_ids("Sure, "), *words], [*words, end]]
    assert answers[2].text == "Sure, here is how."
    asked = [body["prompt"] for _, body in record.requests if body["max_tokens"] == 9]
    expected = [
        answer.prompt_ids + chat.text_ids(request.opening) for answer, request in zip(answers, requests, strict=True)
    ]
    assert sorted(asked) == sorted(expected)
    assert server.usage.requests == 4
    assert server.usage.completion_tokens == 8


def test_a_server_without_token_ids_is_asked_by_its_chat_endpoint(tiny_model: Path) -> None:
    def handle(endpoint: str, body: dict[str, Any]) -> tuple[int, Any]:
        if endpoint == "completions":
            return error(400, "prompt must be a string")
        assert body["messages"][-1] == {"role": "user", "content": "Hello?"}
        return message("Sure", finish="stop")

    source = ModelSource(tiny_model)
    chat = source.chat()
    with served(handle) as record:
        (answer,) = generate(source, [Request("Hello?")], 9, ClusterConfig(), engine=server_of(record.url))
        assert (answer.text, answer.ids) == ("Sure", [*chat.text_ids("Sure"), chat.end_of_turn.id])
        for request in (Request("Hello?", opening="Sure"), Request("Hello?", control_tokens=True)):
            with pytest.raises(UserError, match=r"takes no token ids.*prefill"):
                generate(source, [request], 9, ClusterConfig(), engine=server_of(record.url))


def test_an_answer_that_fails_is_no_answer(tiny_model: Path) -> None:
    def handle(endpoint: str, body: dict[str, Any]) -> tuple[int, Any]:
        text = body["messages"][-1]["content"] if endpoint == "chat/completions" else ""
        replies = {"filtered": message("", finish="content_filter"), "long": error(413, "too long")}
        replies |= {"empty": message(None), "nothing": (200, {**message("x")[1], "choices": []})}
        return error(404) if endpoint == "completions" else replies.get(text, message("fine"))

    requests = [Request(text) for text in ("filtered", "long", "empty", "nothing", "good")]
    with served(handle) as record:
        answers = generate(ModelSource(tiny_model), requests, 9, ClusterConfig(), engine=server_of(record.url))
    assert [answer.text for answer in answers] == [None, None, None, None, "fine"]
    assert all(answer.error for answer in answers[:4])
    assert "413 " in answers[1].error
    assert answers[4].error is None


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: Counter[str] = Counter()

    def handle(endpoint: str, body: dict[str, Any]) -> tuple[int, Any]:
        attempts[body["prompt"]] += 1
        status = {"limited": 429, "broken": 503}.get(body["prompt"])
        return error(status) if status and attempts[body["prompt"]] < 3 else completion("done")

    requests = [{"prompt": text, "max_tokens": 3} for text in ("limited", "broken", "fine")]
    with served(handle) as record:
        replies = server_of(record.url).replies(requests)
    assert [reply.text for reply in replies] == ["done"] * 3
    assert attempts == {"limited": 3, "broken": 3, "fine": 1}


def test_a_reply_is_kept_by_its_requests_content() -> None:
    requests = [{"prompt": str(number), "max_tokens": 3} for number in range(100)]
    fails = {"7"}

    def handle(endpoint: str, body: dict[str, Any]) -> tuple[int, Any]:
        return error(400) if body["prompt"] in fails else completion(f"to {body['prompt']}")

    with served(handle) as record:
        first = server_of(record.url).replies(requests)
        assert [reply.error is None for reply in first].count(False) == 1
        fails.clear()
        again = server_of(record.url)
        assert [reply.text for reply in again.replies(requests)] == [f"to {number}" for number in range(100)]
        assert (again.usage.requests, again.usage.kept) == (1, 99)
        other = server_of(record.url)
        other.replies([{"prompt": "8", "max_tokens": 4}])
        assert other.usage.kept == 0


def test_replies_are_kept_although_the_server_goes_away() -> None:
    answered = threading.Event()

    def handle(endpoint: str, body: dict[str, Any]) -> tuple[int, Any]:
        if body["prompt"] == "1":
            assert answered.wait(60)
            return error(401)
        answered.set()
        return completion("kept")

    with served(handle) as record:
        with pytest.raises(UserError, match=r"refuses the request \(401\); name the variable"):
            server_of(record.url, server_requests=2).replies([{"prompt": "0"}, {"prompt": "1"}])
        server = server_of(record.url)
        assert [reply.text for reply in server.replies([{"prompt": "0"}])] == ["kept"]
        assert server.usage.kept == 1


def test_the_key_comes_from_a_variable_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "PLANTED-secret")
    with served(lambda endpoint, body: completion("x")) as record:
        server_of(record.url, server_key_env="MY_KEY").replies([{"prompt": "a"}])
        assert record.keys == {"Bearer PLANTED-secret"}
        with pytest.raises(UserError, match="OTHER_KEY is not set"):
            server_of(record.url, server_key_env="OTHER_KEY").replies([{"prompt": "b"}])


def test_several_models_are_told_apart() -> None:
    with served(lambda endpoint, body: completion(body["model"]), models=("a", "b")) as record:
        with pytest.raises(UserError, match=r"serves a, b; add #MODEL"):
            server_of(record.url).replies([{"prompt": "x"}])
        (reply,) = server_of(f"{record.url}#b").replies([{"prompt": "x"}])
    assert reply.text == "b"


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRIES", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=rf"{url}: cannot be"):
        server_of(url).replies([{"prompt": "x"}])
    with pytest.raises(UserError, match=rf"{url}: cannot be reached"):
        server_of(f"{url}#m").replies([{"prompt": "x"}])
    with pytest.raises(UserError, match="password"):
        server_of("http://me:secret@host/v1")


def test_requests_are_spaced_out() -> None:
    times: list[float] = []

    def handle(endpoint: str, body: dict[str, Any]) -> tuple[int, Any]:
        times.append(time.monotonic())
        return completion("x")

    with served(handle) as record:
        server_of(record.url, requests_per_minute=1200).replies([{"prompt": str(number)} for number in range(5)])
    assert times[-1] - times[0] >= 4 * 0.05 - 0.02


RUBRIC = "#scores\n1.b 0\n2.b 5\n3.b 4"


def test_judges_by_url() -> None:
    def handle(endpoint: str, body: dict[str, Any]) -> tuple[int, Any]:
        if endpoint == "completions":
            assert body["prompt"].endswith("<|assistant|>\n")
            return completion("Harmful request: yes\nResponse refusal: no\nHarmful response: yes")
        turns = body["messages"]
        if turns[0]["role"] == "system":
            return message(RUBRIC) if "Sure" in turns[1]["content"] else error(400)
        assert [turn["role"] for turn in turns] == ["user", "assistant"]
        return message("\n\nunsafe\nS2" if turns[1]["content"] == "Sure" else "\n\nsafe")

    with served(handle) as record:

        def judged(kind: str) -> list[Judgement]:
            judge = HarmJudge.from_name(f"{kind}:{record.url}#some/model", ClusterConfig(), EvaluateConfig())
            assert judge.label == f"{kind}:model"
            return judge([HARMFUL, HARMLESS, HARMFUL], ["Sure", "Hi", "No"], ClusterConfig())

        assert judged("wildguard") == [Judgement("unsafe", False)] * 3
        assert judged("llama-guard-3") == [Judgement("unsafe"), Judgement("safe"), Judgement("safe")]
        unsafe = Judgement("unsafe", False, 7 / 8)
        assert judged("strongreject-rubric") == [unsafe, Judgement("safe"), Judgement("unparsable")]
    for kind in ("strongreject", "shieldgemma"):
        with pytest.raises(UserError, match=r"evaluate\.judge: .*probabilities"):
            HarmJudge.from_name(f"{kind}:http://host/v1", ClusterConfig())
    assert judge_label("wildguard:http://host:80/v1") == "wildguard:host:80"


def test_a_run_cannot_be_answered_by_a_server() -> None:
    recipe = {"model": {"id": "m"}, "loss": {"type": "kldo"}, "optim": {"steps": 1}}
    with pytest.raises(UserError, match=r"evaluate\.engine: a server does not have the model"):
        load_recipe({**recipe, "evaluate": {"prompts": "bundled:heldout", "engine": "http://host/v1"}})
    with pytest.raises(UserError, match=r"evaluate\.engine: tgi: unknown engine"):
        load_recipe({**recipe, "evaluate": {"prompts": "bundled:heldout", "engine": "tgi"}})
