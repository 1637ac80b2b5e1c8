"""The twelve packages: which may import which, and which modules may import ray, deepspeed, mlflow and transformers."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from helpers.sources import PACKAGE, imports, modules

PACKAGES = [
    "cli",
    "experiments",
    "commands",
    "training",
    "evaluation",
    "data",
    "model",
    "runs",
    "runtime",
    "config",
    "losses",
    "utils",
]
"""From the command line to the foundations: a package imports itself and those below it."""

LIBRARIES = {
    "ray": {
        "runtime",
        "runs.prometheus",
        "data.reference_scorer",
        "evaluation.vllm_engine",
        "commands.train",
        "commands.preflight",
        "commands.bench",
        "training.worker",
        "experiments",
        "utils.compat",
    },
    "deepspeed": {"training.engine", "training.zero_state", "utils.compat", "commands.bench.ray_baseline"},
    "mlflow": {"runs.tracker"},
    "transformers": {
        "model",
        "training.engine",
        "evaluation.generate",
        "evaluation.toxicity",
        "commands.plan.architecture",
        "commands.bench",
    },
    "peft": {"model", "utils.compat", "commands.plan.architecture"},
    "datasets": {"data.sources", "commands.bench.trl_baseline"},
    "trl": {"commands.bench.trl_baseline"},
    "lm_eval": {"evaluation.capability"},
    "matplotlib": {
        "runs.report.drawing",
        "runs.report.figures",
        "experiments.sweep.figures",
        "experiments.sweep.parallel_coordinates",
        "experiments.study.figures",
    },
    "nanogcg": {"evaluation.gcg", "utils.compat"},
    "openai": {"evaluation.server"},
    "optuna": {"experiments.sweep"},
}


def level(module: str) -> int:
    """Position of a module's package in PACKAGES; the root's own modules stand above all of them."""
    package = module.partition(".")[0]
    return -1 if package in ("__init__", "__main__") else PACKAGES.index(package)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    known = modules()
    for name in imports(known[module]):
        inner = name.removeprefix("raydiv.")
        if name.startswith("raydiv.") and inner in known:
            assert level(module) <= level(inner), f"raydiv.{module} imports {name}, which is above it"


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_stay_in_their_modules(library: str) -> None:
    users = {
        module
        for module, path in modules().items()
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }
    allowed = tuple(f"{name}." for name in LIBRARIES[library])
    strays = {module for module in users if not f"{module}.".startswith(allowed)}
    assert not strays, f"{library} is imported in {strays}"


def test_packages_are_these_twelve_and_each_says_its_idea() -> None:
    assert sorted(PACKAGES) == sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
    for name in PACKAGES:
        assert ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())), f"raydiv.{name}"


def test_modules_allowed_a_library_exist() -> None:
    assert {name for names in LIBRARIES.values() for name in names} <= modules().keys()


def test_objectives_use_no_torch_at_run_time() -> None:
    for module, path in modules().items():
        if module.startswith("losses"):
            assert not any(name.split(".")[0] == "torch" for name in imports(path)), module


NUMBERS_ALONE = {"cells", "measures", "tables", "regression", "table_io"}
"""Modules of a study that compute its tables from numbers, without Ray, files of runs or pictures."""


def test_study_tables_are_of_numbers_alone() -> None:
    allowed = {"raydiv", "numpy", "pandas", "scipy", "statsmodels", *sys.stdlib_module_names}
    for module, path in modules().items():
        if module.startswith("experiments.study.") and module.rpartition(".")[2] in NUMBERS_ALONE:
            assert {name.split(".")[0] for name in imports(path)} <= allowed, module


@pytest.mark.parametrize("command", [["--help"], ["schema"], ["losses"]])
def test_light_commands_load_neither_torch_nor_ray(command: list[str]) -> None:
    code = (
        "import sys, contextlib\nfrom raydiv.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({command!r})\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'mlflow', 'pandas', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_is_a_function_of_the_package() -> None:
    """Importing a module of the package never replaces a function of the same name."""
    code = (
        "import raydiv, raydiv.commands.train, raydiv.commands.evaluate\n"
        "for _ in range(2):\n"
        "    for name in raydiv.__all__: assert callable(getattr(raydiv, name)), name"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
