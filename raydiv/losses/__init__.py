"""Objectives: pure functions of the global batch's log-probs (no collectives, no Ray, no torch at import).

Adding one is adding one function, in the file of its family, under ``@objective``: its keyword-only parameters become
the recipe's ``loss`` section, and the facts in the decorator feed validation and ``raydiv losses``.
"""

import importlib
import pkgutil

from raydiv.losses.objective import OBJECTIVES, Batch, Objective, Scope, State, Term, Value, named

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OBJECTIVES", "Batch", "Objective", "Scope", "State", "Term", "Value", "named"]
