"""The plan: sizes against published ones, memory against measurement, the layout that is settled, and what is said of
it.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from helpers.models import make_model
from helpers.ranks import run_on_ranks
from helpers.sources import ROOT
from helpers.step_cases import make_step, on_this_rank
from raydiv.cli import main
from raydiv.commands.plan.amounts import measure_data
from raydiv.commands.plan.architecture import SHIPPED, architecture_of, config_of
from raydiv.commands.plan.forecast import Forecast, plan
from raydiv.commands.plan.layout import (
    MARGIN,
    STAGES,
    WorkerBudget,
    best_layout,
    choose_layout,
    fitting_changes,
    largest_budget,
    stage_layouts,
    with_layout,
)
from raydiv.commands.plan.live import LiveBytes
from raydiv.commands.plan.memory import NF4, RUNTIME, Stage, memory_of
from raydiv.commands.plan.tested import TESTED, untested_combinations
from raydiv.config import Recipe, load_recipe
from raydiv.data.batching import EpochPlan
from raydiv.data.tokens import TokenizedExamples
from raydiv.model.collate import collate
from raydiv.model.head import LogProbHead, buffer_bytes
from raydiv.model.load import DTYPES, ModelSource, build_policy
from raydiv.runtime.session import KEEP_FREED_MEMORY, training_environment
from raydiv.training.engine import DeepSpeedEngine
from raydiv.training.step import Stepper
from raydiv.utils.errors import UserError

MIB, GIB = 2**20, 2**30

TOTALS = {
    "tiiuae/falcon-11B": 11.10e9,
    "meta-llama/Llama-3.2-1B": 1.24e9,
    "meta-llama/Meta-Llama-3-8B": 8.03e9,
    "mistralai/Mistral-7B-v0.1": 7.24e9,
    "Qwen/Qwen2.5-1.5B": 1.54e9,
    "Qwen/Qwen2.5-7B": 7.62e9,
    "google/gemma-2-2b": 2.61e9,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134.5e6,
}
"""Parameters as their authors publish them, to three digits."""


def recipe_of(model: str | Path, *overrides: str, **sections: Any) -> Recipe:
    tree = {"model": {"id": str(model)}, "loss": {"type": "kldo", "skew": 0.5}, "optim": {"steps": 1}} | sections
    return load_recipe(tree, overrides)


REWARDED = "loss.position={{kind: rewarded, model: {}, temperature: 1}}"
FALCON = ("engine.precision=bf16", "cluster.use_gpu=true", "cluster.worker_memory_gb=80")


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    architecture = architecture_of(recipe_of(name))
    assert architecture.parameters == pytest.approx(TOTALS[name], rel=0.005)
    assert architecture.trainable == architecture.parameters == sum(architecture.tensors)


def test_every_shipped_architecture_has_a_published_total() -> None:
    assert {path.stem.replace("--", "/") for path in SHIPPED.glob("*.json")} == TOTALS.keys()


def test_falcon_has_the_published_shape() -> None:
    found = architecture_of(recipe_of("tiiuae/falcon-11B", *FALCON))
    assert (found.layers, found.hidden, found.vocabulary, found.tied) == (60, 4096, 65_024, False)
    assert found.head == 65_024 * 4096


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_is_multiplied_with_all_weights_but_those_that_are_looked_up(tmp_path: Path, tied: bool) -> None:
    """By torch's own count of the operations of matrix products in a forward."""
    directory = make_model(tmp_path / "model", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(directory)
    norms = sum(weight.numel() for weight in model.parameters() if weight.ndim == 1)
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(1, 10, dtype=torch.long))
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert architecture_of(recipe_of(directory)).multiplied_parameters - norms == counted / 2 / 10


def test_adapters_are_what_is_trained_and_the_base_is_what_4_bits_hold() -> None:
    found = architecture_of(recipe_of("tiiuae/falcon-11B", "model.lora.r=8", *FALCON))
    # query_key_value 4096 -> 6144, dense 4096 -> 4096, and 4096 <-> 16384, in 60 layers
    assert found.trainable == 60 * 8 * (4096 + 6144 + 2 * 4096 + 2 * (4096 + 16_384))
    assert found.linear == 60 * 4096 * (6144 + 4096 + 2 * 16_384)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-1.5B-Instruct", "google/gemma-2-2b-it"])
def test_instruct_versions_are_as_large(name: str) -> None:
    assert config_of(recipe_of(name).model).hidden_size in (1536, 2304)


def test_unknown_model_without_a_hub_lists_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/nothing: .*config\.json.* one of .*tiiuae/falcon-11B"):
        config_of(recipe_of("nobody/nothing").model)


def test_attention_that_a_model_lacks_is_refused_with_what_it_has() -> None:
    with pytest.raises(UserError, match=r"model\.attention=auto"):
        architecture_of(recipe_of("google/gemma-2-2b", "model.attention=sdpa"))


def test_a_directory_with_its_config_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((SHIPPED / "Qwen--Qwen2.5-1.5B.json").read_text())
    assert architecture_of(recipe_of(tmp_path)).parameters == pytest.approx(1.54e9, rel=0.005)


# what is counted on fake tensors, against the same on real ones


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("batch.packing=never",),
        ("model.lora.r=4",),
        ("engine.activation_checkpointing=true",),
        ("engine.precision=bf16", "engine.zero_stage=1"),
        ("model.attention=eager",),
    ],
    ids=" ".join,
)
def test_activations_of_all_layers_follow_from_those_of_few(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    path = random_model(tmp_path / "model", layers=7, hidden=64, vocabulary=2000)
    recipe = recipe_of(path, "batch.max_length=96", "batch.max_prompt_length=8", *overrides)
    found = architecture_of(recipe)
    policy = build_policy(path, recipe.model, DTYPES[recipe.engine.precision]).train()
    if recipe.engine.activation_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    # one example is shorter, so that padding has its mask
    inputs = collate([([3], [4] * 95)] * 10 + [([3], [4] * 94)], found.packing)
    head = LogProbHead(policy)
    peaks = []
    for weigh in (None, lambda _, logps: torch.ones_like(logps)):
        head.set_targets(inputs.rows, inputs.columns, inputs.targets, weigh)
        with LiveBytes(policy.parameters()) as live:
            policy(**inputs.forward_kwargs()).logits.sum().backward()
        peaks.append(live.peak)
    tokens = inputs.ids.numel()
    logits = buffer_bytes(2000, len(inputs.targets), deferred=recipe.model.lora is None)
    assert logits == head.allocated_bytes
    assert logits + found.activations.at(tokens) + found.beside.at(tokens) == pytest.approx(max(peaks), rel=0.03)


def random_model(path: Path, layers: int, hidden: int, vocabulary: int, tied: bool = True) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=round(2.75 * hidden / 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64 if hidden > 64 else 2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


# what is predicted of a worker, against what its process takes


@dataclass(frozen=True)
class Measured:
    """A step on real workers: of which model, how, and how much of it."""

    model: str
    stage: Stage
    ranks: int = 2
    tokens: int | str = "auto"
    examples: int = 8
    overrides: tuple[str, ...] = field(default=())

    def recipe(self, path: Path) -> Recipe:
        return recipe_of(
            path,
            f"engine.zero_stage={self.stage}",
            f"batch.tokens_per_microbatch={self.tokens}",
            f"batch.max_length={LENGTH}",
            "batch.max_prompt_length=8",
            f"cluster.num_workers={self.ranks}",
            "checkpoint.every=null",  # none is written in so few steps
            *self.overrides,
        )


LENGTH = 128
STEPS, STEPS_OF_ZERO_3 = 2, 4
"""Updates: AdamW's moments are there after the first, and ZeRO-3 knows what it may keep after the third."""

MODELS = {
    "wide": {"layers": 6, "hidden": 512, "vocabulary": 32_768, "tied": False},  # 50 M, two thirds of it embeddings
    "deep": {"layers": 18, "hidden": 384, "vocabulary": 8192},  # 28 M
}

LORA = ("model.lora.r=16",)
MEASURED = [Measured("wide", 3)]
MEASURED_LONG = [
    Measured("deep", 0, ranks=1),
    Measured("deep", 2, overrides=LORA),
    Measured("wide", 0),
    Measured("wide", 1),
    Measured("deep", 2),
    Measured("wide", 2, tokens=256),
    Measured("deep", 3, ranks=1),
    Measured("wide", 1, overrides=("engine.precision=bf16",)),
    Measured("wide", 2, overrides=("engine.precision=bf16",)),
    Measured("wide", 3, overrides=("engine.offload_optimizer=cpu",)),
    Measured("deep", 2, overrides=("engine.activation_checkpointing=true",)),
]


def status(key: str) -> int:
    """A size of this process, in bytes, from the kernel's account of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def steps_of(recipe: Recipe, path: Path, examples: int) -> None:
    """A few real updates of the real engine and step."""
    rows = np.random.default_rng(0).integers(3, 290, (examples, LENGTH))
    ids = [(row[:4], row[4:]) for row in rows]
    own = TokenizedExamples.from_ids(ids, [n % 2 == 0 for n in range(examples)], [-1] * examples)
    nothing = TokenizedExamples.from_ids([], [], [])
    policy = lambda: build_policy(path, recipe.model, DTYPES[recipe.engine.precision])  # noqa: E731
    engine: Any = DeepSpeedEngine(recipe, policy)
    tokens = recipe.batch.tokens_per_microbatch
    stepper = Stepper(
        engine,
        LogProbHead(engine.model),
        recipe.loss.terms,
        100_000 if tokens == "auto" else tokens,
        "mask",
    )
    for number in range(STEPS_OF_ZERO_3 if recipe.engine.zero_stage == 3 else STEPS):
        step = make_step(number, own, nothing, torch.full((examples,), -50.0), torch.zeros(0))
        stepper.step(on_this_rank(step, stepper.layout), 1e-4)
    engine.close()


def peak_of(case: Measured, path: str, small: str) -> tuple[int, int]:
    """Peak bytes of this process over what it had before the engine was built, and altogether; runs on every rank.

    A model of no size comes first: what libraries load and make at their first step is the runtime's, not the model's.
    """
    steps_of(case.recipe(Path(small)), Path(small), examples=2)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    steps_of(case.recipe(Path(path)), Path(path), case.examples)
    peak = status("VmHWM")
    return peak - before, peak


def predicted(case: Measured, path: Path) -> int:
    """Bytes that the model of memory says, the runtime included."""
    recipe = case.recipe(path)
    share = -(-case.examples // case.ranks) * LENGTH
    tokens = share if case.tokens == "auto" else min(share, int(case.tokens))
    return memory_of(architecture_of(recipe), recipe, case.ranks, case.stage, tokens, accumulates=tokens < share).total


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: random_model(folder / name, **sizes) for name, sizes in MODELS.items()}
    return made | {"small": make_model(folder / "small")}


def require_memory_as_predicted(case: Measured, path: Path, small: Path, folder: Path, within: float) -> None:
    wanted = predicted(case, path)
    found = run_on_ranks(peak_of, case.ranks, folder / "ranks", case, str(path), str(small), fresh=True)
    own, total = max(own for own, _ in found), max(total for _, total in found)
    print(f"{case}: predicted {(wanted - RUNTIME) / MIB:.0f} MiB, measured {own / MIB:.0f}")
    print(f"with the runtime: predicted {wanted / MIB:.0f}, measured {total / MIB:.0f}")
    assert wanted - RUNTIME == pytest.approx(own, rel=within)
    assert wanted == pytest.approx(total, rel=within)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*MEASURED, *(pytest.param(case, marks=pytest.mark.long) for case in MEASURED_LONG)], ids=str
)
def test_memory_is_as_predicted(
    case: Measured, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is held: glibc otherwise keeps what was freed, and up to as much again shows as resident."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    require_memory_as_predicted(case, models[case.model], models["small"], tmp_path, within=0.15)


@pytest.mark.long
@pytest.mark.parametrize("case", [Measured("", 0, ranks=1), Measured("", 3, overrides=LORA)], ids=str)
def test_memory_of_smollm2_is_as_predicted(
    case: Measured, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydiv.model.resolve import model_directory

    path = model_directory("bundled:smollm2-135m-instruct")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    require_memory_as_predicted(case, path, models["small"], tmp_path, within=0.15)


# the formulas, where the published ones say what must come out


def test_states_are_18_bytes_a_parameter_over_the_workers_under_zero_3() -> None:
    recipe = recipe_of("tiiuae/falcon-11B", *FALCON)
    architecture = architecture_of(recipe)
    found = memory_of(architecture, recipe, 4, 3, tokens=1024)
    live = 2 * (1e9 + max(architecture.tensors))  # what ZeRO-3 has gathered at a time
    states = found.weights + found.gradients + found.optimizer
    assert states - live == pytest.approx(18 * 11.1e9 / 4, rel=0.01)


def test_a_frozen_base_has_neither_gradients_nor_moments_and_4_bits_shrink_it() -> None:
    recipe = recipe_of("tiiuae/falcon-11B", "model.lora.r=8", *FALCON)
    quantized = recipe_of("tiiuae/falcon-11B", "model.lora.r=8", "model.quantization=nf4", *FALCON)
    architecture = architecture_of(recipe)
    whole, small = (memory_of(architecture, one, 1, 1, tokens=1024) for one in (recipe, quantized))
    assert whole.weights == pytest.approx(2 * 11.1e9, rel=0.01)
    assert small.weights == pytest.approx(0.5625 * 10.57e9 + 2 * 0.56e9, rel=0.01)
    assert whole.optimizer == small.optimizer == 12 * architecture.trainable


def test_4_bit_weights_are_as_small_as_they_are_taken_to_be(tmp_path: Path) -> None:
    source = ModelSource(make_model(tmp_path / "model", hidden=64), quantization="nf4")
    held = elements = 0
    for module in source.load().modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            held, elements = held + module.weight.nbytes + state.absmax.nbytes, elements + state.shape.numel()
    assert held == NF4 * elements > 0


def test_offload_moves_states_to_the_node_and_a_cpu_gains_nothing_by_it() -> None:
    for cluster, gains in (("cluster.use_gpu=true", True), ("cluster.use_gpu=false", False)):
        plain, offloaded = (
            recipe_of("Qwen/Qwen2.5-1.5B", "engine.zero_stage=3", f"engine.offload_optimizer={place}", cluster)
            for place in ("none", "cpu")
        )
        architecture = architecture_of(plain)
        here, there = (memory_of(architecture, one, 2, 3, tokens=1024) for one in (plain, offloaded))
        assert there.host >= 12 * 1.54e9 / 2
        assert (there.total < here.total) == gains


# what is settled


SHARE = WorkerBudget(longest=1024, packed=8192, padded=8192)


@pytest.fixture(scope="module")
def falcon() -> Recipe:
    return recipe_of("tiiuae/falcon-11B", *FALCON, "cluster.num_workers=8", "engine.activation_checkpointing=true")


@pytest.mark.parametrize(("precision", "stages"), [("bf16", {2, 3}), ("fp32", {0, 1, 2, 3})])
def test_stage_rises_and_micro_batch_shrinks_with_the_memory(falcon: Recipe, precision: str, stages: set[int]) -> None:
    falcon = load_recipe(falcon.model_dump(mode="json", by_alias=True), [f"engine.precision={precision}"])
    architecture = architecture_of(falcon)
    fits = [best_layout(architecture, falcon, SHARE, size * GIB) for size in range(400, 30, -3)]
    held = [one for one in fits if one.fits]
    assert [one.fits for one in fits] == [True] * len(held) + [False] * (len(fits) - len(held))
    assert {one.stage for one in held} == stages
    for more, less in pairwise(held):
        assert less.stage >= more.stage
        if less.stage == more.stage:
            assert less.tokens <= more.tokens
    assert held[0].tokens == SHARE.packed
    assert min(one.tokens for one in held) >= SHARE.longest


def test_lowest_stage_that_fits_is_taken_and_said(falcon: Recipe) -> None:
    architecture = architecture_of(falcon)
    for size in (45, 60, 80, 120):
        found = with_layout(falcon, choose_layout(architecture, falcon, SHARE, size * GIB))
        at_each = {one.stage: one for one in stage_layouts(architecture, falcon, SHARE, size * GIB)}
        assert list(at_each) == [1, 2, 3]  # bf16 has no stage 0
        # stage 1 in bf16 keeps all gradients in fp32 on every worker
        assert found.engine.zero_stage == min(stage for stage, one in at_each.items() if one.fits and stage != 1)
        assert found.batch.tokens_per_microbatch == at_each[found.engine.zero_stage].tokens
        assert with_layout(found, choose_layout(architecture, found, SHARE, size * GIB)) == found


METHODS = {
    "every weight, checkpointing": ("full", ()),
    "the same, `engine.offload_optimizer=cpu` (226 GiB of host memory)": ("full", ("engine.offload_optimizer=cpu",)),
    "LoRA": ("lora", ()),
    "LoRA on 4 bits": ("lora", ("model.quantization=nf4",)),
}
RECIPES = {"Llama 3 8B": "llama-3-8b", "Falcon 11B": "falcon-11b"}


def forecasts_of_the_readme() -> Iterator[tuple[Recipe, list[str]]]:
    """The recipe of each row of the table of forecasts, and the row's cells behind the GPUs."""
    table = (ROOT / "configs" / "README.md").read_text().partition("| model and method |")[2].partition("\n\n")[0]
    model = method = ""
    for line in table.splitlines()[2:]:
        name, gpus, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name:
            known = next((one for one in RECIPES if name.startswith(one)), None)
            model, method = (known, name.removeprefix(f"{known}, ")) if known else (model, name)
        number, memory = gpus.split(" x ")
        kind, overrides = METHODS[method]
        layout = (f"cluster.num_workers={number}", f"cluster.worker_memory_gb={memory}", "data.train=s3://none/none")
        yield load_recipe(ROOT / "configs" / f"{RECIPES[model]}-{kind}.yaml", [*overrides, *layout]), cells


def test_forecasts_of_the_readme_are_those_of_plan() -> None:
    rows = list(forecasts_of_the_readme())
    assert {recipe.model.id for recipe, _ in rows} == {"meta-llama/Meta-Llama-3-8B-Instruct", "tiiuae/falcon-11B"}
    for recipe, cells in rows:
        facts = plan(recipe).facts
        stage = facts["layout"]["zero_stage"]
        found = next(one for one in facts["stages"] if one["stage"] == stage)
        written = [str(stage), f"{found['total'] / GIB:.0f}", f"{found['tokens_per_microbatch']:,}"]
        assert facts["layout"]["fits"]
        assert written == cells, (recipe.model.id, recipe.cluster.num_workers, recipe.cluster.worker_memory_gb)
        if recipe.engine.offload_optimizer == "cpu":
            assert f"{found['memory']['host'] / GIB:.0f}" == "226"


def test_what_the_recipe_fixes_is_kept_and_checked(falcon: Recipe) -> None:
    fixed = load_recipe(falcon.model_dump(mode="json", by_alias=True), ["engine.zero_stage=3"])
    fixed = load_recipe(fixed.model_dump(mode="json", by_alias=True), ["batch.tokens_per_microbatch=2048"])
    architecture = architecture_of(fixed)
    found = with_layout(fixed, choose_layout(architecture, fixed, SHARE, 300 * GIB))
    assert (found.engine.zero_stage, found.batch.tokens_per_microbatch) == (3, 2048)
    with pytest.raises(UserError, match="ZeRO stage 3 with micro-batches of 2048 tokens"):
        choose_layout(architecture, fixed, SHARE, 20 * GIB)


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (("engine.precision=fp32",), [0, 1, 2, 3]),
        (("engine.precision=bf16",), [1, 2, 3]),
        (("engine.offload_parameters=cpu",), [3]),
        (("engine.offload_optimizer=cpu",), [1, 2, 3]),
        (("model.lora.r=4", "model.quantization=nf4"), [0, 1, 2]),
    ],
    ids=str,
)
def test_stages_are_those_that_the_recipe_allows(overrides: tuple[str, ...], stages: list[int]) -> None:
    recipe = recipe_of("Qwen/Qwen2.5-1.5B", *overrides)
    assert [one.stage for one in stage_layouts(architecture_of(recipe), recipe, SHARE, 80 * GIB)] == stages


@pytest.mark.parametrize("size", [12, 24, 40])
def test_where_nothing_fits_every_change_that_is_named_does(falcon: Recipe, size: int) -> None:
    two = load_recipe(falcon.model_dump(mode="json", by_alias=True), ["cluster.num_workers=2"])
    named = fitting_changes(two, SHARE, size * GIB)
    assert named
    with pytest.raises(UserError, match=r"ZeRO stage \d .*cluster\.worker_memory_gb") as refused:
        choose_layout(architecture_of(two), two, SHARE, size * GIB)
    for change in named:
        assert change in str(refused.value)
        changes, _, figure = change.rpartition(" (")
        other = load_recipe(two.model_dump(mode="json", by_alias=True), changes.split())
        # more workers have smaller shares, shorter examples shorter ones; by no more than these
        assert best_layout(architecture_of(other), other, SHARE, size * GIB).fits
        assert float(figure.removesuffix(" GiB)")) <= (1 - MARGIN) * size + 0.05


def test_nothing_is_named_where_nothing_would_do() -> None:
    recipe = recipe_of("tiiuae/falcon-11B", *FALCON)
    assert fitting_changes(recipe, SHARE, GIB) == []
    with pytest.raises(UserError, match="no change"):
        choose_layout(architecture_of(recipe), recipe, SHARE, GIB)


def test_largest_share_is_that_of_the_layout_packed_and_padded() -> None:
    lengths = np.array([10, 90, 20, 80, 30, 70, 40, 60])
    units = np.stack([np.arange(8), np.full(8, -1)], axis=1)
    share = largest_budget(EpochPlan(units, 8, 0, "x"), 3, lengths, workers=2)
    assert (share.longest, share.packed) == (90, 200)
    assert share.padded >= 90 * 2  # the rank of the long ones has at least two of them, padded
    alone = largest_budget(EpochPlan(units, 8, 0, "x"), 3, lengths, workers=1)
    assert (alone.packed, alone.padded) == (400, 8 * 90)


# the plan


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks another machine fails the test."""
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("the plan asked another machine")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def planned(
    tiny_model: Path, tmp_path: Path, write_jsonl: Callable[..., Path], offline: None
) -> Callable[..., Forecast]:
    train = write_jsonl(*[{"prompt": f"What is {n}?", "chosen": "A number.", "rejected": "No."} for n in range(10)])

    def make(*overrides: str, **options: Any) -> Forecast:
        tree: dict[str, Any] = {"data": {"train": str(train)}, "batch": {"examples": 4}, "optim": {"epochs": 3}}
        return plan(recipe_of(tiny_model, f"output_dir={tmp_path}", *overrides, **tree), **options)

    return make


def test_examples_tokens_and_steps_are_those_of_the_data(planned: Callable[..., Forecast], tiny_model: Path) -> None:
    from raydiv.model.chat import Chat

    facts = planned().facts
    chat = Chat(tiny_model)
    prompts = [len(chat.prompt_ids(f"What is {n}?")) for n in range(10)]
    responses = [len(chat.tokenize_one("x", text, 50, 100).response) for text in ("A number.", "No.")]
    tokens = 2 * sum(prompts) + 10 * sum(responses)
    assert facts["data"] | {"examples": 20, "tokens": tokens, "how": "sampled"} == facts["data"]
    assert facts["steps"] == 3 * 5
    assert facts["tokens"] == 3 * tokens
    assert facts["seconds"] is None


def test_time_is_from_a_given_speed_else_from_the_last_run_alike(
    planned: Callable[..., Forecast], tmp_path: Path
) -> None:
    from raydiv.runs.directory import RunDirectory

    given = planned(tokens_per_second=100.0).facts
    assert given["seconds"] == given["tokens"] / 100
    facts = planned().facts
    recipe = recipe_of(facts["model"]["id"], f"output_dir={tmp_path}", "name=before")
    run = RunDirectory.of(recipe)
    run.create(recipe, {})
    for number, speed in enumerate([1.0, 40.0, 50.0, 60.0]):
        run.metrics.append({"step": number, "tokens_per_second": speed})
    found = planned()
    assert found.facts["speed"] == {"tokens_per_second": 45.0, "from": f"measured in {run.path}"}
    assert any(str(run.path) in note for note in found.notes())
    assert planned("engine.activation_checkpointing=true").facts["speed"] is None


def test_prepared_data_is_counted(tiny_model: Path, own_cache: None, write_jsonl: Callable[..., Path]) -> None:
    from helpers.stored import indices_of, opened
    from raydiv.model.chat import Chat

    rows = [{"prompt": f"Question {n}", "response": "y " * n + "z", "aligned": n % 2 == 0} for n in range(20)]
    sets = {"separation": {"prompts": "bundled:anchors"}, "evaluate": {"prompts": "bundled:heldout"}}
    recipe = recipe_of(tiny_model, data={"train": str(write_jsonl(*rows))}, optim={"epochs": 1}, **sets)
    chat = Chat(tiny_model)
    before = measure_data(recipe, chat)
    indices_of(opened(recipe, chat)[0], recipe, chat)
    after = measure_data(recipe, chat)
    assert (before.basis, after.basis) == ("sampled", "counted")
    assert (before.examples, before.tokens) == (after.examples, after.tokens) == (20, before.tokens)


def test_a_mixture_counts_as_often_as_its_weights_and_held_out_prompts_do_not(
    tiny_model: Path, write_jsonl: Callable[..., Path]
) -> None:
    row = {"prompt": "x", "response": "y", "aligned": True}
    first, second = (write_jsonl(*[row] * count, name=f"{count}.jsonl") for count in (40, 10))
    train = [str(first), {"path": str(second), "weight": 3}]
    recipe = recipe_of(tiny_model, data={"train": train, "eval": 0.5}, optim={"epochs": 1}, batch={"examples": 5})
    from raydiv.model.chat import Chat

    amounts = measure_data(recipe, Chat(tiny_model))
    assert (amounts.examples, amounts.steps) == (35, 7)


def test_what_is_not_here_is_named_and_assumed(planned: Callable[..., Forecast]) -> None:
    found = planned("data.train=hf://org/name", "data.eval=nowhere.jsonl", "cluster.num_workers=2")
    assert found.facts["unchecked"] == ["hf://org/name", "nowhere.jsonl"]
    assert planned(REWARDED.format("org/dpo")).facts["unchecked"] == ["org/dpo"]
    assert found.facts["data"] | {"how": "assumed", "examples": None, "packed": 2 * 1024} == found.facts["data"]
    assert found.facts["steps"] is None
    assert any("nowhere.jsonl" in note for note in found.notes())


def test_rewards_of_a_local_model_are_checked(tmp_path: Path, planned: Callable[..., Forecast]) -> None:
    make_model(tmp_path / "other")
    assert planned(REWARDED.format(tmp_path / "other")).facts["unchecked"] == []
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"loss.position.model: .*safetensors is missing"):
        planned(REWARDED.format(tmp_path / "other"))


def test_without_a_tokenizer_examples_are_as_long_as_they_may_be(
    tmp_path: Path, planned: Callable[..., Forecast]
) -> None:
    facts = planned("model.id=Qwen/Qwen2.5-1.5B", "cluster.worker_memory_gb=80").facts
    assert facts["unchecked"] == ["the tokenizer of Qwen/Qwen2.5-1.5B"]
    assert facts["data"] | {"how": "assumed", "examples": 20, "tokens": 20 * 1024} == facts["data"]


def test_bad_rows_are_refused_as_training_would(
    planned: Callable[..., Forecast], tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    good = {"prompt": "x", "chosen": "y", "rejected": "z"}
    rows = write_jsonl(good, good | {"chosen": ""}, good, name="bad.jsonl")
    with pytest.raises(UserError, match=r"bad.jsonl:2: chosen must be non-empty"):
        planned(f"data.train={rows}")
    assert planned(f"data.train={rows}", "data.on_bad_row=quarantine").facts["data"]["examples"] == 4


def test_sizes_on_disk(planned: Callable[..., Forecast]) -> None:
    whole, adapters = planned().facts, planned("model.lora.r=4").facts
    assert whole["sizes"] == {
        "checkpoint": 12 * whole["model"]["parameters"],
        "model": 4 * whole["model"]["parameters"],
    }
    assert adapters["sizes"]["checkpoint"] == 12 * adapters["model"]["trainable"]
    assert adapters["sizes"]["model"] == 4 * adapters["model"]["trainable"]


def test_combinations_that_the_tests_never_run_are_named(planned: Callable[..., Forecast]) -> None:
    assert planned("cluster.worker_memory_gb=8").facts["untested"] == []
    recipe = recipe_of("m", "engine.zero_stage=3", "engine.offload_optimizer=nvme", "engine.nvme_path=/x")
    assert list(untested_combinations(recipe)) == [
        "engine.precision fp32, engine.offload_optimizer nvme",
        "engine.zero_stage 3, engine.offload_optimizer nvme, engine.offload_parameters none",
    ]
    assert list(untested_combinations(recipe_of("m", "engine.zero_stage=0", "cluster.num_workers=64"))) == [
        "cluster.num_workers 64"
    ]


@pytest.mark.parametrize("keys", TESTED, ids=" ".join)
def test_tested_combinations_are_of_keys_that_there_are(keys: tuple[str, ...]) -> None:
    schema = Recipe.model_json_schema()["$defs"]
    for key in keys:
        section, name = key.split(".")
        assert name in schema[f"{section.title()}Config"]["properties"]
    assert all(len(values) == len(keys) for values in TESTED[keys])


def test_a_gpu_that_is_not_here_must_be_described(planned: Callable[..., Forecast]) -> None:
    with pytest.raises(UserError, match=r"cluster\.worker_memory_gb: missing"):
        planned("cluster.use_gpu=true")
    assert planned("cluster.use_gpu=true", memory_gb=24).facts["workers"]["memory"] == 24 * GIB


CODE = """
import sys
from raydiv.cli import main
status = main(sys.argv[1:])
print(sorted({"ray", "deepspeed", "mlflow"} & sys.modules.keys()))
sys.exit(status)
"""


def run_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, "plan", *arguments], capture_output=True, text=True, check=False)


def test_the_command_starts_nothing_and_says_whether_it_fits(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: bundled:compliance-refusal}}\nloss: {{type: kldo}}\n"
        "optim: {epochs: 1}\n"
    )
    done = run_plan(str(path))
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "[]", "")
    assert "fits: engine.zero_stage 0" in done.stdout
    small = run_plan(str(path), "cluster.worker_memory_gb=0.3")
    assert small.returncode == 2
    assert "does not fit" in small.stdout
    assert "Traceback" not in small.stderr


@pytest.fixture
def bad_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {id: m, layers: 3}\nloss: {type: kldo}\noptim: {steps: 1}\n")
    return path


def test_a_bad_recipe_is_refused(bad_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(bad_recipe)]) == 2
    assert "model.layers: unknown key" in capsys.readouterr().err


def shipped_recipes() -> Iterator[Path]:
    root = ROOT / "configs"
    yield from (path for path in root.glob("*.yaml") if "falcon" in path.name or "llama" in path.name)


@pytest.mark.parametrize("path", sorted(shipped_recipes()), ids=lambda path: path.stem)
def test_shipped_recipes_of_large_models_fit_what_they_are_written_for(
    path: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layout"]["fits"]
    assert facts["stages"][-1]["total"] < 80 * GIB


def test_falcon_needs_more_workers_where_all_of_it_is_trained(falcon: Recipe) -> None:
    totals = {
        workers: best_layout(architecture_of(falcon), replaced(falcon, workers), SHARE, 80 * GIB)
        for workers in (2, 4, 8)
    }
    assert [one.fits for one in totals.values()] == [False, True, True]
    assert totals[8].stage <= totals[4].stage


def replaced(recipe: Recipe, workers: int) -> Recipe:
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"num_workers": workers})})


def test_workers_on_cpus_keep_memory_where_the_model_says_so() -> None:
    """The overhead of memory that is kept is counted where it is: with partitions, on CPUs."""
    recipe = recipe_of("Qwen/Qwen2.5-1.5B")
    for stage in STAGES:
        at_stage = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"zero_stage": stage})})
        assert (KEEP_FREED_MEMORY.keys() <= training_environment(at_stage, roomy=True).keys()) == (stage > 0)
        assert not KEEP_FREED_MEMORY.keys() & training_environment(at_stage, roomy=False).keys()
