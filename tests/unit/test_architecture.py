"""The rooms: who may import whom, and who may import ray, deepspeed, mlflow and transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.sources import imports, modules

ROOMS = [
    ["cli", "__main__", "__init__", "benchmarks"],
    ["sweeps", "studies", "submission"],
    ["together"],
    ["launch"],
    [
        "preparation",
        "preflight",
        "inspection",
        "standing",
        "waiting",
        "construction",
        "measure",
        "report",
        "planning.forecast",
        "planning.amounts",
    ],
    ["training.worker"],
    ["training.feed", "training.saving", "training.exported"],
    ["training.anchors", "training.step", "hidden", "evaluation"],
    ["reference"],
    ["data.sets"],
    ["training", "planning", "data.tokenize", "data.prompts", "data.overlap", "model.export"],
    ["data.index"],
    ["data.sources", "pool", "session", "resources", "engine", "checkpoint", "resuming"],
    ["model", "data", "track", "gauges", "progress", "run", "partitions"],
    ["dist", "lines", "termination", "beats"],
    ["config"],
    ["losses"],
    ["comparison"],
    ["bundled.w1"],
    ["cache"],
    ["storage"],
    ["errors", "bundled", "config.secrets", "config.tree", "versions"],
]
"""From the door to the foundations: a module imports its own room and what is below. Submodules may be named apart."""

LIBRARIES = {
    "ray": {
        "session",
        "resources",
        "gauges",
        "pool",
        "launch",
        "reference",
        "training.worker",
        "sweeps",
        "studies.jobs",
        "submission.jobs",
        "preflight",
        "benchmarks",
    },
    "deepspeed": {"engine", "partitions", "benchmarks.hello"},
    "mlflow": {"track"},
    "transformers": {
        "model",
        "engine",
        "evaluation.generate",
        "evaluation.toxicity",
        "planning.architecture",
        "benchmarks",
        "bundled.w1",
    },
    "peft": {"model", "planning.architecture"},
    "datasets": {"data.sources", "benchmarks.rival"},
    "trl": {"benchmarks.rival"},
    "lm_eval": {"evaluation.capability"},
    "matplotlib": {
        "report.drawing",
        "report.figures",
        "report.sweep_figures",
        "report.sweep_parallel",
        "report.study_figures",
    },
    "nanogcg": {"evaluation.gcg"},
    "optuna": {"sweeps"},
}


def room(module: str) -> int:
    named = [(name, level) for level, names in enumerate(ROOMS) for name in names]
    fitting = [(len(name), level) for name, level in named if module == name or module.startswith(f"{name}.")]
    assert fitting, f"raydiv.{module} has no room: name one in ROOMS"
    return max(fitting)[1]


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    known = modules()
    for name in imports(known[module]):
        inner = name.removeprefix("raydiv.")
        if name.startswith("raydiv.") and inner in known:
            assert room(module) <= room(inner), f"raydiv.{module} imports {name}, which is above it"


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    users = {
        module
        for module, path in modules().items()
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }
    allowed = LIBRARIES[library]
    strays = {m for m in users if m not in allowed and m.partition(".")[0] not in allowed}
    assert not strays, f"{library} is imported in {strays}"


def test_every_room_is_of_a_module_and_named_once() -> None:
    named = [name for names in ROOMS for name in names]
    packages = {module.rpartition(".")[0] for module in modules()}
    assert set(named) | {name for names in LIBRARIES.values() for name in names} <= modules().keys() | packages
    assert len(set(named)) == len(named)


def test_objectives_use_no_torch_at_run_time() -> None:
    for module, path in modules().items():
        if module.startswith("losses"):
            assert not any(name.split(".")[0] == "torch" for name in imports(path)), module


def test_comparison_is_of_numbers_alone() -> None:
    allowed = {"raydiv", "numpy", "scipy", *sys.stdlib_module_names}
    for module, path in modules().items():
        if module.startswith("comparison"):
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
    """No room has a command's name: importing it would put a module where the function is."""
    code = (
        "import raydiv, raydiv.commands.train, raydiv.evaluation.answers\n"
        "for _ in range(2):\n"
        "    for name in raydiv.__all__: assert callable(getattr(raydiv, name)), name"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
