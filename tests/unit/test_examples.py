"""``raydiv examples``: the shipped recipes, listed and copied, from a checkout and from an installed package."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from helpers.sources import ROOT
from raydiv.cli import main
from raydiv.commands import examples as command
from raydiv.commands.examples import copy_example, examples
from raydiv.config import load_recipe
from raydiv.utils.errors import UserError

CONFIGS = ROOT / "configs"
NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))


def test_every_shipped_recipe_is_listed_with_its_command_and_description(capfd: pytest.CaptureFixture[str]) -> None:
    assert sorted(example.name for example in examples()) == NAMES
    for example in examples():
        assert example.command in ("train", "study", "sweep", "bench"), example
        assert example.description.endswith((".", "on any")), example
    assert main(["examples", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)["examples"]
    assert {"name": "quickstart", "command": "train"}.items() <= next(
        e for e in listed if e["name"] == "quickstart"
    ).items()
    assert main(["examples"]) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == [example["name"] for example in listed]


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_recipe_is_the_shipped_one_and_loads_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["examples", name]) == 0
    first, *_ = copied = capfd.readouterr().out.splitlines()
    assert first == f"{Path(name).name}.yaml"
    assert sorted(copied) == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert Path(first).read_text() == (CONFIGS / f"{name}.yaml").read_text()
    assert load_recipe(first) == load_recipe(CONFIGS / f"{name}.yaml")


def test_a_parent_recipe_is_copied_beside_the_recipe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert main(["examples", "papers/kldo-study", str(folder), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"files": [str(folder / "kldo-study.yaml"), str(folder / "kldo.yaml")]}
    target = folder / "mine.yaml"
    assert copy_example("papers/kldo-study", target) == [target, folder / "kldo.yaml"]  # kldo.yaml has the same content


@pytest.mark.parametrize("destination", [[], ["."], ["falcon-11b-lora.yaml"]])
@pytest.mark.parametrize("existing", ["falcon-11b-lora.yaml", "falcon-11b-full.yaml"])
def test_nothing_is_overwritten(
    existing: str,
    destination: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(existing).write_text("mine")
    assert main(["examples", "falcon-11b-lora", *destination]) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith(f"raydiv: {existing}: exists already")
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert Path(existing).read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("quikstart", "did you mean quickstart?"),
        ("papers/kldoo", "did you mean papers/kldo?"),
        ("zz", "known: bench/w1"),
    ],
)
def test_an_unknown_name_gets_the_nearest_as_a_hint(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["examples", name]) == 2
    assert f"{name}: no such example ({hint}" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_installed_package_has_its_own_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has configs/ as raydiv/configs; a folder beside the package is ignored."""
    package = tmp_path / "site-packages" / "raydiv"
    shutil.copytree(CONFIGS, package / "configs")
    (package.parent / "configs").mkdir()
    (package.parent / "configs" / "quickstart.yaml").write_text("another: package's")
    monkeypatch.setattr(command, "PACKAGE", package)
    assert sorted(example.name for example in examples()) == NAMES
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"configs": "raydiv/configs"}


def test_a_package_without_recipes_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PACKAGE", tmp_path / "raydiv")
    with pytest.raises(UserError, match="no recipes"):
        examples()
