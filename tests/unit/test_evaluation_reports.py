"""Reports of answers and of separation, and prompts that a run was trained on; without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.stored import stream_here
from raydiv.config import load_recipe, save_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.config.evaluate import AttackConfig
from raydiv.data.prompt_sets import Prompt
from raydiv.evaluation.answers_report import AnswersReport
from raydiv.evaluation.attacks import Attempt
from raydiv.evaluation.capability import Capability, CapabilityScore, TaskScores
from raydiv.evaluation.coherence import PerplexityThreshold
from raydiv.evaluation.contamination import count_contaminated
from raydiv.evaluation.drift import KlEstimate
from raydiv.evaluation.generate import GeneratedAnswer, Request
from raydiv.evaluation.judges.harm_judge import HarmJudge
from raydiv.evaluation.separation.embed import Readout
from raydiv.evaluation.separation.metrics import separation_metrics
from raydiv.evaluation.separation.moments import StreamedSeparation
from raydiv.evaluation.separation.report import LayerReport, SeparationReport
from raydiv.evaluation.summary import GradedAnswer
from raydiv.evaluation.win_rate import WinRate
from raydiv.runs.measurements import AnswersFile, MeasuredValue, SeparationFile
from raydiv.runs.metric_registry import spec_of
from raydiv.runs.progress import ProgressDisplay

HARMFUL = Prompt("PLANTED harm", True, "harmful", "f:1", "theft", "AdvBench")
HARMLESS = Prompt("PLANTED help", False, "ordinary", "f:2")


def answers(**more: Any) -> AnswersReport:
    graded = [GradedAnswer(HARMFUL, "direct", "refused", 0.1), GradedAnswer(HARMLESS, "direct", "safe", 0.3)]
    graded.append(GradedAnswer(HARMFUL, "prefill", "unsafe", 0.5))
    generated = [GeneratedAnswer(f"PLANTED answer {n}", [1], [2]) for n in range(3)]
    threshold = PerplexityThreshold(-5.0, -3.5, 0.5, 80)
    attempts = [Attempt(n, answer.attack, Request(f"asked {n}")) for n, answer in enumerate(graded)]
    judge, kl = HarmJudge("string", "errors"), more.pop("kl", None)
    return AnswersReport("m", [judge], attempts, graded, generated, -1.2, threshold, 40.0, kl, **more)


def test_metrics_file_and_table_of_answers_agree(tmp_path: Path) -> None:
    model, reference = [[-4.0, -6.0], [-12.0], [-9.0]], [[-5.0, -6.0], [-15.0], [-10.0]]
    kl = KlEstimate.from_logps([np.array(row) for row in model], [np.array(row) for row in reference])
    scores = TaskScores("gsm8k", [CapabilityScore("exact_match", "strict-match", 0.25, 0.05)], 75, 5, "3.0")
    full = answers(kl=kl, win_rate=WinRate(["win", "tie"], 2, 3), capability=Capability([scores], "0.4", None, False))
    written = full.as_json()
    assert kl.value == pytest.approx((1 + 3 + 1) / 3)
    assert kl.per_token == pytest.approx(5 / 4)
    assert kl.depth.half == full.values()["evaluate/depth/half"].value == 1
    assert written["kl"]["interval"] == pytest.approx(kl.interval)
    assert full.cells()["evaluate/asr/prefill"] == "100% (21%-100%)"
    assert full.cells()["evaluate/win_rate"].startswith("75%")
    assert full.cells()["capability/gsm8k/exact_match/strict-match"] == "0.250 (0.152-0.348)"
    metrics = full.metrics()
    assert metrics["evaluate/win_rate"] == written["win_rate"]["value"] == 0.75
    assert metrics["evaluate/kl"] == written["kl"]["value"]
    for name, rate in written["rates"].items():
        assert metrics[name] == rate["share"]
        assert name in full.cells()
    assert all("/" not in spec_of(name).label for name in full.cells())
    full.write(tmp_path / "out", "after", show_text=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "after.answers.jsonl").read_text().splitlines()]
    assert lines[2] == {**lines[0], "attack": "prefill", "verdict": "unsafe", "toxic": 0.5}
    assert [line["set"] for line in lines] == ["AdvBench", "", "AdvBench"]
    assert not any("PLANTED" in path.read_text() for path in (tmp_path / "out").iterdir())
    full.write(tmp_path / "out", "after", show_text=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "after.answers.jsonl").read_text().splitlines()]
    shown = {name: lines[2][name] for name in ("prompt", "asked", "answer")}
    assert shown == {"prompt": "PLANTED harm", "asked": "asked 2", "answer": "PLANTED answer 2"}
    outputs = json.loads((tmp_path / "out" / "after.outputs.json").read_text())
    assert outputs == [{"instruction": "PLANTED help", "output": "PLANTED answer 1", "generator": "m"}]


def test_parts_that_were_not_measured_are_left_out() -> None:
    plain = answers()
    assert plain.as_json()["kl"] is None
    assert plain.as_json().keys().isdisjoint({"win_rate", "capability"})
    assert plain.metrics().keys().isdisjoint({"evaluate/kl", "evaluate/win_rate"})


def test_files_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    scores = TaskScores("arc_easy", [CapabilityScore("acc", "none", 0.5, None)], 75, 5, "3.0")
    report = answers(win_rate=WinRate(["win", "tie"], 2, 3), capability=Capability([scores], "0.4", None, False))
    report.write(tmp_path, "after", show_text=False)
    read = AnswersFile.load(tmp_path / "after.json")
    assert read == AnswersFile(report.values(), ["errors"])
    assert read.values["evaluate/over_refusal"].of == 1
    assert read.values["evaluate/win_rate"].interval == report.win_rate.interval
    assert read.values["capability/arc_easy/acc"] == MeasuredValue(0.5, None, 75)
    separation = separated(1, streamed=False)
    (tmp_path / "before.json").write_text(separation.files("before")["before.json"])
    read = SeparationFile.load(tmp_path / "before.json")
    assert read.d_b == MeasuredValue(separation.separation.figures.d_b, separation.separation.d_b_interval)
    assert (read.kinds, read.harmful, read.notes) == (separation.kinds, separation.harmful, separation.notes())
    assert AnswersFile.load(tmp_path / "none.json") is SeparationFile.load(tmp_path / "none.json") is None


def test_several_judges_are_written_and_read(tmp_path: Path) -> None:
    verdicts = [("unsafe", "unsafe"), ("unsafe", "refused"), ("refused", "refused"), ("safe", "safe")]
    graded = [
        GradedAnswer(
            replace(HARMFUL, id=f"f:{n}"), "direct", a, other_verdicts={"other": b}, harm_scores={"other": 0.5}
        )
        for n, (a, b) in enumerate(verdicts)
    ]
    report = replace(answers(), judges=[HarmJudge("string", "errors"), HarmJudge("wildguard", "others")], graded=graded)
    report = replace(report, attempts=report.attempts * 2, answers=list(report.answers) * 2)
    report = replace(report, attempts=report.attempts[:4], answers=report.answers[:4])
    report.write(tmp_path, "after", show_text=False)
    read = AnswersFile.load(tmp_path / "after.json")
    assert read.notes == ["errors", "others"]
    assert read.values["evaluate/kappa/other"].value == pytest.approx(0.5)
    assert read.values["evaluate/kappa/other"].of == 4
    assert read.values["evaluate/asr_judge/other"].value == 0.25
    assert spec_of("evaluate/kappa/other").label == "agreement with the first judge (kappa): other"
    lines = [json.loads(line) for line in (tmp_path / "after.answers.jsonl").read_text().splitlines()]
    assert [line["other_verdicts"]["other"] for line in lines] == [b for _, b in verdicts]
    assert lines[0]["harm_scores"] == {"other": 0.5}


def test_an_unparsable_win_rate_is_shown() -> None:
    report = answers(win_rate=WinRate(["unparsable"], 0, 0))
    assert report.cells()["evaluate/win_rate"] == "unparsable"
    assert "evaluate/win_rate" not in report.metrics()


def test_kl_of_one_answer_has_no_interval() -> None:
    kl = KlEstimate.from_logps([np.array([-0.5, -0.5])], [np.array([-1.0, -1.0])])
    assert (kl.value, kl.interval, kl.per_token, kl.answers) == (1.0, None, 0.5, 1)


def separated(layers: int, streamed: bool, resampled: bool = True) -> SeparationReport:
    generator = np.random.default_rng(0)
    labels = np.arange(40) % 2 == 0
    states = generator.normal(size=(40, 5)) + labels[:, None]
    metrics = separation_metrics(states, labels, np.arange(40) // 4, resampled=resampled)
    streamed_metrics = StreamedSeparation(500, 500, 0.7, None, 3.0, 0.6) if streamed else None
    reports = [LayerReport(layer, metrics, streamed_metrics) for layer in range(layers)]
    readout = Readout(None if layers > 1 else (-1,))
    count = 1000 if streamed else 40
    return SeparationReport(
        "m", "p", count, 0, readout, reports, states[:, :2], ["k"] * 40, labels.tolist(), ["shared"]
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_table_of_separation_has_a_cell_for_every_column(streamed: bool) -> None:
    report = separated(1, streamed)
    header, rows = report.table()
    assert {len(row) for row in rows} == {len(header)}
    assert header[1] == ("sample of 40" if streamed else "all prompts")
    assert header[-1] == ("all 1000, streamed" if streamed else "labels shuffled")
    assert report.layer_table()[1] == []
    assert report.notes()[: 1 + streamed][-1] == "shared"
    assert ("1000" in report.notes()[0] and "40" in report.notes()[0]) == streamed
    assert report.as_json()["protocol"] == "paper"
    assert ("streamed" in report.as_json()) == streamed


@pytest.mark.parametrize("resampled", [False, True])
def test_table_of_layers(resampled: bool) -> None:
    report = separated(3, streamed=False, resampled=resampled)
    header, rows = report.layer_table()
    assert ("95%" in header) == resampled
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert {len(row) for row in rows} == {len(header)}
    assert [layer["layer"] for layer in report.as_json()["layers"]] == [0, 1, 2]
    assert report.as_json()["protocol"] == "other"


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's directory as far as its training data is asked for."""
    monkeypatch.setattr("raydiv.data.overlap.map_stream", stream_here)
    data = write_jsonl(
        {"prompt": "Bake bread at home", "response": "x", "aligned": True},
        {"prompt": "Which harbours of the northern coast freeze in winter?", "response": "x", "aligned": True},
    )
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = {
        "model": {"id": str(tiny_model)},
        "loss": {"type": "kldo"},
        "optim": {"steps": 1},
        "data": {"train": str(data)},
    }
    save_recipe(load_recipe(recipe), folder / "recipe.yaml")
    (folder / "model").symlink_to(tiny_model)
    return folder


PROMPTS = {
    "mine": [
        Prompt("bake BREAD, at home!", False, "ordinary", "p:1"),
        Prompt("Which harbours of the northern coast freeze in winter, and why", False, "ordinary", "p:2"),
        Prompt("Something else", True, "harmful", "p:3"),
    ]
}


def test_prompts_that_a_run_was_trained_on_are_counted(run: Path) -> None:
    [words] = count_contaminated(str(run), PROMPTS, ProgressDisplay(quiet=True))
    assert words.startswith("mine: 1 of 3 prompts ")
    assert " 1 more " in words
    assert count_contaminated(str(run), {"others": PROMPTS["mine"][2:]}, ProgressDisplay(quiet=True)) == []


def test_what_is_no_run_was_trained_on_nothing_known(tiny_model: Path) -> None:
    assert count_contaminated(str(tiny_model), PROMPTS, ProgressDisplay(quiet=True)) == []


def test_training_data_that_is_gone_is_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").unlink()
    [words] = count_contaminated(str(run), PROMPTS, ProgressDisplay(quiet=True))
    assert words.startswith("contamination was not measured: ")
    assert "data.jsonl" in words


def test_a_refusal_after_a_prefilled_opening_is_one() -> None:
    from raydiv.evaluation import answers as evaluations
    from raydiv.evaluation.attacks import attack_attempts, direct_attempts

    prefill = attack_attempts(AttackConfig.model_validate("prefill"), [HARMFUL], None, ClusterConfig())  # type: ignore[arg-type]
    attempts = [*direct_attempts([HARMFUL]), *prefill, *prefill]
    texts = ["I can't help with that.", "Sure, here is I can't help with that.", "Sure, here is how you do it: first"]
    log_probs = evaluations._LogProbs([-9.0] * 3, [9] * 3, PerplexityThreshold(-5.0, -3.5, 0.5, 80), 40.0, None)
    judges = evaluations.EvaluationJudges([HarmJudge.from_name("string", ClusterConfig())], None, None)
    answers = [GeneratedAnswer(text, [1], [2]) for text in texts]
    graded = evaluations._grade([HARMFUL], attempts, answers, log_probs, judges, ClusterConfig(), None)
    assert [answer.verdict for answer in graded] == ["refused", "refused", "unsafe"]
