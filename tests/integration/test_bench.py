"""``raydiv bench``: the yardstick does the same work, and every figure is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.stored import indices_of, opened, recipe_of
from raydiv.commands.bench import gpu, training
from raydiv.commands.bench import tokenize_baseline as plain
from raydiv.commands.bench.answers import answers_table, bench_answers
from raydiv.commands.bench.data import LATE_STEP, bench_data
from raydiv.commands.bench.harness import Workload, without_evaluation
from raydiv.commands.bench.small import bench_small, small_table
from raydiv.commands.bench.start import bench_start, start_table
from raydiv.commands.bench.training import Timing, bench_training, summarise, training_notes, training_table
from raydiv.commands.bench.trl_baseline import (
    PAIRED_LOSSES,
    UNPAIRED_LOSSES,
    per_device_sizes,
    trl_loss_options,
    trl_rows,
)
from raydiv.commands.plan.architecture import config_of
from raydiv.config import Recipe, load_recipe
from raydiv.config.evaluate import EvaluateConfig
from raydiv.config.source import Source
from raydiv.data.bundled import w1
from raydiv.data.readers import read_examples
from raydiv.data.splits import examples_of
from raydiv.data.tokens import mismatched
from raydiv.losses import OBJECTIVES
from raydiv.model import w1 as w1_model
from raydiv.model.chat import Chat
from raydiv.model.load import ModelSource
from raydiv.model.resolve import fingerprint, model_directory
from raydiv.runs.progress import ProgressDisplay
from raydiv.training.dataloader import ExampleSet
from raydiv.utils.errors import UserError

ROWS = [
    {"prompt": f"Question {n}?", "chosen": f"Answer {n}, " * (n % 7 + 1), "rejected": "No." * (n % 3 + 1)}
    for n in range(2500)
]


BENCH = Path(__file__).parents[2] / "configs" / "bench"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def short_recipe(model: Path, data: Path, output: Path, loss: dict[str, Any]) -> Recipe:
    return load_recipe(
        {
            "model": {"id": str(model)},
            "data": {"train": str(data)},
            "loss": loss,
            "optim": {"epochs": 1},
            "output_dir": str(output),
        }
    )


def test_plain_script_makes_the_same_tokens(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    chat = Chat(tiny_model)
    recipe = recipe_of(tiny_model, str(data), batch={"max_prompt_length": 20, "max_length": 40})
    (index,) = indices_of(opened(recipe, chat)[0], recipe, chat)
    found = plain.main(str(data), str(tiny_model), str(tmp_path / "plain"), 1, 20, 40)
    assert found["examples"] == len(index) == 2 * len(ROWS)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "plain").iterdir())]
    assert len(tables) == 3
    for column in ("prompt_ids", "response_ids"):
        ours = [ids.tolist() for ids in index.shards.read(column, index.columns["row"])]
        assert ours == [ids for table in tables for ids in table[column].to_pylist()]


@pytest.mark.long
@pytest.mark.slow
def test_bench_of_data_has_every_figure(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    recipe = short_recipe(tiny_model, data, tmp_path, {"type": "kldo", "skew": 0.5})
    found = bench_data(recipe, [1000], repeats=1, steps=3, display=ProgressDisplay(quiet=True))
    (one,) = found["prepare"]
    assert one["examples"] == 1000
    assert one["ratio"] == pytest.approx(one["examples_per_second"] / one["plain_examples_per_second"])
    assert one["peak_bytes"]["driver"] > 0
    assert found["stream"]["steps_per_epoch"] == -(-1000 // 16)
    assert {"seconds_to_step_10", f"seconds_to_step_{LATE_STEP}"} <= found["stream"].keys()
    assert found["train"]["steps"] == 2
    assert 0 <= found["train"]["data_share"] < 1
    assert not list(tmp_path.glob("run*"))


@pytest.mark.long
@pytest.mark.slow
def test_bench_of_a_start_has_every_figure(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    recipe = short_recipe(tiny_model, data, tmp_path, {"type": "dpo"})
    found = bench_start(recipe, repeats=1, display=ProgressDisplay(quiet=True))
    (turn,) = found["turns"]
    assert found["over_seconds"] == pytest.approx(turn["raydiv"] - turn["hello"])
    assert min(turn["raydiv"], turn["hello"]) > 1
    assert 0 < turn["first_step"] < turn["raydiv"]
    assert [row[1] for row in start_table(found)[1]] == [
        f"{found[f'{name}_seconds']:.1f}" for name in ("raydiv", "hello", "over", "first_step")
    ]
    assert not list(tmp_path.glob("run*"))


@pytest.mark.long
@pytest.mark.slow
def test_bench_of_small_commands_has_every_figure(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    recipe = short_recipe(tiny_model, data, tmp_path, {"type": "dpo"})
    found = bench_small(recipe, rows=50, repeats=1, display=ProgressDisplay(quiet=True))
    for name in ("data_check", "plan"):
        assert found[f"{name}_seconds"] > 0.5
        assert found[f"{name}_imports_seconds"] > 0.5
    assert [row[1] for row in small_table(found)[1]] == [
        f"{found[f'{name}_seconds']:.1f}" for name in ("data_check", "plan")
    ]


@pytest.mark.long
@pytest.mark.slow
def test_bench_of_answers_has_every_figure(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    recipe = short_recipe(tiny_model, data, tmp_path, {"type": "dpo"})
    with pytest.raises(UserError, match=r"evaluate\.prompts"):
        bench_answers(recipe)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "How {n}?", "harmful": true}}\n' for n in range(9)))
    evaluate = EvaluateConfig(prompts=[Source(path=str(prompts))], max_new_tokens=5)
    found = bench_answers(recipe.model_copy(update={"evaluate": evaluate}), rows=12, repeats=1)
    for name in ("raydiv", "plain", "continuous"):
        assert found[name] > 0
    assert found["raydiv_to_plain"] == pytest.approx(found["raydiv"] / found["plain"])
    assert len(answers_table(found)[1]) == 3


def test_bench_of_a_gpu_trains_each_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As far as a CPU can show: shapes, weights, tokenizer and recipes; the runs are those of ``bench_training``."""
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu, "config_of", tiny_shape)
    recipes, against = [], []

    def report(recipe: Recipe, others: Any, **options: Any) -> dict[str, Any]:
        recipes.append(recipe)
        against.append(others)
        ratios = {"tokens_per_second": {"loop": {"median": 0.9}, "trl_best": {"median": 1.5}} if others else {}}
        return {"raydiv": {"tokens_per_second": 12345, "peak_bytes": 10**10}, "ratios": ratios, "mfu": 0.45}

    monkeypatch.setattr(gpu, "bench_training", report)
    recipe = load_recipe(BENCH / "w1.yaml", ["cluster.use_gpu=true", "cluster.num_workers=1"])
    rows = gpu.gpu_table(gpu.bench_gpu(recipe, display=ProgressDisplay(quiet=True)))[1]
    assert [row[1:] for row in rows] == [
        ("12,345", "0.90", "1.50", "10.0", "45%"),
        ("12,345", "0.90", "1.50", "10.0", "45%"),
        ("12,345", "", "", "10.0", "45%"),
    ]
    assert against == [("loop", "trl"), ("loop", "trl"), ()]
    own, llama, falcon = recipes
    assert (own.model.id, own.model.lora) == (w1_model.W1, None)
    assert llama.model.lora is None
    assert falcon.model.lora is not None
    for shaped, kind in ((llama, "llama"), (falcon, "falcon")):
        assert shaped.engine.precision == "bf16"
        source = ModelSource(Path(shaped.model.id))
        assert source.config().model_type == kind
        assert source.stored_dtype() == "bfloat16"
        assert source.chat().text_ids("w7") == [7]
    assert gpu.bench_gpu(recipe, display=ProgressDisplay(quiet=True)).keys() == gpu.WORKLOADS.keys()
    for overrides, message in [
        ((), "needs cluster"),
        (("cluster.use_gpu=true", "model.lora={r: 8}"), "without model.lora"),
        (("cluster.use_gpu=true", "data.train=bundled:preference"), "needs model.id and data.train bundled:w1"),
    ]:
        with pytest.raises(UserError, match=message):
            gpu.bench_gpu(load_recipe(BENCH / "w1.yaml", overrides))


def tiny_shape(model: Any) -> Any:
    """The real config with few and small layers."""
    config = config_of(model)
    config.update({"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 65_024})
    of_kind = {
        "falcon": {"num_kv_heads": 2, "ffn_hidden_size": 64},
        "llama": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8},
    }
    config.update(of_kind[config.model_type])
    return config


def test_workload_has_the_lengths_of_compliance_refusal_data() -> None:
    examples = read_examples(Source(path=w1_model.W1))
    words = [len(str(one.response).split()) for one in examples]
    answers = [n for one, n in zip(examples, words, strict=True) if one.aligned != one.harmful]
    refusals = [n for one, n in zip(examples, words, strict=True) if one.aligned == one.harmful]
    assert len(answers) == len(refusals) == w1.PAIRS
    assert {one.harmful for one in examples} == {True, False}
    assert (min(refusals), max(refusals)) == (8, 15)
    assert max(answers) == 400
    assert np.median(answers) == pytest.approx(130, rel=0.1)
    assert np.log(answers).std() == pytest.approx(0.6, rel=0.15)
    prompts = [str(one.prompt).split() for one in examples]
    assert {len(prompt) for prompt in prompts} == set(range(6, 21))
    assert all(word.startswith("w") for prompt in prompts for word in prompt)


@pytest.fixture
def small_w1(monkeypatch: pytest.MonkeyPatch) -> None:
    """W1 with a model that is made in no time."""
    small = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    monkeypatch.setattr(w1, "MODEL", w1.MODEL | small)
    monkeypatch.setattr(w1_model, "MODEL", w1.MODEL)


@pytest.mark.usefixtures("small_w1")
def test_workload_is_the_same_wherever_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cache in ("a", "b"):
        monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / cache))
        directory = model_directory(w1_model.W1)
        assert directory == model_directory(w1_model.W1)
        assert str(directory).startswith(str(tmp_path / cache))
        found.append((fingerprint(directory), Chat(directory).fingerprint, w1.w1_pairs().read_text()))
    assert found[0] == found[1]


@pytest.mark.usefixtures("small_w1", "own_cache")
def test_a_word_of_the_workload_is_a_token() -> None:
    chat = Chat(model_directory(w1_model.W1))
    example = chat.tokenize_one("w6 w7 w299", "w8 w9", 128, 512)
    assert example.prompt == [4, 6, 7, 299, 5]
    assert example.response == [8, 9, 2]
    assert chat.tokenizer.convert_ids_to_tokens([4, 2, 5]) == ["<|user|>", "</s>", "<|assistant|>"]


def work_on(model: Path, data: Path, loss: str, steps: int = 3, **changes: Any) -> Workload:
    """The first steps of a run of 8 examples a step, prepared without Ray; the reference log-probs are zeros."""
    recipe = recipe_of(
        model, str(data), loss, batch={"examples": 8, "max_length": 60, "max_prompt_length": 30}, **changes
    )
    chat = Chat(model)
    examples = examples_of(indices_of(opened(recipe, chat)[0], recipe, chat))
    zeros = np.zeros(len(examples), np.float32)
    others = mismatched(examples, 60) if recipe.loss.mismatched_terms else None
    given = ExampleSet(examples, zeros, others, None if others is None else zeros)
    return Workload.from_examples(without_evaluation(recipe, steps), model, given, steps, threads=1)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_work_is_what_a_run_would_train_on(tiny_model: Path, data: Path, loss: str) -> None:
    work = work_on(tiny_model, data, loss)
    steps = work.settings["steps"]
    assert work.sizes == [8, 8, 8]
    assert len(set(work.tokens)) == 3
    for step in steps:
        pairs = [one["pair"] for one in step["examples"]]
        assert [one["aligned"] for one in step["examples"]] == [True, False] * 4
        assert pairs == [0, 0, 1, 1, 2, 2, 3, 3]
        assert len(step["mismatched"]) == (8 if loss == "kto" else 0)
    json.dumps(work.settings)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_rows_for_trl_spell_the_same_tokens_in_the_same_order(tiny_model: Path, data: Path, loss: str) -> None:
    work, tokenizer = work_on(tiny_model, data, loss), Chat(tiny_model).tokenizer
    rows = trl_rows(work.settings["steps"], tokenizer, paired=loss in PAIRED_LOSSES)
    sides = ("chosen", "rejected") if loss in PAIRED_LOSSES else ("completion",)
    made = [tokenizer(row["prompt"] + row[side] + "</s>").input_ids for row in rows for side in sides]
    examples = [one for step in work.settings["steps"] for one in step["examples"]]
    wanted = [one["prompt_ids"] + one["response_ids"] for one in examples]
    assert [ids[:60] for ids in made] == wanted
    if loss not in PAIRED_LOSSES:
        assert [row["label"] for row in rows] == [one["aligned"] for one in examples]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_trl_takes_the_same_examples_in_the_same_order(tiny_model: Path, data: Path, loss: str) -> None:
    work = work_on(tiny_model, data, loss)
    answer = work.script("trl_baseline", per_device=2)
    assert answer["tokens"] == work.tokens
    assert len(answer["seconds"]) == len(work.tokens)
    assert answer["peak_bytes"] > 0


def test_a_script_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"nothing: status 1: .*No module named raydiv.commands.bench.nothing"):
        Workload({}, {}).script("nothing")


def test_every_loss_of_trl_s_trainers_is_compared_or_refused() -> None:
    assert not PAIRED_LOSSES.keys() & UNPAIRED_LOSSES.keys()
    for name in OBJECTIVES:
        loss = {"type": name, "beta": 0.1, "mix": {}}
        if name in PAIRED_LOSSES or name in UNPAIRED_LOSSES:
            assert trl_loss_options(loss)["loss_type"]
        else:
            with pytest.raises(UserError, match=f"--against trl: {name}: .*dpo"):
                trl_loss_options(loss)


def test_a_timed_recipe_can_be_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(
        {"model": {"id": str(tmp_path)}, "loss": {"type": "dpo"}, "optim": {"steps": 9}, "data": {"eval": 0.5}},
        ["evaluate.every=2", "evaluate.depth_every=3"],
    )
    timed = without_evaluation(recipe, 4)
    assert load_recipe(timed.model_dump(mode="json", by_alias=True)) == timed


def test_a_mixture_is_trl_s_too() -> None:
    sft = {"sft": {"weight": 0.2}}
    assert trl_loss_options({"type": "rdpo", "beta": 0.3, "label_smoothing": 0.1, "mix": sft}) == {
        "loss_type": ["robust", "sft"],
        "loss_weights": [1.0, 0.2],
        "beta": 0.3,
        "label_smoothing": 0.1,
    }
    with pytest.raises(UserError, match="--against trl: kto: "):
        trl_loss_options({"type": "kto", "beta": 0.3, "mix": sft})


def test_baselines_that_count_every_token_once_are_not_compared_with_weighted_ones() -> None:
    position = {"kind": "decay", "rate": 0.9}
    recipe = load_recipe(
        {
            "model": {"id": "m"},
            "data": {"train": "d"},
            "loss": {"type": "dpo", "position": position},
            "optim": {"steps": 1},
        }
    )
    with pytest.raises(UserError, match=r"^--against loop: does not support loss.position \(now decay\)"):
        bench_training(recipe, against=("loop",))


def steps_of(*sizes: int, pair: int = 0) -> list[dict[str, Any]]:
    return [{"examples": [{"pair": pair}] * size} for size in sizes]


def test_sizes_of_trl_divide_the_step() -> None:
    dpo, kto = {"type": "dpo"}, {"type": "kto"}
    assert per_device_sizes(dpo, steps_of(16, 16)) == [1, 2, 4, 8]
    assert per_device_sizes(dpo, steps_of(12)) == [1, 2]
    assert per_device_sizes(kto, steps_of(16, pair=-1)) == [2, 4, 8]
    with pytest.raises(UserError, match="16, 4 examples"):
        per_device_sizes(dpo, steps_of(16, 4))
    with pytest.raises(UserError, match="unpaired"):
        per_device_sizes({"type": "sft"}, steps_of(16, pair=-1))


def turn(raydiv: float, loop: float, **trl: float) -> dict[str, Timing]:
    """A turn in which every step took so many seconds, in so many bytes times 100."""
    return {
        name: Timing([seconds, 2 * seconds], [10, 20], 100 * seconds, [0.5, 1.5] if name == "raydiv" else [])
        for name, seconds in {"raydiv": raydiv, "loop": loop, **trl}.items()
    }


# the machine was twice as slow in the second turn, and loop had a bad third one
TURNS = [
    turn(1, 0.5, trl_1=4, trl_8=6),
    turn(2, 1, trl_1=8, trl_8=10),
    turn(1, 2, trl_1=5, trl_8=6),
]


def test_ratios_are_medians_of_ratios_within_a_turn() -> None:
    found = summarise(TURNS, [10, 20])
    assert found["raydiv"] == {
        "step_seconds": 1.5,
        "tokens_per_second": 10,
        "peak_bytes": 100,
        "tokens_seen": 1,
        "data_seconds": 1,
    }
    assert found["trl"]["best"] == "1"
    assert found["trl"]["1"]["tokens_per_second"] == 2
    rates = found["ratios"]["tokens_per_second"]
    assert rates["loop"] == {"median": 0.5, "turns": [0.5, 0.5, 2]}
    assert rates["trl_1"] == rates["trl_best"] == {"median": 4, "turns": [4, 4, 5]}
    assert rates["trl_8"] == {"median": 6, "turns": [6, 5, 6]}
    assert found["ratios"]["peak_bytes"]["trl_best"] == {"median": 0.25, "turns": [0.25, 0.25, 0.2]}


def test_warm_up_counts_for_nothing() -> None:
    assert Timing([9, 1, 1], [5, 6, 7], 1, [8, 0, 0], [7, 2, 3]).after(1) == Timing([1, 1], [6, 7], 1, [0, 0], [2, 3])


def test_table_and_notes_say_everything() -> None:
    found = summarise(TURNS, [10, 20]) | {"repeats": 3, "steps": 2}
    found["raydiv"]["layout"] = {"zero_stage": 0}
    found["trl"]["8"]["tokens_seen"] = 1.02
    found["mfu"] = 0.405
    found["failed"] = {"trl_4": "rival: status -9"}
    header, rows = training_table(found)
    assert [row[0] for row in rows] == ["raydiv", "plain loop", "TRL at 1", "TRL at 8"]
    assert {len(row) for row in rows} == {len(header)}
    assert rows[0][-2:] == ("", "")
    assert rows[2][-2:] == ("4.00", "0.25")
    turns, *notes = training_notes(found)
    assert "medians of 3 turns of 2 steps" in turns
    assert notes == [
        "raydiv's layout: zero_stage 0",
        "TRL at 8: trained on 1.0200 of these tokens",
        "model FLOPs utilisation: 40.5% of what a large matrix product reaches on this GPU",
        "trl_4: rival: status -9",
    ]


def test_a_size_of_trl_may_fail_and_nothing_else() -> None:
    def fail() -> Timing:
        raise RuntimeError("killed")

    def run() -> Timing:
        return Timing([1], [1], 1)

    quiet = ProgressDisplay(quiet=True)
    turns, failed = training._take_turns({"raydiv": run, "trl_1": run, "trl_8": fail}, 2, quiet)
    assert [list(one) for one in turns] == [["raydiv", "trl_1"]] * 2
    assert failed == {"trl_8": "killed"}
    for contestants in ({"raydiv": fail}, {"raydiv": run, "loop": fail}, {"raydiv": run, "trl_8": fail}):
        with pytest.raises(RuntimeError, match="killed"):
            training._take_turns(contestants, 1, quiet)


@pytest.fixture
def unprepared(tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe that must be refused before anything of it is prepared."""

    def prepare(*_: object) -> None:
        raise AssertionError("prepared before the mistake was found")

    monkeypatch.setattr(training, "make_workload", prepare)
    return recipe_of(tiny_model, str(data), "dpo")


def test_without_trl_it_says_what_to_install(unprepared: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'trl>=1.16'"):
        bench_training(unprepared, ["loop", "trl"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cluster": {"num_workers": 2, "use_gpu": True}}, "cluster.num_workers"),
        ({"model": {"lora": {}, "quantization": "nf4"}}, "model.quantization"),
        ({"loss": {"type": "kldo"}}, "kldo: not a loss"),
    ],
)
def test_what_cannot_be_compared_is_refused(unprepared: Recipe, changes: dict[str, Any], said: str) -> None:
    tree = unprepared.model_dump(mode="json", by_alias=True, exclude={"loss"} & changes.keys())
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    with pytest.raises(UserError, match=said):
        bench_training(load_recipe(tree), ["trl"])


@pytest.mark.parametrize("numbers", [{"steps": 0}, {"warmup": -1}, {"repeats": 0}])
def test_numbers_that_time_nothing_are_refused(unprepared: Recipe, numbers: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(numbers))}"):
        bench_training(unprepared, **numbers)


@pytest.mark.long
@pytest.mark.slow
def test_bench_of_training_has_every_figure(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, str(data), "dpo", batch={"examples": 2, "max_length": 60, "max_prompt_length": 30})
    recipe.output_dir = str(tmp_path)
    found = bench_training(recipe, ["loop", "trl"], steps=2, warmup=1, repeats=1, display=ProgressDisplay(quiet=True))
    assert list(found["trl"]) == ["best", "1"]
    for one in (found["raydiv"], found["loop"], found["trl"]["1"]):
        assert one["tokens_seen"] == 1
        assert one["step_seconds"] > 0
        assert one["peak_bytes"] > 0
    assert found["raydiv"]["data_seconds"] < found["raydiv"]["step_seconds"]
    assert found["ratios"]["tokens_per_second"].keys() == {"loop", "trl_1", "trl_best"}
    assert not list(tmp_path.glob("run*"))
