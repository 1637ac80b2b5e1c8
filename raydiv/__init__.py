"""LLM safety alignment as divergence estimation, on Ray: align language models, and show whether it worked.

Every command is a function here, imported when it is first used: ``raydiv.train(raydiv.load_recipe("recipe.yaml"))``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from raydiv.versions import __version__ as __version__

if TYPE_CHECKING:
    from raydiv.benchmarks.data import bench_data
    from raydiv.benchmarks.training import bench_training
    from raydiv.config import Recipe, load_recipe
    from raydiv.construction import build_data
    from raydiv.errors import UserError
    from raydiv.inspection import check_data
    from raydiv.launch import Result, train
    from raydiv.measure.evaluations import evaluate
    from raydiv.measure.separations import separation
    from raydiv.model.export import export
    from raydiv.planning.forecast import Plan, plan
    from raydiv.preparation import Prepared, prepare
    from raydiv.standing import status
    from raydiv.studies.study import StudyResult, study
    from raydiv.sweeps.sweep import SweepResult, sweep

_WHERE = {
    "Recipe": "raydiv.config",
    "load_recipe": "raydiv.config",
    "UserError": "raydiv.errors",
    "Plan": "raydiv.planning.forecast",
    "Prepared": "raydiv.preparation",
    "Result": "raydiv.launch",
    "plan": "raydiv.planning.forecast",
    "prepare": "raydiv.preparation",
    "build_data": "raydiv.construction",
    "check_data": "raydiv.inspection",
    "train": "raydiv.launch",
    "evaluate": "raydiv.measure.evaluations",
    "separation": "raydiv.measure.separations",
    "StudyResult": "raydiv.studies.study",
    "status": "raydiv.standing",
    "study": "raydiv.studies.study",
    "SweepResult": "raydiv.sweeps.sweep",
    "sweep": "raydiv.sweeps.sweep",
    "export": "raydiv.model.export",
    "bench_data": "raydiv.benchmarks.data",
    "bench_training": "raydiv.benchmarks.training",
}

__all__ = [
    "Plan",
    "Prepared",
    "Recipe",
    "Result",
    "StudyResult",
    "SweepResult",
    "UserError",
    "bench_data",
    "bench_training",
    "build_data",
    "check_data",
    "evaluate",
    "export",
    "load_recipe",
    "plan",
    "prepare",
    "separation",
    "status",
    "study",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'raydiv' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
