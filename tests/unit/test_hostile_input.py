"""Recipes, templates and models that would hang, crash or overflow: exit status 2 and one line within seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.made_run import make_run
from helpers.made_sweep import make_sweep
from helpers.models import make_model
from helpers.mutations import mutated, mutated_bytes
from helpers.outcomes import bounded, refusal
from helpers.sources import ROOT
from helpers.templates import CHATML, FALCON, GEMMA, LLAMA_3, MISTRAL, QWEN_3
from raydiv.cli import main
from raydiv.config import load_recipe
from raydiv.config.load import load_tree
from raydiv.experiments.study.study import StudyDirectory
from raydiv.experiments.sweep.record import SweepDirectory, SweepRecord
from raydiv.runs.directory import RunDirectory
from raydiv.runs.report.page import page, write_report
from raydiv.runs.stage import RunStage
from raydiv.training.checkpoint.manifest import Manifest
from raydiv.training.checkpoint.shards import CheckpointShard

LIMIT_S = 40
"""Seconds before the test gives up: four times what a case may take."""


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with status 2 and one line, which is returned."""

    def run(*words: str) -> str:
        capsys.readouterr()  # of libraries that made a model
        with bounded(words, LIMIT_S):
            assert main(list(words)) == 2
        message = capsys.readouterr().err
        assert message.startswith("raydiv: ")
        assert message.count("\n") == 1, message
        return message

    return run


BASE = "model: {id: m}\nloss: {type: dpo}\noptim: {steps: 1}\n"

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(f'*{before}' for _ in range(10))}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)

RECIPES = {
    "aliases that expand to ten billion values": (BOMB, "100,000 values"),
    "an alias that contains itself": ("model: &m {id: m, lora: *m}\n", "contains itself"),
    "merge of itself": ("model: &m\n  <<: *m\n", "contains itself"),
    "nesting": ("model: " + "[" * 2000 + "]" * 2000, "50 levels"),
    "NUL": ("name: a\0b\n", "not YAML"),
    "bytes": ("name: \x80\x81", "recipe.yaml"),
    "number of 10,000 digits": (BASE + f"seed: {'9' * 10_000}\n", "recipe.yaml"),
    "date that is none": (BASE + "name: 2026-13-45\n", "recipe.yaml"),
    "length": (BASE + "batch: {max_length: 1.0e+22}\n", "max_length"),
    "seed": (BASE + "seed: 99999999999999999999999999\n", "seed: too large"),
    "regular expression": ("model: {id: m, lora: {target_modules: '('}}\nloss: {type: dpo}\noptim: {steps: 1}\n",
                           "target_modules: not a regular expression"),
    "deepspeed": (BASE + "engine: {deepspeed: {zero_optimization: 3}}\n", "zero_optimization: must be a mapping"),
    "parent with NUL": ('extends: "a\\0b"\n', "null byte"),
    "parent that is a device": ("extends: /dev/zero\n", "not a file"),
    "parent with a long name": (f"extends: {'x' * 5000}\n", "xxx"),
    "template with a long name": (BASE + f"data: {{template: {'x' * 5000}}}\n", "template"),
    "large": ("# " + "x" * 2**20 + "\n" + BASE, "more than 1,048,576"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused(name: str, tmp_path: Path, refuse: Callable[..., str]) -> None:
    text, reason = RECIPES[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="latin-1")
    assert reason in refuse("plan", str(path))


def test_a_long_chain_of_recipes_is_refused(tmp_path: Path, refuse: Callable[..., str]) -> None:
    for number in range(1100):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    (tmp_path / "1100.yaml").write_text(BASE)
    assert "extends more than 20 recipes" in refuse("plan", str(tmp_path / "0.yaml"))


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/dev/null/x"])
def test_what_is_no_file_is_no_recipe(path: str, refuse: Callable[..., str]) -> None:
    assert path in refuse("plan", path)


@pytest.mark.parametrize("override", ["seed=" + "[" * 2000, "seed=&a [*a]", "name={a: &a [*a]}", "optim.lr=\0"])
def test_a_hostile_override_is_refused(override: str, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "recipe.yaml").write_text(BASE)
    refuse("plan", str(tmp_path / "recipe.yaml"), override)


def with_template(model: Path, template: str) -> list[str]:
    """A recipe of a model whose tokenizer has the template."""
    (model / "chat_template.jinja").write_text(template)
    path = model / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content.pop("chat_template", None)
    path.write_text(json.dumps(content))
    recipe = model.parent / "recipe.yaml"
    recipe.write_text(BASE.replace("id: m", f"id: {model}") + "data: {train: 'bundled:preference'}\n")
    return ["plan", str(recipe)]


TEMPLATES = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
              "{% endfor %}{% endfor %}", "more than 5 s"),
    "doubles a string": ("{% set ns = namespace(s='a' * 1000) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}"
                         "{% endfor %}{{ ns.s }}", "more than 1024 MiB"),
    "does not parse": ("{% for %}", "template"),
    "raises": ("{{ raise_exception('no') }}", "no"),
    "reaches for the system": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "template"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_named(name: str, tmp_path: Path, refuse: Callable[..., str]) -> None:
    template, reason = TEMPLATES[name]
    assert reason in refuse(*with_template(make_model(tmp_path / "model"), template))


def render_mutations(seeds: range, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(folder / "model")
    for seed in seeds:
        template = PUBLISHED[seed % len(PUBLISHED)].encode()
        mutation = mutated_bytes(template, seed).decode(errors="replace")
        capsys.readouterr()
        with bounded(f"seed {seed}", LIMIT_S):
            status = main(with_template(model, mutation))
        message = capsys.readouterr().err
        assert status in (0, 2), f"seed {seed}: {message}"
        assert message.count("raydiv: ") == (status == 2), f"seed {seed}: {message}"


PUBLISHED = (CHATML, LLAMA_3, QWEN_3, GEMMA, MISTRAL, FALCON)


def test_mutated_templates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render_mutations(range(12), tmp_path, capsys)


@pytest.mark.long
def test_many_mutated_templates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render_mutations(range(12, 200), tmp_path, capsys)


NONSENSE = [b"", b"{", b"[]", b"null", b'"x"', b"{}", b"\xff\xfe\x00", b"[" * 3000, b'{"model_type": 3}', b"0" * 20]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_model_of_nonsense_is_named(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    recipe, original = tmp_path / "recipe.yaml", (model / file).read_bytes()
    recipe.write_text(BASE.replace("id: m", f"id: {model}") + "data: {train: 'bundled:preference'}\n")
    for content in [*NONSENSE, *(mutated_bytes(original, seed) for seed in range(20))]:
        (model / file).write_bytes(content)
        with bounded(content, LIMIT_S):
            status = main(["plan", str(recipe)])
        message = capsys.readouterr().err
        assert status in (0, 2), (content[:200], message)
        assert message.count("raydiv: ") == (status == 2), (content[:200], message)
        if status == 2:
            assert "model" in message or "template" in message, message


RECIPE_FILES = ("llama-3-8b-lora.yaml", "llama-3-8b-full.yaml", "falcon-11b-lora.yaml")


def plan_mutations(seeds: range, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees = [load_tree(ROOT / "configs" / name) for name in RECIPE_FILES]
    path, slowest = folder / "recipe.yaml", 0.0
    for seed in seeds:
        try:
            path.write_text(yaml.dump(mutated(trees[seed % len(trees)], seed), allow_unicode=True))
        except UnicodeEncodeError:
            continue
        started = time.monotonic()
        with bounded(f"seed {seed}", LIMIT_S):
            status = main(["plan", str(path)])
        slowest = max(slowest, time.monotonic() - started)
        printed = capsys.readouterr()
        is_forecast = status == 0 or "does not fit" in printed.out
        assert status in (0, 2), f"seed {seed}: {printed.err}"
        assert printed.err.count("raydiv: ") == (not is_forecast), f"seed {seed}: {printed.err}"
    print(f"{len(seeds)} recipes, the slowest in {slowest:.1f} s")


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that does not answer would be asked for seconds."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("_offline")
def test_mutated_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_mutations(range(20), tmp_path, capsys)


@pytest.mark.long
@pytest.mark.usefixtures("_offline")
def test_many_mutated_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_mutations(range(20, 300), tmp_path, capsys)


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("a\nb"), RecursionError(), MemoryError()])
@pytest.mark.parametrize("phase", ["raydiv.commands.plan.forecast.measure_data", "raydiv.cli.runs.print_report"])
def test_an_unexpected_error_is_one_line_and_a_file(
    error: Exception, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(phase, fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["plan", str(ROOT / "configs" / "llama-3-8b-full.yaml")]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith(f"raydiv: the run failed: {type(error).__name__}")
    (log,) = tmp_path.glob("raydiv-*.log")
    assert str(log) in message
    assert log.stat().st_mode & 0o077 == 0
    assert phase.rpartition(".")[0] not in message
    assert "Traceback" in log.read_text()


def test_damaged_files_of_a_run_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    run.stage.write(RunStage("a" * 32, {"data": "d", "model": "m"}))
    for seed in range(200):
        path = (run.path / "stage.json", run.metrics.path, run.result, run.recipe)[seed % 4]
        original = path.read_bytes()
        path.write_bytes(mutated_bytes(original, seed))
        with bounded(f"seed {seed}", LIMIT_S):
            status = main(["status", str(run.path)])
        path.write_bytes(original)
        message = capsys.readouterr().err
        assert status in (0, 2), f"{path.name}, seed {seed}: {message}"
        assert message.count("raydiv: ") == (status == 2), f"{path.name}, seed {seed}: {message}"
    with run.metrics.path.open("a") as lines:
        lines.write('{"step": 7')  # a line that is being written
    assert main(["status", str(run.path)]) == 0


def report_mutations(seeds: range, folder: Path, write: Callable[[RunDirectory], Any]) -> None:
    """Damage the files of a finished run in turn, or leave one out, as in a partial copy; ``write`` its report."""
    run = make_run(folder)
    files = sorted(path for path in run.path.rglob("*") if path.is_file())
    write(run)
    for seed in seeds:
        path = files[seed % len(files)]
        original = path.read_bytes()
        write_mutation(path, original, seed)
        message = refusal(lambda: write(run))
        path.write_bytes(original)
        if message is not None:
            assert "\n" not in message, f"{path.name}, seed {seed}: {message}"
            assert str(run.path) in message, f"{path.name}, seed {seed}: {message}"


def write_mutation(path: Path, original: bytes, seed: int) -> None:
    """No file, a file with other bytes, or one with another JSON value."""
    if seed % 5 == 0:
        path.unlink()
    elif seed % 3 == 0 and path.suffix == ".json":
        path.write_text(json.dumps(mutated(json.loads(original), seed)))
    else:
        path.write_bytes(mutated_bytes(original, seed))


NO_PICTURES: dict[str, list[Any]] = {"training": [], "separation": [], "rewards": []}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_report_of_damaged_files_names_one(tmp_path: Path) -> None:
    report_mutations(range(200), tmp_path, lambda run: page(run, NO_PICTURES))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_reports_of_many_damaged_files_name_one(tmp_path: Path) -> None:
    report_mutations(range(100, 120), tmp_path, write_report)


def test_damaged_records_of_sweeps_and_studies_are_named(tmp_path: Path) -> None:
    space = {"sweep": {"space": {"optim.lr": [0.1, 0.2]}, "search": "grid", "goal": "maximize eval/reward/margin"}}
    recipe = load_recipe(yaml.safe_load(BASE) | {"data": {"train": "bundled:preference"}} | space)
    sweep, study = SweepDirectory(tmp_path / "sweep"), StudyDirectory(tmp_path / "study")
    sweep.create(recipe)
    make_sweep(3, directory=sweep).write()
    study.create(recipe, resume=False)
    study.write({"mlflow": {"uri": "file:mlruns", "run_id": "0a1b2c"}, "cells": [{"model": "m"}]})
    for directory, read in (
        (sweep, lambda: SweepRecord.read(sweep, recipe)),
        (study, lambda: study.create(recipe, resume=True)),
    ):
        original = directory.record.read_bytes()
        refused = 0
        for seed in range(200):
            write_mutation(directory.record, original, seed)
            message = refusal(read) if directory.record.exists() else None
            directory.record.write_bytes(original)
            assert message is None or str(directory.record) in message, f"seed {seed}: {message}"
            refused += message is not None
        assert refused > 20
        read()


def test_a_damaged_manifest_is_found() -> None:
    shard = CheckpointShard("rank-00000.safetensors", 5, "a" * 64, {"w": (0, 5)})
    manifest = Manifest(3, 3, 1, {"states": [], "logged": 0}, {"run": "x"}, None, [shard])
    for seed in range(500):
        try:
            read = Manifest.from_bytes(mutated_bytes(manifest.as_bytes(), seed))
        except ValueError as error:
            read = None
            message = str(error)
        # a change of the space between two keys is no damage
        assert read == manifest or (read is None and "damaged" in message), f"seed {seed}"
