"""Workers of a pool's actor share its model, and leave it as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raydiv.data.reference_scorer import LogProbScorer
from raydiv.evaluation.generate import TextGenerator
from raydiv.evaluation.separation.embed import Embedder, Readout
from raydiv.model.load import ModelSource
from raydiv.utils import kept_model as module


@pytest.fixture
def _keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kept", {"keeps": False, "key": None, "model": None})
    module.keep_model()


EXAMPLES = [{"prompt": [5, 6, 7], "response": [8, 9, 2]}, {"prompt": [7], "response": [11, 2]}]
PROMPTS = [{"prompt": "a b"}, {"prompt": "c"}]
REQUESTS = [{"ids": [5, 6, 7]}, {"ids": [9], "seed": 3}]


def measured(source: ModelSource) -> list[object]:
    """What three workers find, each twice and after each of the others."""
    scorer, embedder = LogProbScorer(source), Embedder(source, Readout())
    generator = TextGenerator(source, 5, stops=[2])
    found: list[object] = []
    for _ in range(2):
        found += [row["logp"] for row in scorer(EXAMPLES)]
        found += [row["answer"] for row in generator(REQUESTS)]
        found += [np.asarray(row["hidden"]).tolist() for row in embedder(PROMPTS)]
    return found


def test_workers_of_one_model_do_not_disturb_each_other(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    source, loaded = ModelSource(tiny_model), []
    expected = measured(source)
    load = ModelSource.load
    monkeypatch.setattr(ModelSource, "load", lambda *arguments: loaded.append(1) or load(*arguments))
    request.getfixturevalue("_keeps")
    assert measured(source) == expected
    assert len(loaded) == 1


@pytest.mark.usefixtures("_keeps")
def test_another_model_takes_the_place_of_the_kept_one() -> None:
    loaded: list[str] = []

    def load(name: str) -> str:
        assert module._kept["model"] is None, "the last model is still there"
        loaded.append(name)
        return name

    for name in ("first", "first", "second", "first"):
        assert module.kept_model(name, lambda name=name: load(name)) == name
    assert loaded == ["first", "second", "first"]
