"""Answers by vLLM: what ray.data.llm is given, and how its results are read; with a fake engine."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray.data

from helpers.models import make_model
from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import EvaluateConfig
from raydiv.evaluation import vllm_engine as module
from raydiv.evaluation.generate import Request, generate
from raydiv.evaluation.vllm_engine import Vllm
from raydiv.model.load import ModelSource
from raydiv.runtime.resources import Pool
from raydiv.utils.errors import UserError


@dataclass
class Rows:
    """In the place of a dataset."""

    rows: list[dict[str, Any]]

    def iter_rows(self) -> list[dict[str, Any]]:
        return self.rows


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A fake of ray.data.llm whose engine answers with the prompt reversed, in any order; notes what it is given."""
    given: dict[str, Any] = {"rows": [], "fails": set()}
    llm = ModuleType("ray.data.llm")

    def config(**options: Any) -> dict[str, Any]:
        given["config"] = options
        return options

    def build(config: dict[str, Any], postprocess: Any) -> Any:
        def process(data: Rows) -> Rows:
            results = []
            for row in data.rows:
                given["rows"].append(row)
                failed = row["row"] in given["fails"]
                tokens = [] if failed else row["tokenized_prompt"][::-1]
                error = "ValueError: too long" if failed else ""
                results.append(postprocess({**row, "generated_tokens": tokens, "__inference_error__": error}))
            random.Random(0).shuffle(results)
            return Rows(results)

        return process

    llm.vLLMEngineProcessorConfig, llm.build_processor = config, build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray.data.llm", llm)
    monkeypatch.setattr(ray.data, "from_items", Rows)
    return given


def pool(monkeypatch: pytest.MonkeyPatch, actors: int, gpus: float = 0) -> None:
    monkeypatch.setattr(module, "pool_resources", lambda cluster, model: Pool(actors, actors, 2.0, gpus, {}, {}))


def test_rows_come_back_in_order_and_a_failed_one_is_no_answer(
    engine: dict[str, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool(monkeypatch, 1)
    source = ModelSource(tiny_model)
    end = source.chat().end_of_turn.id
    engine["fails"] = {1}
    requests = [Request("Hello?"), Request("How?"), Request("Why?", seed=7)]
    answers = generate(source, requests, 9, ClusterConfig(), engine=Vllm())
    assert [answer.error for answer in answers] == [None, "ValueError: too long", None]
    assert [answer.ids for answer in answers if not answer.error] == [answers[n].prompt_ids[::-1] for n in (0, 2)]
    greedy, sampled = (engine["rows"][number]["sampling_params"] for number in (0, 2))
    assert (greedy["temperature"], greedy["seed"], greedy["max_tokens"]) == (0, 0, 9)
    assert (sampled["temperature"], sampled["top_p"], sampled["seed"]) == (1, 1, 7)
    assert end in greedy["stop_token_ids"]
    config = engine["config"]
    assert config["should_continue_on_error"] is True
    assert config["model_source"] == str(tiny_model)
    assert not any(config[f"{stage}_stage"] for stage in ("chat_template", "tokenize", "detokenize"))
    assert config["placement_group_config"] == {"bundle_per_worker": {"CPU": 2.0}}


def test_engines_share_the_gpus(engine: dict[str, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool(monkeypatch, 8, gpus=1)
    rows = [{"ids": [1, 2], "seed": None}] * 1000
    completions = Vllm(tensor_parallel=2).complete(ModelSource(tiny_model), rows, 3, [2], ClusterConfig())
    assert completions == [[2, 1]] * 1000
    config = engine["config"]
    assert (config["concurrency"], config["engine_kwargs"]["tensor_parallel_size"]) == (4, 2)
    assert config["placement_group_config"]["bundle_per_worker"]["GPU"] == 1


def test_an_adapter_is_applied_to_its_base(
    engine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool(monkeypatch, 1)
    base, adapter = make_model(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 20}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    Vllm().complete(ModelSource(adapter), [{"ids": [1]}], 3, [2], ClusterConfig())
    assert engine["config"]["model_source"] == str(base)
    assert engine["config"]["engine_kwargs"]["max_lora_rank"] == 32
    assert engine["rows"][0]["model"] == str(adapter)


def test_vllm_is_asked_for_before_anything_starts() -> None:
    with pytest.raises(UserError, match=r"evaluate\.engine: vllm is not installed.*raydiv\[vllm\]"):
        module.require_vllm()
    with pytest.raises(ValueError, match="tensor_parallel needs engine: vllm"):
        EvaluateConfig(tensor_parallel=2)
    assert EvaluateConfig(engine="vllm", tensor_parallel=2).tensor_parallel == 2
