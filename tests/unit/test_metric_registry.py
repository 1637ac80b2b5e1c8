"""The registry of metrics: labels, formats, order and directions."""

from __future__ import annotations

import pytest

from raydiv.runs.metric_registry import HIGHER, LOWER, METRICS, NEITHER, spec_of, specs_of


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        ("evaluate/asr", "attack success (ASR)"),
        ("evaluate/asr/prefix_injection", "attack success (ASR): prefix injection"),
        ("evaluate/asr_set/AdvBench", "attack success (ASR) by set: AdvBench"),
        ("evaluate/asr_set/AdvBench/prefill", "attack success (ASR) by set: AdvBench: prefill"),
        ("evaluate/over_refusal_set/XSTest", "refused: all harmless by set: XSTest"),
        ("evaluate/refused/medical", "refused: medical"),
        ("evaluate/safety/self_harm", "safe answers to harmful prompts: self harm"),
        ("evaluate/odd", "odd"),
        ("evaluate/odd_rate/some_kind", "odd rate: some kind"),
        ("capability/arc_easy/acc_norm", "arc easy: acc norm"),
        ("reward/margin/ema", "margin: ema"),
        ("log_ratio", "log ratio"),
        ("separation/d_b_shuffled", "  same, labels shuffled"),
        ("eval/reward/aligned", "  reward of aligned ones"),
    ],
)
def test_row_labels(metric: str, label: str) -> None:
    assert spec_of(metric).row_label == label


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        ("separation/d_b_length_matched", "separation D_B (paper protocol), token lengths matched"),
        ("separation/probe_auc_length_matched", "AUC of a linear probe, held out, token lengths matched"),
        ("eval/reward/aligned", "reward of aligned ones"),
        ("evaluate/asr", "attack success (ASR)"),
        ("evaluate/odd_rate", "odd rate"),
    ],
)
def test_full_labels(metric: str, label: str) -> None:
    assert spec_of(metric).full_label == label


@pytest.mark.parametrize(
    ("metric", "heading"),
    [
        ("evaluate/asr/gcg_long", "ASR gcg_long"),
        ("evaluate/asr_set/XSTest/prefill", "ASR XSTest, prefill"),
        ("capability/arc_easy/acc_norm", "arc_easy, acc_norm"),
    ],
)
def test_headings_keep_the_names_of_a_family(metric: str, heading: str) -> None:
    assert spec_of(metric).heading == heading


def test_text_of_values_and_intervals() -> None:
    asr, d_b = METRICS["evaluate/asr"], METRICS["separation/d_b"]
    assert asr.text(0.25) == "25%"
    assert asr.range_text((0.05, 0.7), "-") == "5%-70%"
    assert asr.range_text(None) == ""
    assert d_b.text(-1e-9) == "0.00"
    assert d_b.range_text((0.19, 0.48)) == "0.19 to 0.48"
    assert (d_b.fine_format, asr.fine_format) == ("{:.3f}", "{:.1%}")
    assert METRICS["evaluate/kl"].fine_format == METRICS["evaluate/kl"].format == "{:.2f}"


def test_a_family_follows_its_metric() -> None:
    metrics = [
        "capability/b",
        "eval/divergence",
        "evaluate/odd",
        "evaluate/asr/b",
        "evaluate/asr",
        "unknown",
        "evaluate/asr/a",
    ]
    names = [spec.name for spec in specs_of(metrics)]
    first = [
        "evaluate/asr",
        "evaluate/asr/b",
        "evaluate/asr/a",
        "evaluate/odd",
        "capability/b",
        "eval/divergence",
        "unknown",
    ]
    assert names == first


def test_directions() -> None:
    assert METRICS["evaluate/asr"].better is LOWER
    assert METRICS["separation/d_b"].better is HIGHER
    assert METRICS["evaluate/kl"].better is NEITHER
    for metric in ("capability/wikitext/word_perplexity", "capability/own/brier_score/strict"):
        assert spec_of(metric).better is LOWER
    for metric in ("capability/perplexity/acc", "capability/arc_easy/acc"):
        assert spec_of(metric).better is HIGHER


def test_every_variant_has_its_metric() -> None:
    assert {spec.variant_of for spec in METRICS.values() if spec.variant_of} <= METRICS.keys()
