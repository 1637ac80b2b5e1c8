"""Keeping libraries' bars and advice off the terminal."""

from __future__ import annotations

import logging
import os
import warnings

import torch
import transformers


def silence_libraries() -> None:
    """Silence progress bars and advice of transformers, peft, bitsandbytes and DeepSpeed in this process."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("DeepSpeed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not torch.accelerator.is_available():
        # said before DeepSpeed looks for one, and warns that there is none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
