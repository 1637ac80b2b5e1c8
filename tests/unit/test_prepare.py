"""Prepare: the reference log-probs of each set of examples, and messages about the data."""

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
from raydiv.config.loss import PositionConfig
from raydiv.data.reference_scorer import Lookup
from raydiv.data.tokens import StoredExamples, TokenValues
from raydiv.runs.progress import ProgressDisplay
from raydiv.training.schedule import epoch_plan
from raydiv.utils.errors import UserError

Writer = Callable[..., Path]
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenize in this process, with an empty cache; reference log-probs are minus the prompts' lengths."""

    def lengths(recipe: Recipe, directory: Path, sets: Sequence[StoredExamples], *_: object) -> Lookup:
        return Lookup([-100.0 * number - examples.prompt_lengths for number, examples in enumerate(sets)], 3, 4)

    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("raydiv.data.tokenize.map_stream", stream_here)
    monkeypatch.setattr(preparation, "reference_logps", lengths)


class RecordingDisplay(ProgressDisplay):
    """A display that keeps its messages."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.messages: list[str] = []

    def print(self, message: str) -> None:
        self.messages.append(message)


def prepare_here(recipe: Recipe, display: ProgressDisplay | None = None) -> PreparedData:
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
    data = prepare_here(with_model(tiny_model, train, loss, eval=str(held_out)))
    assert data.eval is not None
    sets = [data.train, data.eval]
    assert [len(examples.examples) for examples in sets] == [8, 6]
    for number, examples in enumerate(sets):
        prompt_lengths, place = examples.examples.prompt_lengths, 2 * number if loss == "kto" else number
        assert examples.reference_logps is not None
        assert (examples.reference_logps == -100.0 * place - prompt_lengths).all()
        if loss == "kldo":
            assert examples.mismatched is None
            assert examples.mismatched_reference_logps is None
        else:  # scored after the examples of their set
            assert examples.mismatched is not None
            assert examples.mismatched_reference_logps is not None
            assert (examples.mismatched.prompt_rows != examples.mismatched.response_rows).all()
            assert (examples.mismatched_reference_logps == -100.0 * (place + 1) - prompt_lengths).all()
    assert (data.reference_hits, data.reference_misses) == (3, 4)


def test_a_constrained_loss_gets_the_reference_by_token(
    tiny_model: Path, write_jsonl: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that has no reference otherwise."""

    def numbered(recipe: Recipe, directory: Path, sets: Sequence[StoredExamples], *_: object) -> Lookup:
        counts = [len(examples) for examples in sets]
        tokens = [TokenValues(np.full(n, number, np.float32), np.arange(n + 1)) for number, n in enumerate(counts)]
        return Lookup([np.zeros(n, np.float32) for n in counts], 0, 0, tokens)

    monkeypatch.setattr(preparation, "reference_logps", numbered)
    train, held_out = write_jsonl(*rows(4)), write_jsonl(*rows(3, first=10), name="eval.jsonl")
    for loss in ("kto", "sft"):
        recipe = with_model(tiny_model, train, loss, eval=str(held_out))
        position = PositionConfig(kind="constrained", betas=[0.5, 0.1])
        recipe = recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"position": position})})
        data = prepare_here(recipe)
        assert data.eval is not None
        for number, examples in enumerate((data.train, data.eval)):
            assert examples.token_values is not None
            assert examples.token_values.values[0] == (2 * number if loss == "kto" else number)
            if loss == "kto":
                assert examples.mismatched_token_values is not None
                assert examples.mismatched_token_values.values[0] == 2 * number + 1


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("loss", ["kldo", "dpo", "kto"])
def test_the_examples_of_a_runs_steps_alone_are_scored(
    loss: str, whole: bool, tiny_model: Path, write_jsonl: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []

    def numbered(recipe: Recipe, directory: Path, sets: Sequence[StoredExamples], *_: object) -> Lookup:
        scored.extend(len(examples) for examples in sets)
        lengths = [examples.response_lengths.astype(np.int64) for examples in sets]
        tokens = [
            TokenValues(np.repeat(examples.response_rows, n).astype(np.float32), np.append(0, np.cumsum(n)))
            for examples, n in zip(sets, lengths, strict=True)
        ]
        return Lookup([examples.response_rows.astype(np.float32) for examples in sets], 0, 0, tokens)

    monkeypatch.setattr(preparation, "reference_logps", numbered)
    recipe = with_model(tiny_model, write_jsonl(*rows(40)), loss)
    recipe = type(recipe).model_validate(
        recipe.model_dump(by_alias=True)
        | {"batch": {"examples": 8}, "optim": {"steps": 3}}
        | {"loss": {"type": loss, "position": {"kind": "constrained", "betas": [1]}}}
    )
    display = ProgressDisplay(quiet=True)
    train = prepare_data(recipe, load_inputs(recipe, display), display, whole=whole).train
    assert scored == [80 if whole else 24] * (2 if loss == "kto" else 1)
    plan = epoch_plan(recipe, train.examples)
    used = np.unique(np.concatenate([plan.step(step).rows for step in range(3)]))
    assert len(used) == 24
    sets = [(train.examples, train.reference_logps, train.token_values)]
    if loss == "kto":
        assert train.mismatched is not None
        sets.append((train.mismatched, train.mismatched_reference_logps, train.mismatched_token_values))
    for examples, logps, tokens in sets:
        assert logps is not None
        assert tokens is not None
        assert (logps[used] == examples.response_rows[used]).all()
        assert np.isnan(np.delete(logps, used)).all() != whole
        for row, values in zip(used.tolist(), tokens.at(used), strict=True):
            assert values.tolist() == [examples.response_rows[row]] * int(examples.response_lengths[row])


def test_a_source_of_which_nothing_is_taken_is_named(tiny_model: Path, write_jsonl: Writer) -> None:
    first, second = write_jsonl(*rows(8)), write_jsonl(*rows(8, first=20), name="rare.jsonl")
    recipe = with_model(tiny_model, first, "kldo")
    for weight, messages in ((0.01, 1), (1.0, 0)):
        sources = [{"path": str(first)}, {"path": str(second), "weight": weight}]
        tree = recipe.model_dump(by_alias=True) | {"data": {"train": sources}, "optim": {"epochs": 1}}
        display = RecordingDisplay()
        prepare_here(type(recipe).model_validate(tree), display)
        assert sum("rare.jsonl: the steps of the run take none" in message for message in display.messages) == messages


def test_disabled_adapters_need_no_stored_reference(tiny_model: Path, write_jsonl: Writer) -> None:
    data = prepare_here(with_model(tiny_model, write_jsonl(*rows(4)), "kto", off=True))
    assert data.train.reference_logps is None
    assert data.train.mismatched is not None
    assert data.train.mismatched_reference_logps is None
    assert data.eval is None
    assert (data.reference_hits, data.reference_misses) == (0, 0)


def test_a_loss_without_a_reference_counts_from_zero(tiny_model: Path, write_jsonl: Writer) -> None:
    data = prepare_here(with_model(tiny_model, write_jsonl(*rows(4)), "sft"))
    assert data.train.reference_logps is not None
    assert (data.train.reference_logps == np.zeros(8)).all()
    assert data.train.mismatched is None


def test_a_prompt_with_more_than_half_of_the_examples_is_a_user_error(tiny_model: Path, write_jsonl: Writer) -> None:
    data = write_jsonl(*rows(1), *rows(1), *rows(1, first=2))
    with pytest.raises(UserError, match=r"data: .* 4 of 6 examples.* kto "):
        prepare_here(with_model(tiny_model, data, "kto"))
    assert len(prepare_here(with_model(tiny_model, data, "kldo")).train.examples) == 6


def test_dropped_rows_and_prompts_in_both_sets_are_reported(tiny_model: Path, write_jsonl: Writer) -> None:
    train = write_jsonl(*rows(4), {"prompt": "q"})
    held_out = write_jsonl(*rows(3, first=2), name="eval.jsonl")
    display = RecordingDisplay()
    data = prepare_here(with_model(tiny_model, train, "kldo", eval=str(held_out), on_bad_row="quarantine"), display)
    assert any("invalid rows" in line and ": 1 " in line for line in display.messages)
    assert any("data.train and data.eval: 2;" in line for line in display.messages)
    summary = data.summary()
    assert (summary["bad_rows"], summary["prompts_in_train_and_eval"]) == (1, 2)
    assert summary["train"]["examples"] == 8
    assert summary["eval"]["pairs"] == 3
    assert summary["fingerprint"] == data.train.examples.fingerprint


def test_valid_data_gives_no_message(tiny_model: Path, write_jsonl: Writer) -> None:
    display = RecordingDisplay()
    prepare_here(with_model(tiny_model, write_jsonl(*rows(8)), "kldo", eval=0.5), display)
    assert display.messages == []
