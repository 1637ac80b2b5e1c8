"""LLM safety alignment as divergence estimation, on Ray: align language models and measure whether it worked.

Each command is a function of the package, imported at first use: ``raydiv.train(raydiv.load_recipe("recipe.yaml"))``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from raydiv.utils.versions import __version__ as __version__

if TYPE_CHECKING:
    from raydiv.commands.bench.data import bench_data
    from raydiv.commands.bench.training import bench_training
    from raydiv.commands.data_build import build_data
    from raydiv.commands.data_check import check_data
    from raydiv.commands.env import env
    from raydiv.commands.evaluate import evaluate
    from raydiv.commands.examples import copy_example, examples
    from raydiv.commands.export import export
    from raydiv.commands.losses import describe_losses
    from raydiv.commands.plan.forecast import Forecast, plan
    from raydiv.commands.prepare import PreparedData, prepare
    from raydiv.commands.quickstart import quickstart
    from raydiv.commands.schema import schema
    from raydiv.commands.separation import separation
    from raydiv.commands.status import status
    from raydiv.commands.submit import Submission, submit
    from raydiv.commands.train import Result, train
    from raydiv.config import Recipe, load_recipe
    from raydiv.experiments.study.study import StudyResult, study
    from raydiv.experiments.sweep.sweep import SweepResult, sweep
    from raydiv.utils.errors import UserError

_MODULES = {
    "Recipe": "raydiv.config",
    "load_recipe": "raydiv.config",
    "UserError": "raydiv.utils.errors",
    "Forecast": "raydiv.commands.plan.forecast",
    "PreparedData": "raydiv.commands.prepare",
    "Result": "raydiv.commands.train",
    "plan": "raydiv.commands.plan.forecast",
    "prepare": "raydiv.commands.prepare",
    "build_data": "raydiv.commands.data_build",
    "check_data": "raydiv.commands.data_check",
    "train": "raydiv.commands.train",
    "evaluate": "raydiv.commands.evaluate",
    "separation": "raydiv.commands.separation",
    "StudyResult": "raydiv.experiments.study.study",
    "status": "raydiv.commands.status",
    "study": "raydiv.experiments.study.study",
    "SweepResult": "raydiv.experiments.sweep.sweep",
    "sweep": "raydiv.experiments.sweep.sweep",
    "export": "raydiv.commands.export",
    "quickstart": "raydiv.commands.quickstart",
    "Submission": "raydiv.commands.submit",
    "submit": "raydiv.commands.submit",
    "describe_losses": "raydiv.commands.losses",
    "schema": "raydiv.commands.schema",
    "env": "raydiv.commands.env",
    "examples": "raydiv.commands.examples",
    "copy_example": "raydiv.commands.examples",
    "bench_data": "raydiv.commands.bench.data",
    "bench_training": "raydiv.commands.bench.training",
}

__all__ = [
    "Forecast",
    "PreparedData",
    "Recipe",
    "Result",
    "StudyResult",
    "Submission",
    "SweepResult",
    "UserError",
    "bench_data",
    "bench_training",
    "build_data",
    "check_data",
    "copy_example",
    "describe_losses",
    "env",
    "evaluate",
    "examples",
    "export",
    "load_recipe",
    "plan",
    "prepare",
    "quickstart",
    "schema",
    "separation",
    "status",
    "study",
    "submit",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'raydiv' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
