"""The baseline of ``prepare``: chat template, batched fast tokenizer and Parquet in a multiprocessing pool.

A script for a separate process, so that nothing of the package is loaded: FILE MODEL OUTPUT PROCESSES.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK_LINES = 1000
tokenizer: Any = None
folder = Path()


def load(model: str, output: str) -> None:
    """Initialise a process of the pool."""
    global tokenizer, folder
    from transformers import AutoTokenizer

    tokenizer, folder = AutoTokenizer.from_pretrained(model, trust_remote_code=False), Path(output)


def tokenize(chunk: tuple[int, list[str], int, int]) -> int:
    """Tokenize JSON lines of prompt, chosen, rejected into a Parquet file; returns the number of examples."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, lines, max_prompt_length, max_length = chunk
    rows = [json.loads(line) for line in lines]
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows for _ in range(2)]
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    templated = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompts = [ids[-max_prompt_length:] for ids in tokenizer(templated, add_special_tokens=False).input_ids]
    responses = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    responses = [ids[: max_length - len(prompt)] for prompt, ids in zip(prompts, responses, strict=True)]
    table = pa.table(
        {
            "prompt_ids": pa.array(prompts, pa.list_(pa.int32())),
            "response_ids": pa.array(responses, pa.list_(pa.int32())),
            "aligned": [True, False] * len(rows),
        }
    )
    pq.write_table(table, folder / f"{number:06}.parquet")
    return len(prompts)


def chunks(path: str, max_prompt_length: int, max_length: int) -> Iterator[tuple[int, list[str], int, int]]:
    """Chunks of CHUNK_LINES lines of the file."""
    with Path(path).open() as file:
        for number in range(sys.maxsize):
            lines = list(itertools.islice(file, CHUNK_LINES))
            if not lines:
                return
            yield number, lines, max_prompt_length, max_length


def main(path: str, model: str, output: str, processes: int, max_prompt_length: int, max_length: int) -> dict[str, Any]:
    """Tokenize the file; returns the number of ``examples`` and the ``seconds``."""
    started = time.perf_counter()
    Path(output).mkdir()
    with multiprocessing.Pool(processes, load, (model, output)) as pool:
        examples = sum(pool.imap(tokenize, chunks(path, max_prompt_length, max_length)))
    return {"examples": examples, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process, as in raydiv's pool
    source, model_directory, target, *sizes = sys.argv[1:]
    print(json.dumps(main(source, model_directory, target, *map(int, sizes))))
