"""An export is read by transformers 4.57, which vLLM and other servers use: the same log-probs, and the same stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.models import make_model
from helpers.policies import write_run
from raydiv.commands.export import export
from raydiv.config import load_recipe
from raydiv.model.load import ModelSource

pytestmark = [pytest.mark.slow, pytest.mark.long]

OLDER = ("transformers==4.57.6", "tokenizers==0.22.1", "huggingface_hub==0.36.0")

TALK = [{"role": "user", "content": "How do I prune a lemon tree?"}]

READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, talk = sys.argv[1], json.loads(sys.argv[2])
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=False)
with torch.inference_mode():
    logps = model(ids).logits.float().log_softmax(-1)[0, -1].tolist()
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
print(json.dumps({"version": transformers.__version__, "ids": ids[0].tolist(), "logps": logps, "answer": answer,
                  "stops": model.generation_config.eos_token_id, "dtype": str(model.dtype)}))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the older packages, to be put before those of this environment."""
    folder = tmp_path_factory.mktemp("older")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OLDER]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip cannot install {OLDER[0]} here: {installed.stderr[-200:]}")
    return folder


@pytest.mark.parametrize("lora", [True, False])
def test_an_older_transformers_reads_the_export(lora: bool, older: Path, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0  # not the default, which an older version would take
    (base / "config.json").write_text(json.dumps(config))
    model = {"id": str(base), **({"lora": {"r": 3}} if lora else {})}
    data = {"end_of_turn": "<|user|>"}
    recipe = load_recipe({"model": model, "loss": {"type": "dpo"}, "optim": {"steps": 1}, "data": data})
    run = write_run(base, recipe, tmp_path / "run")
    exported = export(run.path, tmp_path / "exported", dtype="bf16")

    environment = {**os.environ, "PYTHONPATH": str(older)}
    command = [sys.executable, "-c", READ, str(exported), json.dumps(TALK)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    assert read["version"] == "4.57.6"
    assert read["dtype"] == "torch.bfloat16"

    source = ModelSource(exported, recipe.data.of_chat(), precision="bf16")
    chat, here = source.chat(), source.load().eval()
    assert read["ids"] == chat.prompt_ids(TALK)
    with torch.inference_mode():
        logps = here(torch.tensor([read["ids"]])).logits.float().log_softmax(-1)[0, -1]
    torch.testing.assert_close(torch.tensor(read["logps"]), logps, rtol=0, atol=1e-5)
    assert chat.end_of_turn.id in read["stops"]
