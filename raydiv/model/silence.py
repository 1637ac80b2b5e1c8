"""Silencing libraries' progress bars and advice."""

from __future__ import annotations

import logging
import os
import warnings

import torch
import transformers


def silence_libraries() -> None:
    """Silence transformers, peft, bitsandbytes and DeepSpeed in this process, errors excepted."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("DeepSpeed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not torch.accelerator.is_available():
        # without it DeepSpeed searches for an accelerator, and warns that there is none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
