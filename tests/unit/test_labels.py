"""Rates corrected by labels: their coverage in simulations, what is drawn and kept, and the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from raydiv.cli import main
from raydiv.commands.label import CHOICES, Labelling, label_in_terminal, printable
from raydiv.evaluation.intervals import wilson_interval
from raydiv.evaluation.labels import estimate
from raydiv.evaluation.labels.answers import JudgedAnswer, drawn, read_answers, sample_sizes, stratified
from raydiv.evaluation.labels.calibrate import _metric, _position, calibrate
from raydiv.evaluation.labels.estimate import (
    LabelledShare,
    VerdictShares,
    calibrated_difference,
    calibrated_rate,
)
from raydiv.evaluation.labels.store import LABELS, UNCLEAR, read_labels
from raydiv.evaluation.significance import mcnemar
from raydiv.runs.measurements import AnswersFile
from raydiv.runs.metric_registry import spec_of
from raydiv.utils.errors import UserError

POSITIVE = "unsafe"


@pytest.fixture
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "DRAWS", 800)


class Simulation:
    """``attempts`` answers to each of ``n`` prompts, a judge that errs, and labels of a sample."""

    def __init__(self, n: int, attempts: int, rate: float, errors: tuple[float, float], seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        chances = np.full(n, rate) if attempts == 1 else self.generator.beta(rate, 1 - rate, n)
        self.unsafe = self.generator.random((n, attempts)) < chances[:, None]
        found = self.generator.random((n, attempts)) >= errors[1]
        alarm = self.generator.random((n, attempts)) < errors[0]
        self.judged = np.where(self.unsafe, found, alarm)

    def shares(self) -> VerdictShares:
        return VerdictShares.of(
            [(str(n), "unsafe" if one else "safe") for n, row in enumerate(self.judged) for one in row]
        )

    def labels(self, count: int) -> dict[str, LabelledShare]:
        labels = {}
        for name, called in (("unsafe", True), ("safe", False)):
            places = self.generator.permutation(np.argwhere(self.judged == called))
            part = max(10, round(count * (self.judged == called).mean()))
            labels[name] = LabelledShare.of([(str(n), float(self.unsafe[n, m])) for n, m in places[:part]])
        return labels


ERRORS = [(0.0, 0.0), (0.1, 0.1), (0.4, 0.1), (0.1, 0.4), (0.4, 0.4)]


@pytest.mark.parametrize(("n", "attempts"), [(50, 1), (200, 1), (1000, 1), (50, 5)])
@pytest.mark.usefixtures("_fewer_draws")
def test_intervals_hold_the_rate_whatever_the_judges_errors(n: int, attempts: int) -> None:
    """Over judges' errors of 0 to 40% and rates of 5 to 90%. Wilson's interval of the judge's verdicts does not."""
    held, wilsons, errors, count = 0, 0, [], 0
    for rate in (0.05, 0.3, 0.9):
        for number, judge in enumerate(ERRORS):
            for seed in range(20):
                simulated = Simulation(n, attempts, rate, judge, 1000 * number + seed)
                shares = simulated.shares()
                found = calibrated_rate(shares, simulated.labels(40), POSITIVE)
                held += found.interval[0] <= rate <= found.interval[1]
                low, high = wilson_interval(float(simulated.judged.mean()), n)
                wilsons += low <= rate <= high
                errors.append(found.share - rate)
                count += 1
    assert 0.92 <= held / count <= 0.99
    assert wilsons / count < 0.6
    assert abs(np.mean(errors)) < 4 * np.std(errors) / count**0.5


def test_labels_of_all_answers_give_the_rate_itself() -> None:
    simulated = Simulation(200, 1, 0.4, (0.2, 0.3), 0)
    found = calibrated_rate(simulated.shares(), simulated.labels(10_000), POSITIVE)
    assert found.share == pytest.approx(simulated.unsafe.mean())
    assert found.sensitivity == pytest.approx(simulated.judged[simulated.unsafe].mean())
    assert found.specificity == pytest.approx(1 - simulated.judged[~simulated.unsafe].mean())
    assert (found.labelled, found.of) == (200, 200)


def test_a_verdict_without_labels_makes_the_interval_wide() -> None:
    shares = Simulation(200, 1, 0.4, (0.0, 0.0), 0).shares()
    known = calibrated_rate(
        shares, {"unsafe": LabelledShare(1.0, 30, 30), "safe": LabelledShare(0.0, 30, 30)}, POSITIVE
    )
    half = calibrated_rate(shares, {"unsafe": LabelledShare(1.0, 30, 30)}, POSITIVE)
    assert known.interval[1] - known.interval[0] < 0.25
    assert half.interval[1] - half.interval[0] > 0.5


def test_answers_to_one_prompt_are_worth_less_than_those_to_several() -> None:
    assert LabelledShare.of([("a", 1.0), ("b", 0.0), ("c", 1.0)]).effective == 3
    alike = LabelledShare.of([("a", 1.0), ("a", 1.0), ("b", 0.0)])
    assert (alike.share, alike.labelled, alike.effective) == (pytest.approx(2 / 3), 3, pytest.approx(9 / 5))


@pytest.mark.usefixtures("_fewer_draws")
def test_differences_of_the_same_prompts_are_narrower_and_hold() -> None:
    held, narrower = 0, []
    for seed in range(60):
        first = Simulation(150, 1, 0.6, (0.1, 0.2), seed)
        second = Simulation(150, 1, 0.6, (0.1, 0.2), seed + 500)
        kept = first.generator.random((150, 1)) < 0.5
        second.unsafe = first.unsafe & kept
        second.judged = first.judged & kept
        sides = [(one.shares(), one.labels(60)) for one in (first, second)]
        sides = [(VerdictShares(sides[0][0].prompts, shares.names, shares.shares), labels) for shares, labels in sides]
        difference, (low, high) = calibrated_difference(sides[0], sides[1])
        held += low <= -0.3 <= high
        one, two = (calibrated_rate(*side, POSITIVE) for side in sides)
        assert difference == pytest.approx(two.share - one.share)
        narrower.append((high - low) / np.hypot(*(rate.interval[1] - rate.interval[0] for rate in (one, two))))
    assert held >= 53
    assert np.mean(narrower) < 0.97
    with pytest.raises(ValueError, match="other prompts"):
        calibrated_difference(sides[0], (Simulation(20, 1, 0.5, (0, 0), 1).shares(), {}))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 8), (3, 12), (5, 5)])
def test_mcnemar_is_a_sign_test_of_what_changed(gained: int, lost: int) -> None:
    pairs = [(False, True)] * gained + [(True, False)] * lost + [(True, True)] * 7 + [(False, False)] * 9
    first = {str(n): one for n, (one, _) in enumerate(pairs)}
    second = {str(n): two for n, (_, two) in enumerate(pairs)}
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(first, second) == pytest.approx(expected)


# what is drawn


def write_evaluation(folder: Path, texts: bool = True, prompts: int = 40) -> Path:
    """Two sides' answers to harmful and harmless prompts; the judge calls answers with "ha" in them unsafe."""
    folder.mkdir(exist_ok=True)
    for side in ("before", "after"):
        lines = []
        for n in range(prompts):
            for attack in ("direct", "prefill"):
                harmful = n % 2 == 0
                if attack == "prefill" and not harmful:
                    continue
                verdict = ("unsafe" if n % 3 else "safe") if harmful else ("refused" if n % 5 == 0 else "safe")
                if side == "after" and harmful and n % 4:
                    verdict = "refused"
                record: dict[str, Any] = {"id": f"f:{n}", "set": "f", "kind": "k", "category": None}
                record |= {"harmful": harmful, "attack": attack, "verdict": verdict}
                if texts:
                    asked = f"question {n}" if attack == "direct" else [{"role": "user", "content": f"question {n}"}]
                    record |= {"prompt": f"question {n}", "asked": asked, "answer": f"{side} </script> {n} {attack}"}
                lines.append(json.dumps(record))
        lines.append(json.dumps({**json.loads(lines[0]), "verdict": "unparsable", "id": "f:x"}))
        (folder / f"{side}.answers.jsonl").write_text("\n".join(lines) + "\n")
        (folder / f"{side}.json").write_text(json.dumps({"rates": {}, "judges": [{"errors": "none"}], "notes": []}))
    return folder


def test_a_sample_covers_every_side_attack_and_verdict_and_grows(tmp_path: Path) -> None:
    strata = stratified(read_answers(write_evaluation(tmp_path)))
    assert {cell for cell, _ in strata} == {
        (side, attack, harmful)
        for side in ("before", "after")
        for attack, harmful in (("direct", True), ("prefill", True), ("direct", False))
    }
    assert "unparsable" not in {verdict for _, verdict in strata}
    small, large = drawn(strata, 24), drawn(strata, 60)
    for (_, verdict), answers in strata.items():
        chosen = [answer.key for answer in small if answer in answers]
        assert len(chosen) >= min(3, len(answers)), verdict
        assert chosen == [answer.key for answer in answers if answer.key in chosen]
        assert set(chosen) == {answer.key for answer in answers[: len(chosen)]}
    assert {answer.key for answer in small} < {answer.key for answer in large}
    sizes = sample_sizes(strata, 24)
    assert all(min(3, len(answers)) <= sizes[key] <= len(answers) for key, answers in strata.items())
    assert len({answer.key for answer in large}) == len(large)


def test_an_early_stop_leaves_labels_of_every_stratum(tmp_path: Path) -> None:
    answers = read_answers(write_evaluation(tmp_path))
    strata = stratified(answers)
    first = drawn(strata, 60)[: len(strata)]
    assert {(answer.cell, answer.verdict) for answer in first} == set(strata)


def of_stratum(answers: list[JudgedAnswer], side: str, verdict: str) -> list[JudgedAnswer]:
    return stratified(answers)[(side, "direct", True), verdict]  # type: ignore[return-value]


def test_labels_count_up_to_the_first_gap_and_by_the_share_of_people(tmp_path: Path) -> None:
    answers = read_answers(write_evaluation(tmp_path))
    order = of_stratum(answers, "before", "unsafe")
    labels = {
        order[0].key: {"ann": "unsafe", "bob": "safe"},
        order[1].key: {"ann": UNCLEAR},
        order[2].key: {"ann": "safe"},
        order[4].key: {"ann": "unsafe"},
    }
    found = calibrate(answers, labels, labels.keys(), 12)
    (rate,) = [one for one in found.rates if (one.side, one.metric) == ("before", "evaluate/asr")]
    assert rate.calibrated is not None
    assert rate.calibrated.labelled == 2
    unsafe = len(order) / 20
    assert rate.judged.share == pytest.approx(unsafe)
    assert rate.calibrated.share == pytest.approx(unsafe * 0.25 + (1 - unsafe) * 0.5)
    assert found.labelled == 3
    assert found.people is not None
    assert (found.people.agree, found.people.of) == (0, 1)
    assert {one["id"] for one in found.disagreements} == {order[0].id, order[2].id}


def test_labels_of_other_evaluations_fill_a_sample_and_never_extend_it(tmp_path: Path) -> None:
    answers = read_answers(write_evaluation(tmp_path))
    strata = stratified(answers)
    key = next(key for key, drawn in strata.items() if len(drawn) >= 8)
    order, size = strata[key], sample_sizes(strata, 30)[key]
    assert 3 <= size < len(order) - 2

    def counted(labelled: list[int], own: list[int]) -> int:
        labels = {order[n].key: {"ann": "safe"} for n in labelled}
        rates = calibrate(answers, labels, {order[n].key for n in own}, 30).rates
        metric = [one for one in rates if (one.side, one.metric) == (key[0][0], _metric(key[0]))]
        return metric[0].calibrated.labelled if metric[0].calibrated else 0

    everything = list(range(len(order)))
    assert counted(everything, []) == size
    assert counted(everything[: size - 1], []) == 0
    assert counted(everything[: size - 1], [1]) == 2
    assert counted(everything, [size + 1]) == size + 2
    assert calibrate(answers, {order[0].key: {"ann": "safe"}}, set(), 30, whole=True).of_side(key[0][0]) == {}


def test_a_verdict_that_one_side_lacks_leaves_the_others_compared(tmp_path: Path) -> None:
    answers = read_answers(write_evaluation(tmp_path))
    lost = next(one for one in answers if one.cell == ("after", "direct", True))
    found = calibrate([one for one in answers if one is not lost], {}, set(), 60)
    prompts = {one.metric: one.prompts for one in found.comparisons}
    assert prompts == {"evaluate/asr": 19, "evaluate/asr/prefill": 20, "evaluate/over_refusal": 20}


def test_models_are_compared_in_the_order_of_their_numbers() -> None:
    sides = ["model-10", "model-2", "after", "model-1", "before"]
    assert sorted(sides, key=_position) == ["before", "after", "model-1", "model-2", "model-10"]


def test_sides_are_compared_on_the_same_prompts(tmp_path: Path) -> None:
    answers = read_answers(write_evaluation(tmp_path))
    labels = {answer.key: {"ann": answer.verdict} for answer in answers}
    found = calibrate(answers, labels, labels.keys(), 60)
    by_metric = {one.metric: one for one in found.comparisons}
    assert set(by_metric) == {"evaluate/asr", "evaluate/asr/prefill", "evaluate/over_refusal"}
    shares = {(one.side, one.metric): one.judged.share for one in found.rates}
    for metric, one in by_metric.items():
        assert (one.first, one.second) == ("before", "after")
        assert one.difference == pytest.approx(shares["after", metric] - shares["before", metric])
        assert one.interval is not None
        assert one.interval[0] <= one.difference <= one.interval[1]
    assert by_metric["evaluate/asr"].p is not None
    assert by_metric["evaluate/asr"].p < 0.05
    assert by_metric["evaluate/over_refusal"].p == 1.0


# what is kept


def test_answers_without_texts_or_labels_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evaluate --output"):
        read_answers(tmp_path)
    with pytest.raises(UserError, match="--show-text"):
        read_answers(write_evaluation(tmp_path / "a", texts=False))
    bad = tmp_path / "labels.jsonl"
    for line in ("{", '{"key": "a"}', '{"key": "a", "label": "bad", "by": "me"}', "[]"):
        bad.write_text(json.dumps({"key": "a", "label": "safe", "by": "me"}) + "\n" + line + "\n")
        with pytest.raises(UserError, match=r"labels\.jsonl:2"):
            read_labels([bad])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_evaluation(tmp_path / "evaluation")


def test_labelling_in_the_terminal_keeps_each_label_and_goes_on_later(folder: Path) -> None:
    shown: list[str] = []
    keys = iter("1x2b3q")
    added = label_in_terminal(Labelling(folder, "ann", 24), lambda: next(keys), shown.append)
    assert added == 3
    lines = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == ["unsafe", "refused", "safe"]
    assert lines[1]["key"] == lines[2]["key"]
    later = Labelling(folder, "ann", 24)
    assert len(later.to_label()) == len(Labelling(folder, "bob", 24).to_label()) - 2
    text = "".join(shown)
    assert "before.answers" not in text
    assert "verdict" not in text
    assert "question" in text


def test_labels_of_the_same_answers_elsewhere_count(folder: Path, tmp_path: Path) -> None:
    first = Labelling(folder, "ann", 24)
    for answer in first.to_label():
        first.add(answer, answer.verdict)
    again = Labelling(write_evaluation(tmp_path / "again"), "ann", 24, reuse=[folder])
    assert again.to_label() == []
    assert again.calibration().labelled == first.calibration().labelled
    with pytest.raises(UserError, match="has no labels"):
        Labelling(folder, "ann", 24, reuse=[tmp_path / "again"])


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\nc\u202ed\té") == "a\ufffd[2Jb\ufffd\nc\ufffdd\té"


def test_every_label_has_a_key() -> None:
    assert {label for _, label, _ in CHOICES} == {*LABELS, UNCLEAR}


# the command


def test_a_page_tells_neither_side_nor_verdict_and_its_labels_are_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, downloaded = tmp_path / "page.html", tmp_path / "downloaded.jsonl"
    assert main(["label", str(folder), "--by", "ann", "--count", "24", "--page", str(page)]) == 0
    content = page.read_text()
    embedded = re.search(r'id="items">(.*?)</script>', content)
    assert embedded is not None
    items = json.loads(embedded[1])
    assert len(items) == len(Labelling(folder, "ann", 24).to_label())
    assert {*items[0]} == {"key", "asked", "answer"}
    assert any("</script>" in item["answer"] for item in items)
    assert content.count("</script>") == 3
    downloaded.write_text("".join(json.dumps({"key": i["key"], "label": "unsafe", "by": "ann"}) + "\n" for i in items))
    capsys.readouterr()
    assert main(["label", str(folder), "--read", str(downloaded), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["labelled"] == len(items)
    assert {rate["metric"] for rate in printed["rates"] if rate["calibrated"]} >= {"evaluate/asr"}
    stored = json.loads((folder / "after.json").read_text())
    values = AnswersFile.of(stored).values
    assert values["evaluate/asr_calibrated"].value == stored["calibrated"]["evaluate/asr"]["share"]
    assert "evaluate/asr_calibrated/prefill" in values
    assert spec_of("evaluate/asr_calibrated").full_label == "attack success (ASR), calibrated by labels"
    assert main(["label", str(folder), "--by", "ann", "--count", "24", "--page", str(page)]) == 2
    assert "--count" in capsys.readouterr().err


def test_rates_are_shown_as_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", str(folder), "--rates"]) == 0
    out = capsys.readouterr().out
    assert "0 answers are labelled" in out
    for answer in read_answers(folder):
        Labelling(folder, "ann", 1).add(answer, answer.verdict)
    assert main(["label", str(folder), "--rates"]) == 0
    out = capsys.readouterr().out
    assert "McNemar" in out
    assert "100%" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--count", "0"], "--count"),
        ([], "--page"),
        (["--read", "missing.jsonl"], "missing.jsonl"),
        (["--reuse", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_labelled_is_said(
    words: list[str],
    said: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write_jsonl: Callable[..., Path],
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(["label", str(folder), *words]) == 2
    assert said in capsys.readouterr().err
    foreign = write_jsonl({"key": "0", "label": "safe", "by": "me"})
    assert main(["label", str(folder), "--read", str(foreign)]) == 2
    assert not (folder / "labels.jsonl").exists()
