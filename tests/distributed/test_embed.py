"""Which hidden states stand for a prompt: a pool's model and a plain forward agree, packed, padded and under ZeRO-3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.models import make_model
from helpers.ranks import run_on_ranks
from raydiv.evaluation.separation import embed as module
from raydiv.evaluation.separation.embed import Embedder, Readout, sample_prompts
from raydiv.model.load import ModelSource
from raydiv.utils.errors import UserError

PROMPTS = ["Help me", "How do I mend a broken chair with a long and winding tale about it?", "No.", "Hurt them all now"]


def plain_states(model: Path, readout: Readout) -> np.ndarray:
    """States [n, layers, d], a prompt at a time, by transformers alone."""
    source = ModelSource(model)
    chat, network = source.chat(), AutoModelForCausalLM.from_pretrained(model).eval()
    by_prompt = []
    for prompt in PROMPTS:
        ids = torch.tensor([chat.prompt_ids(prompt, generation=False)])
        with torch.no_grad():
            states = torch.stack(network(ids, output_hidden_states=True).hidden_states)[:, 0]
        layers = range(len(states)) if readout.layers is None else readout.layers
        pooled = states[:, -1] if readout.pooling == "last" else states.mean(1)
        by_prompt.append(pooled[list(layers)].numpy())
    return np.stack(by_prompt)


READOUTS = [Readout(), Readout(None), Readout((0, 1)), Readout((-1,), "mean"), Readout(None, "mean")]


@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # packed, and padded
def test_states_are_those_of_a_plain_forward(
    readout: Readout, attention: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_FORWARD", 60)  # several forwards
    embedder = Embedder(ModelSource(tiny_model, attention=attention), readout)
    assert embedder._may_pack == (attention == "sdpa")
    rows = embedder([{"prompt": prompt} for prompt in PROMPTS])
    expected = plain_states(tiny_model, readout)
    assert [row["hidden"].shape for row in rows] == [expected.shape[1:]] * len(PROMPTS)
    np.testing.assert_allclose(np.stack([row["hidden"] for row in rows]), expected, atol=2e-5)
    chat = ModelSource(tiny_model).chat()
    assert [row["length"] for row in rows] == [len(chat.prompt_ids(prompt, generation=False)) for prompt in PROMPTS]


def test_a_model_that_mixes_packed_prompts_is_padded(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(module.ModelSource):
        """A model whose attention does not heed where prompts begin."""

        def load_for_inference(self) -> Any:
            model = super().load_for_inference()
            decoder, forward = model.base_model, model.base_model.forward

            def mixed(attention_mask: Any = None, position_ids: Any = None, **inputs: Any) -> Any:
                return forward(attention_mask=None if inputs["input_ids"].shape[0] == 1 else attention_mask, **inputs)

            decoder.forward = mixed
            return model

    embedder = Embedder(Blind(tiny_model), Readout())
    assert not embedder._may_pack
    rows = embedder([{"prompt": prompt} for prompt in PROMPTS])
    np.testing.assert_allclose(
        np.stack([row["hidden"] for row in rows]), plain_states(tiny_model, Readout()), atol=2e-5
    )


@pytest.mark.parametrize(
    ("layers", "blocks", "numbers"),
    [((-1,), 4, [4]), (None, 2, [0, 1, 2]), ((0, -1, 4), 4, [0, 4]), ((3, 1), 4, [1, 3]), ((-5,), 4, [0])],
)
def test_layers_are_counted_from_either_end(layers: Any, blocks: int, numbers: list[int]) -> None:
    assert Readout(layers).layer_indices(blocks) == numbers


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(UserError, match=f"layers: {layer}: .* 0 to 4"):
        Readout((layer,)).layer_indices(4)


def test_a_sample_is_drawn_once_and_for_all() -> None:
    assert sample_prompts(np.array([True] * 5), 10) == [0, 1, 2, 3, 4]
    labels = np.arange(1000) % 4 == 0
    sample = sample_prompts(labels, 100)
    assert sample == sample_prompts(labels, 100) == sorted(set(sample))
    assert (len(sample), labels[sample].sum()) == (100, 25)
    rare = np.arange(20_000) < 12
    assert rare[sample_prompts(rare, 1000)].sum() == 10
    assert (np.arange(20_000) < 3)[sample_prompts(np.arange(20_000) < 3, 1000)].sum() == 3


def separations(model: str, readouts: list[Readout], tokens: int) -> list[dict[str, float]]:
    """``separation/*`` of the policy under ZeRO-3; runs on every rank."""
    from unittest.mock import patch

    from raydiv.config import load_recipe
    from raydiv.model.head import LogProbHead
    from raydiv.model.load import build_policy
    from raydiv.training import engine as engines
    from raydiv.training import separation_probe as anchors
    from raydiv.training.step import Stepper

    engines.PERSISTENT_ELEMENTS = 0  # a model this small would otherwise never be partitioned between its uses
    recipe = load_recipe(
        {
            "model": {"id": model},
            "loss": {"type": "dpo"},
            "optim": {"steps": 1},
            "batch": {"tokens_per_microbatch": tokens},
            "engine": {"zero_stage": 3},
        }
    )
    engine = engines.DeepSpeedEngine(recipe, lambda: build_policy(Path(model), recipe.model, torch.float32))
    stepper = Stepper(engine, LogProbHead(engine.model), recipe.loss.terms, tokens, "mask")
    chat = ModelSource(Path(model)).chat()
    ids, harmful = [chat.prompt_ids(prompt, generation=False) for prompt in PROMPTS[:2]], np.array([False, True])
    seen = []
    with patch.multiple(
        anchors, separation_metrics=lambda points, *_, **__: seen.append(points), metric_values=lambda _: {}
    ):
        for readout in readouts:
            anchors.policy_separation(stepper, anchors.SeparationProbe(ids, harmful, readout))
    engine.close()
    return seen


@pytest.mark.slow
@pytest.mark.long
def test_the_policy_under_zero3_is_read_alike_on_any_ranks(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    readouts = [Readout(), Readout((-1,), "mean"), Readout((1,))]
    # of three ranks one has no prompt to read
    for ranks, tokens in ((1, 50), (3, 1000)):
        first, *others = run_on_ranks(separations, ranks, tmp_path / f"{ranks}", str(model), readouts, tokens)
        assert others == [[]] * (ranks - 1)
        for readout, points in zip(readouts, first, strict=True):
            np.testing.assert_allclose(points, plain_states(model, readout)[:2, 0], atol=2e-5)
