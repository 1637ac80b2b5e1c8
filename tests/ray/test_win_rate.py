"""Win rates: verdicts of canned judges in both orders, their interval, AlpacaEval's files, a model as the judge."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from raydiv.config.cluster import ClusterConfig
from raydiv.evaluation.generate import Request, TextGenerator, generate
from raydiv.evaluation.outputs import ModelOutput, format_outputs, match_outputs, read_outputs
from raydiv.evaluation.win_rate import CHOICE_TOKENS, QUESTION, WinRate, make_pairwise_judge, parse_choice, win_rate
from raydiv.model.load import ModelSource
from raydiv.runtime.session import ray_session
from raydiv.utils.errors import UserError

VERDICTS = dict.fromkeys(itertools.product(("1", "2", "tie"), repeat=2), "tie")
VERDICTS |= {("1", "2"): "win", ("2", "1"): "loss"}
UNPARSABLE = "Both are fine."


def win_rate_of(*answers: tuple[str, str]) -> WinRate:
    """The win rate where the judge answers this to each pair, first with ours and then with theirs in first place."""
    count = len(answers)
    ours_first, theirs_first = zip(*answers, strict=True)
    return win_rate(["q"] * count, ["ours"] * count, ["theirs"] * count, lambda _: [*ours_first, *theirs_first])


def of(wins: int, losses: int, ties: int) -> WinRate:
    return WinRate(["win"] * wins + ["loss"] * losses + ["tie"] * ties, 0, 0)


@pytest.mark.parametrize("orders", VERDICTS)
def test_both_orders_make_a_verdict(orders: tuple[str, str]) -> None:
    assert win_rate_of(orders).verdicts == [VERDICTS[orders]]


@pytest.mark.parametrize("other", ["1", "2", "tie", UNPARSABLE])
def test_pair_with_an_unparsable_answer_is_neither_win_nor_tie(other: str) -> None:
    for orders in ((UNPARSABLE, other), (other, UNPARSABLE)):
        found = win_rate_of(orders, ("1", "2"))
        assert found.verdicts == ["unparsable", "win"]
        assert (found.rate, found.parsable) == (1.0, 1)


def test_rate_counts_ties_by_half_and_leaves_out_the_unparsable() -> None:
    found = win_rate_of(("1", "2"), ("1", "2"), ("2", "1"), ("1", "1"), ("tie", "2"), (UNPARSABLE, "1"))
    assert found.rate == pytest.approx((2 + 2 / 2) / 5)
    # the ones and twos that were said: 12 12 21 11 -2 -1, of which first
    assert found.position_bias == pytest.approx(6 / 10)
    assert found.as_json() == {
        "value": found.rate,
        "interval": found.interval,
        "of": 6,
        "wins": 2,
        "losses": 1,
        "ties": 2,
        "unparsable": 1,
        "position_bias": 0.6,
    }
    assert found.metrics() == {"evaluate/win_rate": 0.6, "evaluate/position_bias": 0.6}


def test_judge_of_one_place_finds_ties_alone() -> None:
    found = win_rate_of(*[("1", "1")] * 5)
    assert (found.rate, found.position_bias) == (0.5, 1.0)


def test_nothing_parsable_has_no_rate() -> None:
    found = win_rate_of(*[(UNPARSABLE, UNPARSABLE)] * 3)
    assert found.rate is found.interval is found.position_bias is None
    assert found.metrics() == {}
    assert found.count("unparsable") == 3


def test_each_pair_is_asked_in_both_orders() -> None:
    asked: list[str] = []

    def prefers_the_longer(questions: Sequence[str]) -> list[str]:
        asked.extend(questions)
        outputs = [question.partition("# Output 1\n")[2].partition("\n\n# Output 2\n") for question in questions]
        return ["1" if len(first) > len(rest.partition("\n\n# Which")[0]) else "2" for first, _, rest in outputs]

    found = win_rate(["{a}", "b"], ["long one", "s"], ["s", "long {0} one"], prefers_the_longer)
    assert found.verdicts == ["win", "loss"]
    assert found.position_bias == 0.5
    assert len(asked) == 4
    assert asked[0] == QUESTION.format(instruction="{a}", first="long one", second="s")
    assert asked[2] == QUESTION.format(instruction="{a}", first="s", second="long one")


def test_every_instruction_needs_both_outputs() -> None:
    with pytest.raises(ValueError, match="zip"):
        win_rate(["a", "b"], ["x", "y"], ["x"], lambda questions: ["1"] * len(questions))


LABELS = [
    "{}",
    "Output {}",
    "output ({})",
    "**{}**",
    " {}.",
    "Answer: {}",
    "{}\n\nBecause.",
    "[{}]",
    "The answer is {}.",
]
LABELS += ["The better output is {}.", "Output {} is better.", "The output {} is the better one", "{} is better"]
NO_CHOICES = [
    "",
    "1 and 2",
    "12",
    "1 or 2",
    "3",
    "neither",
    "Output",
    "A",
    "The instruction says 1",
    "1 2",
    "untie",
    "1st",
]
NO_CHOICES += [
    "The answer is not 1",
    "Output 1 is better than 2, but",
    "Output 1 is worse",
    "Output 1 is not better",
    "not 1",
]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("identifier", ["1", "2", "tie", "Tie", "TIE"])
def test_choice_is_read(label: str, identifier: str) -> None:
    assert parse_choice(label.format(identifier)) == identifier.lower()


@pytest.mark.parametrize("answer", NO_CHOICES)
def test_anything_else_is_no_choice(answer: str) -> None:
    assert parse_choice(answer) is None


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_a_choice_or_none(answer: str) -> None:
    assert parse_choice(answer) in ("1", "2", "tie", None)


@pytest.mark.parametrize(("wins", "losses"), [(1, 0), (0, 1), (10, 0), (0, 10), (7, 3), (50, 50), (3, 97), (804, 1)])
def test_interval_without_ties_is_wilsons(wins: int, losses: int) -> None:
    wilson = binomtest(wins, wins + losses).proportion_ci(method="wilson")
    assert of(wins, losses, 0).interval == pytest.approx((wilson.low, wilson.high), abs=1e-7)


@pytest.mark.parametrize(
    ("wins", "losses", "ties"), [(400, 300, 105), (100, 20, 680), (250, 250, 500), (600, 100, 300)]
)
def test_interval_with_ties_is_the_bootstraps_where_there_are_many(wins: int, losses: int, ties: int) -> None:
    values = np.repeat([1.0, 0.0, 0.5], [wins, losses, ties])
    drawn = bootstrap((values,), np.mean, n_resamples=4000, rng=np.random.default_rng(0)).confidence_interval
    assert of(wins, losses, ties).interval == pytest.approx((drawn.low, drawn.high), abs=0.005)


@pytest.mark.parametrize("ties", [1, 20, 1000])
def test_ties_alone_are_no_certainty(ties: int) -> None:
    # by hand: n d / (1 - d) = z^2 at the end
    z2 = 1.959963984540054**2
    assert of(0, 0, ties).interval == pytest.approx((0.5 - z2 / (ties + z2) / 2, 0.5 + z2 / (ties + z2) / 2), abs=1e-7)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_interval_holds_the_rate_and_mirrors(wins: int, losses: int, ties: int) -> None:
    if not wins + losses + ties:
        return
    found = of(wins, losses, ties)
    assert found.interval is not None
    assert found.rate is not None
    low, high = found.interval
    assert 0 <= low <= found.rate <= high <= 1
    assert low < high
    assert of(losses, wins, ties).interval == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("law", [(0.3, 0.3, 0.4), (0.6, 0.2, 0.2), (0.1, 0.1, 0.8), (0.9, 0.05, 0.05)])
def test_interval_covers_the_truth_as_often_as_it_says(law: tuple[float, float, float]) -> None:
    # over every outcome of 30 pairs
    pairs, (win, loss, tie) = 30, law
    covered = 0.0
    for wins in range(pairs + 1):
        for losses in range(pairs - wins + 1):
            ties = pairs - wins - losses
            weight = math.comb(pairs, wins) * math.comb(pairs - wins, losses)
            interval = of(wins, losses, ties).interval
            assert interval is not None
            if interval[0] <= win + tie / 2 <= interval[1]:
                covered += weight * win**wins * loss**losses * tie**ties
    assert 0.93 <= covered <= 0.98


RECORDS = [ModelOutput("Say hi.", "Hi!", "ours"), ModelOutput("Добрый день?", "“Да”\n\\", "ours")]


def test_outputs_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "outputs.json"
    path.write_text(format_outputs(RECORDS))
    assert read_outputs(path) == RECORDS
    assert json.loads(path.read_text())[0] == {"instruction": "Say hi.", "output": "Hi!", "generator": "ours"}


def test_records_of_alpacaeval_are_read(tmp_path: Path) -> None:
    path = tmp_path / "davinci.json"
    record = {"dataset": "koala", "instruction": "Sum up.", "input": "A text.", "output": "Text."}
    path.write_text(json.dumps([record, {**record, "input": "", "generator": "other", "datasplit": "eval"}]))
    assert read_outputs(path) == [
        ModelOutput("Sum up.\n\nA text.", "Text.", "davinci"),
        ModelOutput("Sum up.", "Text.", "other"),
    ]


GOOD = {"instruction": "secret", "output": "b", "generator": "c"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "outputs.json: not JSON: "),
        ('{"instruction": "secret"}', "outputs.json: AlpacaEval's format is a list of records, found dict"),
        ("[]", "outputs.json: AlpacaEval's format is a list of records, found an empty list"),
        (
            json.dumps([GOOD, "secret"]),
            "outputs.json: record 2: must be a mapping of instruction, output and generator",
        ),
        (json.dumps([{"instruction": "secret"}]), "outputs.json: record 1: output must be text, found none"),
        (json.dumps([GOOD, {**GOOD, "output": 3}]), "outputs.json: record 2: output must be text, found int"),
        (json.dumps([{**GOOD, "instruction": ["secret"]}]), "record 1: instruction must be text, found list"),
    ],
)
def test_bad_file_is_named_and_its_record_too(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "outputs.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_outputs(path)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        read_outputs(tmp_path / "nowhere.json")


def test_stored_outputs_find_their_prompts_in_any_order() -> None:
    stored = [
        ModelOutput("a", "1", "g"),
        ModelOutput("b", "2", "g"),
        ModelOutput("a", "3", "g"),
        ModelOutput("c", "4", "g"),
    ]
    assert match_outputs(["b", "a", "a"], stored, Path("f")) == ["2", "1", "3"]
    with pytest.raises(UserError, match=r"f: has no output to 2 of the 3 prompts \(number 2 first\)") as caught:
        match_outputs(["b", "zzz", "b"], stored, Path("f"))
    assert "zzz" not in str(caught.value)


@pytest.mark.long
def test_a_model_judges(tiny_model: Path) -> None:
    instructions, ours, theirs = ["Say hi.", "Say no."], ["Hi.", "No."], ["Hello there.", "Never."]
    source = ModelSource(tiny_model)
    with ray_session(ClusterConfig()):
        judge = make_pairwise_judge(source, ClusterConfig())
        asked = [QUESTION.format(instruction="Say hi.", first="Hi.", second="Hello there.")]
        answers = judge(asked)
        found = win_rate(instructions, ours, theirs, judge)
        direct = generate(source, [Request(asked[0])], CHOICE_TOKENS, ClusterConfig())
    chat = source.chat()
    here = TextGenerator(source, CHOICE_TOKENS, [chat.tokenizer.eos_token_id])([{"ids": chat.prompt_ids(asked[0])}])
    assert answers == [direct[0].text] == [chat.decode(here[0]["answer"])]
    # random weights say nothing that can be read, and are not counted for anyone
    assert found.verdicts == ["unparsable"] * 2
    assert found.rate is None
