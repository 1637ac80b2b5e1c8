"""Prepare: which examples come with which reference log-probs, and what is said of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.stored import recipe_of, stream_here
from raydiv.commands import prepare as preparation
from raydiv.commands.prepare import PreparedData, load_inputs, prepare_data
from raydiv.config import Recipe
from raydiv.data.reference_scorer import Lookup
from raydiv.data.tokens import StoredExamples
from raydiv.runs.progress import ProgressDisplay
from raydiv.utils.errors import UserError

Writer = Callable[..., Path]
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenised in this process, with nothing that another test prepared; an example's reference is its prompt's length."""

    def lengths(recipe: Recipe, directory: Path, sets: Sequence[StoredExamples], progress: object) -> Lookup:
        return Lookup([-100.0 * number - examples.prompt_lengths for number, examples in enumerate(sets)], 3, 4)

    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("raydiv.data.tokenize.map_stream", stream_here)
    monkeypatch.setattr(preparation, "reference_logps", lengths)


class Heard(ProgressDisplay):
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def print(self, text: str) -> None:
        self.said.append(text)


def prepared(recipe: Recipe, display: ProgressDisplay | None = None) -> PreparedData:
    display = display or ProgressDisplay(quiet=True)
    return prepare_data(recipe, load_inputs(recipe, display), display)


def rows(count: int, first: int = 0) -> list[Row]:
    return [{"prompt": f"q{'x' * n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(first, first + count)]


def with_model(model: Path, train: Path, loss: str, off: bool = False, **changes: Any) -> Recipe:
    recipe = recipe_of(model, str(train), loss, **changes)
    lora = {"lora": {"r": 2}, "reference": "adapter-off"} if off else {}
    return type(recipe).model_validate(recipe.model_dump(by_alias=True) | {"model": {"id": str(model), **lora}})


@pytest.mark.parametrize("loss", ["kldo", "kto"])
def test_reference_log_probs_are_each_sets_own(loss: str, tiny_model: Path, write_jsonl: Writer) -> None:
    train, held_out = write_jsonl(*rows(4)), write_jsonl(*rows(3, first=10), name="eval.jsonl")
    found = prepared(with_model(tiny_model, train, loss, eval=str(held_out)))
    assert found.eval is not None
    sets = [found.train, found.eval]
    assert [len(one.examples) for one in sets] == [8, 6]
    for number, one in enumerate(sets):
        assert one.reference_logps is not None
        assert (one.reference_logps == -100.0 * number - one.examples.prompt_lengths).all()
        if loss == "kldo":
            assert one.mismatched is None
            assert one.mismatched_reference_logps is None
        else:  # after those of both sets
            assert one.mismatched is not None
            assert one.mismatched_reference_logps is not None
            assert (one.mismatched.prompt_rows != one.mismatched.response_rows).all()
            assert (one.mismatched_reference_logps == -100.0 * (2 + number) - one.examples.prompt_lengths).all()
    assert (found.reference_hits, found.reference_misses) == (3, 4)


def test_adapters_that_are_switched_off_need_no_stored_reference(tiny_model: Path, write_jsonl: Writer) -> None:
    found = prepared(with_model(tiny_model, write_jsonl(*rows(4)), "kto", off=True))
    assert found.train.reference_logps is None
    assert found.train.mismatched is not None
    assert found.train.mismatched_reference_logps is None
    assert found.eval is None
    assert (found.reference_hits, found.reference_misses) == (0, 0)


def test_loss_without_a_reference_counts_from_zero(tiny_model: Path, write_jsonl: Writer) -> None:
    found = prepared(with_model(tiny_model, write_jsonl(*rows(4)), "sft"))
    assert found.train.reference_logps is not None
    assert (found.train.reference_logps == np.zeros(8)).all()
    assert found.train.mismatched is None


def test_prompt_that_leaves_no_mismatched_response_is_refused(tiny_model: Path, write_jsonl: Writer) -> None:
    data = write_jsonl(*rows(1), *rows(1), *rows(1, first=2))
    with pytest.raises(UserError, match=r"data: one prompt has 4 of 6 examples.*; the loss kto needs them"):
        prepared(with_model(tiny_model, data, "kto"))
    assert len(prepared(with_model(tiny_model, data, "kldo")).train.examples) == 6


def test_rows_left_out_and_prompts_in_both_sets_are_said(tiny_model: Path, write_jsonl: Writer) -> None:
    train = write_jsonl(*rows(4), {"prompt": "q"})
    held_out = write_jsonl(*rows(3, first=2), name="eval.jsonl")
    heard = Heard()
    found = prepared(with_model(tiny_model, train, "kldo", eval=str(held_out), on_bad_row="quarantine"), heard)
    assert any("bad rows left out: 1" in line for line in heard.said)
    assert any("prompts in data.train and in data.eval: 2" in line for line in heard.said)
    summary = found.summary()
    assert (summary["bad_rows"], summary["prompts_in_train_and_eval"]) == (1, 2)
    assert summary["train"]["examples"] == 8
    assert summary["eval"]["pairs"] == 3
    assert summary["fingerprint"] == found.train.examples.fingerprint


def test_sound_data_is_not_talked_about(tiny_model: Path, write_jsonl: Writer) -> None:
    heard = Heard()
    prepared(with_model(tiny_model, write_jsonl(*rows(8)), "kldo", eval=0.5), heard)
    assert [line for line in heard.said if ": done in " not in line] == []
