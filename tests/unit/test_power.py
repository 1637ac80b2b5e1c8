"""The size of an evaluation, against simulated ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from raydiv.cli import main
from raydiv.commands.plan.power import CHANGED, detectable, labels_to_detect, prompts_to_detect


@pytest.mark.parametrize("difference", [0.05, 0.1, 0.15])
def test_so_many_prompts_show_the_difference_in_80_percent(difference: float) -> None:
    n, generator = prompts_to_detect(difference), np.random.default_rng(0)
    up, down = (CHANGED - difference) / 2, (CHANGED + difference) / 2
    found = 0
    for _ in range(600):
        gained, lost, _ = generator.multinomial(n, [up, down, 1 - CHANGED])
        found += binomtest(int(gained), int(gained + lost)).pvalue <= 0.05
    assert 0.74 <= found / 600 <= 0.86


@pytest.mark.parametrize("difference", [0.05, 0.1])
def test_so_many_labels_leave_the_difference_visible(difference: float) -> None:
    prompts = 2 * prompts_to_detect(difference)
    labels, generator = labels_to_detect(difference, prompts), np.random.default_rng(1)
    spread = np.sqrt((CHANGED - difference**2) / prompts + 2 * 0.1 * 0.9 / labels)
    found = generator.normal(difference, spread, 4000)
    assert (found > 1.96 * spread).mean() == pytest.approx(0.8, abs=0.03)


def test_detectable_differences_are_those_that_the_prompts_suffice_for() -> None:
    found = detectable(100)
    assert found is not None
    assert prompts_to_detect(found) <= 100 < prompts_to_detect(found - 0.01)
    assert detectable(0) is detectable(5) is None


def test_plan_says_the_size_of_an_evaluation(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"q{n}", "chosen": "a b", "rejected": "c"} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"id": str(tiny_model)},
                "data": {"train": str(data)},
                "loss": {"type": "dpo"},
                "optim": {"steps": 2},
                "evaluate": {"prompts": "bundled:heldout"},
            }
        )
    )
    assert main(["plan", str(recipe), "--detect", "0.05"]) == 0
    out = capsys.readouterr().out
    assert f"{prompts_to_detect(0.05):,} harmful prompts" in out
    assert "100 harmful prompts show a difference of 13 points" in out
    assert main(["plan", str(recipe), "--detect", "5"]) == 2
    assert "--detect" in capsys.readouterr().err
