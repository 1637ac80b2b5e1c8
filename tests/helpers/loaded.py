"""What nearly every rank imports (see ranks.py)."""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

from transformers.models.llama import modeling_llama  # noqa: F401

import raydiv.training.worker  # noqa: F401
from raydiv.utils.compat import hide_module, peft_without_quantizer

with hide_module("mlflow"):
    import deepspeed  # noqa: F401
with peft_without_quantizer():
    import peft  # noqa: F401
