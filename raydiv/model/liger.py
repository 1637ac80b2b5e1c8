"""Liger's Triton kernels for norms, rotary embeddings and gated MLPs of a model in training (raydiv[liger])."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from raydiv.utils.errors import UserError


def require_liger(model_type: str) -> None:
    """Raises UserError when liger-kernel is not installed, or has no kernels for models of this type."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "model.use_liger_kernel: needs liger-kernel; run: pip install 'liger-kernel>=0.8' (raydiv[liger])"
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise UserError(
            f"model.use_liger_kernel: liger-kernel has no kernels for a model of type {model_type}, only for {known}: "
            "set it to false"
        )


def apply_liger_kernels(model: Any) -> None:
    """Replace norms, rotary embeddings and gated MLPs of this instance; the head stays raydiv's.

    Liger also replaces the classes of transformers' module, which would change every model that the process loads
    later, such as the one that the export check reads. These are put back. The rotary embedding is a function of that
    module, and no attribute of the instance: it stays Liger's, for tensors on GPUs.

    Raises UserError as ``require_liger`` does, and for code of the model's directory.
    """
    from transformers.integrations.liger import apply_liger_kernel

    require_liger(model.config.model_type)
    module = sys.modules[type(model).__module__]
    if not module.__name__.startswith("transformers."):
        raise UserError(
            "model.use_liger_kernel: the model has code of its own (model.trust_remote_code): set it to false"
        )
    before = dict(vars(module))
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    for name, plain in before.items():
        kernel = getattr(module, name)
        if kernel is not plain:
            setattr(module, name, _on_gpus(kernel, plain) if isinstance(plain, FunctionType) else plain)


def _on_gpus(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` where its first argument is on a GPU, else ``plain``."""

    def by_device(q: Any, *arguments: Any, **options: Any) -> Any:
        return (kernel if q.is_cuda else plain)(q, *arguments, **options)

    return by_device
