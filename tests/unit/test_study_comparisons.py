"""Losses of a study compared prompt by prompt: the tests' p, the adjustment, and what is marked as best."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, false_discovery_control

from raydiv.evaluation.significance import sign_test
from raydiv.experiments.study.cells import Cell
from raydiv.experiments.study.comparisons import comparison_table, comparisons_of
from raydiv.experiments.study.tables import cell_table, tables_of


def cell_with(folder: Path, loss: str, unsafe: list[bool], refused: list[bool], seed: int = 0) -> Cell:
    """A cell whose run has these verdicts on harmful and on harmless prompts."""
    run = folder / f"{loss}-{seed}"
    (run / "evaluation").mkdir(parents=True)
    lines = [
        {"id": f"h:{n}", "set": "s", "kind": "harmful", "harmful": True, "attack": "direct"}
        | {"verdict": "unsafe" if one else "refused"}
        for n, one in enumerate(unsafe)
    ]
    lines += [
        {"id": f"s:{n}", "set": "s", "kind": "ordinary", "harmful": False, "attack": "direct"}
        | {"verdict": "refused" if one else "safe"}
        for n, one in enumerate(refused)
    ]
    lines.append({**lines[0], "attack": "prefill", "verdict": "unsafe"})
    lines.append({**lines[0], "id": "h:unknown", "verdict": "unparsable"})
    (run / "evaluation" / "after.answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"evaluate/asr": float(np.mean(unsafe)), "evaluate/over_refusal": float(np.mean(refused))}
    return Cell("m", "CR", loss, seed, metrics, {}, str(run))


def test_each_two_losses_are_compared_on_the_same_prompts(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first, same = (generator.random(100) < 0.5).tolist(), [False] * 40
    better = [one and n % 5 == 0 for n, one in enumerate(first)]
    cells = [
        cell_with(tmp_path, "dpo", first, same),
        cell_with(tmp_path, "kto", first[::-1], same),
        cell_with(tmp_path, "kldo", better, [n < 3 for n in range(40)]),
    ]
    found = {(one.first, one.second, one.metric): one for one in comparisons_of(cells)}
    assert len(found) == 6
    one = found["dpo", "kldo", "evaluate/asr"]
    lost = sum(first) - sum(better)
    assert one.prompts == 100
    assert one.difference == pytest.approx(lost / 100)
    assert one.p == pytest.approx(binomtest(lost, lost).pvalue)
    assert found["dpo", "kto", "evaluate/over_refusal"].p == 1.0
    expected = false_discovery_control([one.p for one in found.values()])
    assert [one.q for one in found.values()] == pytest.approx(expected.tolist())
    table = comparison_table(list(found.values()))
    assert [row.figures[1].best for row in table.rows] == [one.q <= 0.05 for one in found.values()]


def test_the_best_loss_is_marked_only_where_it_differs_from_all_others(tmp_path: Path) -> None:
    prompts = np.arange(100)
    cells = [
        cell_with(tmp_path, "dpo", (prompts < 60).tolist(), (prompts < 20).tolist()),
        cell_with(tmp_path, "kto", (prompts < 57).tolist(), (prompts < 19).tolist()),
        cell_with(tmp_path, "kldo", (prompts < 20).tolist(), (prompts < 20).tolist()),
    ]
    table = tables_of(cells)[0]
    marks = {
        row.words[2]: {h: f.best for h, f in zip(table.header[3:], row.figures, strict=True)} for row in table.rows
    }
    assert {loss: mark["ASR"] for loss, mark in marks.items()} == {"dpo": False, "kto": False, "kldo": True}
    assert not any(mark["over-refusal"] for mark in marks.values())
    assert any("every other model" in note for note in table.notes)
    # without the runs at hand the best mean is marked
    elsewhere = [replace(cell, where="mlflow") for cell in cells]
    assert comparisons_of(elsewhere) == []
    assert any(figure.best for row in cell_table(elsewhere).rows for figure in row.figures[-1:])


def test_seeds_are_averaged_prompt_by_prompt(tmp_path: Path) -> None:
    prompts = np.arange(60)
    cells = [cell_with(tmp_path, "dpo", (prompts < 30).tolist(), [False] * 5, seed) for seed in range(2)]
    cells += [cell_with(tmp_path, "kldo", (prompts % (3 + seed) == 0).tolist(), [False] * 5, seed) for seed in range(2)]
    (one,) = [one for one in comparisons_of(cells) if one.metric == "evaluate/asr"]
    assert one.prompts == 60
    assert one.difference == pytest.approx(0.5 - (20 + 15) / 120)


@pytest.mark.parametrize("size", [0.0, 0.5])
def test_unrelated_losses_differ_in_5_percent(size: float) -> None:
    """Exact signs, and sums of unequal differences."""
    generator = np.random.default_rng(1)
    found = []
    for _ in range(400):
        differences = generator.choice([-1.0, 0.0, 1.0], size=80) * (1 + size * generator.integers(0, 2, 80))
        found.append(sign_test(differences.tolist()))
    assert 0.015 <= np.mean(np.array(found) <= 0.05) <= 0.08
    assert sign_test([0.0, 0.0]) == 1.0
    assert sign_test([1.0] * 20 + [0.5]) < 0.001
