"""The recipe: where its values come from, what it refuses, and in which words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.sources import ROOT
from raydiv.config import Recipe, load_recipe, save_recipe
from raydiv.config.loss import TYPES
from raydiv.data.bundled import QUICKSTART
from raydiv.losses import OBJECTIVES
from raydiv.utils.errors import UserError
from raydiv.utils.secrets import has_token

SHIPPED = [*sorted((ROOT / "configs").rglob("*.yaml")), *sorted((ROOT / "raydiv" / "data" / "bundled").glob("*.yaml"))]
SMALLEST = "model: {id: m}\nloss: {type: kldo}\noptim: {steps: 3}\n"


def tree(**sections: Any) -> dict[str, Any]:
    """The smallest recipe, with sections replaced."""
    return {"model": {"id": "m"}, "loss": {"type": "kldo"}, "optim": {"steps": 3}} | sections


def refusal(source: str | Path | Mapping[str, Any], *overrides: str) -> str:
    """The message of the UserError, which is one line."""
    with pytest.raises(UserError) as caught:
        load_recipe(source, overrides)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_mapping_and_yaml_give_the_same_recipe(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path / "r.yaml", SMALLEST)) == load_recipe(tree())


def test_path_may_be_text(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", SMALLEST)
    assert load_recipe(str(path)).optim.steps == 3


def test_source_mapping_is_left_alone() -> None:
    source = tree(loss={"type": "kldo", "skew": 0.5})
    load_recipe(source, ["loss.type=dpo", "model.lora.r=4"])
    assert source == tree(loss={"type": "kldo", "skew": 0.5})


def test_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", SMALLEST.replace("steps: 3", "steps: 3, lr: 1e-3"))
    assert load_recipe(path).optim.lr == 1e-3
    assert load_recipe(path, ["optim.lr=2e-4"]).optim.lr == 2e-4


def test_extends_is_relative_to_the_file_that_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "base.yaml", SMALLEST)
    child = write(tmp_path / "deep" / "er" / "child.yaml", "extends: ../../base.yaml\nseed: 7\n")
    monkeypatch.chdir(tmp_path / "deep")
    recipe = load_recipe(child.relative_to(tmp_path / "deep"))
    assert (recipe.seed, recipe.model.id) == (7, "m")


def test_extends_a_bundled_recipe_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = write(tmp_path / "child.yaml", "extends: bundled:quickstart\nname: child\noptim: {steps: 5}\n")
    monkeypatch.chdir("/")
    recipe, bundled = load_recipe(child), load_recipe(QUICKSTART)
    assert recipe == bundled.model_copy(
        update={"name": "child", "optim": bundled.optim.model_copy(update={"steps": 5})}
    )
    wrong = write(tmp_path / "wrong.yaml", "extends: bundled:quikstart\n")
    assert "wrong.yaml: extends: no bundled recipe 'quikstart' (did you mean quickstart?)" in refusal(wrong)
    for name in ("../quickstart", "anchors"):
        assert "no bundled recipe" in refusal(write(wrong, f"extends: bundled:{name}\n"))


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", SMALLEST + "batch: {examples: 2, max_length: 64, max_prompt_length: 8}\nseed: 1\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\nbatch: {examples: 4, max_length: 128}\nseed: 2\n")
    last = write(tmp_path / "c.yaml", "extends: b.yaml\nbatch: {examples: 8}\n")
    batch = load_recipe(last, ["batch.examples=16", "batch.examples=32"]).batch
    assert (batch.examples, batch.max_length, batch.max_prompt_length) == (32, 128, 8)
    assert load_recipe(last).seed == 2
    assert load_recipe(last).batch.examples == 8


def test_override_makes_missing_sections() -> None:
    recipe = load_recipe(tree(), ["model.lora.r=4", "loss.mix.sft.weight=2", "cluster.env.A=b", "data.eval=0.25"])
    assert recipe.model.lora is not None
    assert recipe.model.lora.r == 4
    assert [(term.name, term.weight) for term in recipe.loss.terms] == [("kldo", 1.0), ("sft", 2.0)]
    assert (recipe.cluster.env, recipe.data.eval) == ({"A": "b"}, 0.25)


def test_override_with_null_removes_a_section() -> None:
    assert load_recipe(tree(model={"id": "m", "lora": {"r": 2}}), ["model.lora=null"]).model.lora is None


@pytest.mark.parametrize("chain", [["a.yaml"], ["a.yaml", "b.yaml"], ["a.yaml", "b.yaml", "c.yaml"]])
def test_extends_cycle_is_refused(tmp_path: Path, chain: list[str]) -> None:
    for name, parent in zip(chain, chain[1:] + chain[:1], strict=True):
        write(tmp_path / name, f"extends: {parent}\n")
    message = refusal(tmp_path / "a.yaml")
    assert "extends itself" in message
    assert all(name in message for name in chain)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not YAML"),
        ("- a\n- b\n", "mapping"),
        ("", "mapping"),
        ("just words", "mapping"),
    ],
)
def test_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "r.yaml", text)
    message = refusal(path)
    assert str(path) in message
    assert words in message


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "no.yaml") in refusal(tmp_path / "no.yaml")
    child = write(tmp_path / "child.yaml", "extends: gone.yaml\n")
    assert "gone.yaml" in refusal(child)


def test_directory_and_binary_file_are_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(tmp_path)
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00name: r")
    assert "r.yaml" in refusal(tmp_path / "r.yaml")


@pytest.mark.parametrize("override", ["seed", "=1", "a..b=1", ".seed=1", "optim.lr={", "optim.=1"])
def test_malformed_override_is_quoted(override: str) -> None:
    assert override.partition("=")[0] in refusal(tree(), override)


def test_all_errors_come_at_once_with_path_and_nearest_key() -> None:
    message = refusal(
        tree(modle={"id": "x"}),
        "batch.exmples=3",
        "optim.lr=fast",
        "batch.examples=0",
        "model.lora.alhpa=3",
        "loss.bta=1",
        "loss.mix.stf.weight=1",
    )
    parts = message.split("; ")
    assert len(parts) == 7
    starts = {part.partition(":")[0]: part for part in parts}
    for path, near in [
        ("modle", "model"),
        ("batch.exmples", "examples"),
        ("model.lora.alhpa", "alpha"),
        ("loss.bta", "beta"),
        ("loss.mix.stf", "sft"),
    ]:
        assert near in starts[path]
        assert "did you mean" in starts[path]
    assert "'fast'" in starts["optim.lr"]
    assert "0" in starts["batch.examples"]


def test_errors_name_the_recipe_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", SMALLEST + "sed: 1\n")
    message = refusal(path)
    assert message.startswith(f"{path}: sed: ")
    assert "did you mean seed?" in message


@pytest.mark.parametrize(
    ("loss", "option", "owner"),
    [
        ("kldo", "label_smoothing", "dpo"),
        ("dpo", "skew", "kldo"),
        ("dpo", "lambda_aligned", "kto"),
        ("kldo", "gamma", "simpo"),
        ("sft", "beta", "dpo"),
    ],
)
def test_option_of_another_loss_names_its_owner(loss: str, option: str, owner: str) -> None:
    message = refusal(tree(loss={"type": loss, option: 0.1}))
    assert message.startswith(f"loss.{option}: ")
    assert loss in message
    assert owner in message


def test_mixed_in_loss_is_checked_too() -> None:
    message = refusal(tree(), "loss.mix.dpo.wight=1", "loss.mix.sft.beta=0.1", "loss.mix.bco.weight=0")
    for part in ("loss.mix.dpo.wight: unknown key (did you mean weight?)", "loss.mix.dpo.weight: missing"):
        assert part in message
    assert "loss.mix.sft.beta: unknown key of the loss sft (an option of aot" in message
    assert "loss.mix.bco.weight: input should be greater than 0" in message


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"type": "kldo", "ema_rate": 0.2}, ("loss: ema_rate", "estimator: ema or lagged")),
        ({"type": "bco", "delta": "fixed", "delta_rate": 0.2}, ("loss: delta_rate", "delta: running")),
        ({"type": "fdo", "alpha": 0.3}, ("loss: alpha", "divergence: alpha")),
        ({"type": "kldo", "mix": {"fdo": {"weight": 1, "alpha": 0.3}}}, ("loss.mix.fdo: alpha", "divergence: alpha")),
    ],
)
def test_option_that_means_nothing_beside_the_others_is_refused(loss: dict[str, Any], words: tuple[str, str]) -> None:
    message = refusal(tree(loss=loss))
    assert all(word in message for word in words)


def test_null_takes_an_option_back() -> None:
    recipe = load_recipe(
        tree(loss={"type": "kldo", "estimator": "ema", "ema_rate": 0.2, "mix": {"sft": {"weight": 1}}})
    )
    changes = ["loss.estimator=batch", "loss.ema_rate=null", "loss.mix.sft=null"]
    changed = load_recipe(recipe.model_dump(by_alias=True), changes)
    assert changed.loss.terms[0].options["ema_rate"] == 0.1
    assert len(changed.loss.terms) == 1


def test_resolved_mix_lists_its_terms_alone() -> None:
    loss = load_recipe(tree(loss={"type": "dpo", "mix": {"log-ratio-l2": {"weight": 0.2}}})).loss
    assert [term.name for term in loss.terms] == ["dpo", "log-ratio-l2"]
    assert loss.model_dump(by_alias=True)["mix"].keys() == {"log-ratio-l2"}


@pytest.mark.parametrize(
    ("loss", "bounded"),
    [
        ({"type": "kldo"}, False),
        ({"type": "kldo", "mix": {"sft": {"weight": 1}}}, False),
        ({"type": "kldo", "skew": 0.1}, True),
        ({"type": "kldo", "mix": {"log-ratio-l2": {"weight": 0.001}}}, True),
        ({"type": "fdo"}, True),
        ({"type": "fdo", "divergence": "reverse-kl"}, False),
        ({"type": "rdpo"}, False),
        ({"type": "rdpo", "label_smoothing": 0}, True),
        ({"type": "exo"}, True),
    ],
    ids=str,
)
def test_what_holds_an_objective(loss: dict[str, Any], bounded: bool) -> None:
    assert load_recipe(tree(loss=loss)).loss.is_bounded == bounded


def test_penalty_is_refused_as_the_objective() -> None:
    message = refusal(tree(loss={"type": "log-ratio-l2"}))
    assert message.startswith("loss.type: ")
    assert "loss.mix" in message


@pytest.mark.parametrize("loss", ["sft", "simpo"])
def test_target_margin_needs_rewards_that_count_from_a_reference(loss: str) -> None:
    message = refusal(tree(loss={"type": loss}), "optim.target_margin=3")
    assert message.startswith("optim.target_margin does not apply")
    assert "kldo" in message


def test_mixed_in_options_name_their_owners_too() -> None:
    assert "unknown key of the loss dpo (an option of kldo)" in refusal(tree(), "loss.mix.dpo={weight: 1, skew: 0.5}")
    assert "did you mean log-ratio-l2?" in refusal(tree(), "loss.mix.log_ratio_l2={weight: 1, bta: 1}")


def test_reference_of_a_loss_without_one_names_those_with_one() -> None:
    message = refusal(tree(loss={"type": "simpo"}, model={"id": "m", "reference": "adapter-off", "lora": {"r": 4}}))
    assert "simpo has no reference" in message
    assert "kldo" in message
    assert "cpo" not in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.type=dppo", "did you mean dpo?"),
        ("loss.type=kldoo", "did you mean kldo?"),
        ("loss.type=zzzzz", ", ".join(TYPES)),
        ("loss.type=", "loss.type: "),
        ("loss.type=[kldo]", "loss.type: "),
        ("loss=kldo", "loss: "),
    ],
)
def test_unknown_loss_is_refused_with_what_exists(override: str, words: str) -> None:
    assert words in refusal(tree(), override)


def test_missing_loss_type_lists_the_losses() -> None:
    message = refusal(tree(loss={"beta": 0.1}))
    assert message.startswith("loss.type: missing")
    assert all(name in message for name in TYPES)


@pytest.mark.parametrize("section", ["model", "loss", "optim"])
def test_missing_section_is_named(section: str) -> None:
    rest = tree()
    del rest[section]
    assert refusal(rest).startswith(section)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("optim.lr=fast", "'fast'"),
        ("batch.examples=1.5", "1.5"),
        ("batch.examples=[4]", "[4]"),
        ("optim.steps=true", "'true'"),
        ("model.lora.r=x", "'x'"),
        ("model.id=3", "3"),
        ("data.train.weight=x", "'x'"),
        ("data.train.columns=3", "3"),
        ("data.on_bad_row=skip", "'skip'"),
        ("cluster.use_gpu=3", "3"),
        ("cluster.env.A=1", "1"),
        ("loss.beta=x", "'x'"),
        ("loss.estimator=mean", "'mean'"),
        ("engine.zero_stage=4", "4"),
        ("engine.precision=fp8", "'fp8'"),
    ],
)
def test_wrong_type_says_path_and_value(override: str, found: str) -> None:
    message = refusal(tree(data={"train": {"path": "a.jsonl"}}), override)
    path = override.partition("=")[0].replace("data.train.", "data.train.0.")
    assert message.startswith(f"{path}: ")
    assert message.endswith(f"found {found}")


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=0",
        "optim.lr=-1",
        "optim.lr=.nan",
        "optim.lr=.inf",
        "optim.steps=0",
        "optim.warmup=-1",
        "optim.weight_decay=-0.1",
        "optim.clip=0",
        "batch.examples=0",
        "batch.tokens_per_microbatch=0",
        "cluster.num_workers=0",
        "cluster.timeout_s=0",
        "data.eval=0",
        "data.eval=1",
        "data.eval=1.5",
        "evaluate.max_new_tokens=0",
        "model.lora.r=0",
        "model.lora.dropout=1",
        "loss.beta=0",
        "loss.beta=.inf",
        "loss.skew=1",
        "loss.skew=-0.1",
        "loss.ema_rate=0",
        "loss.mix.sft.weight=0",
        "loss.mix.sft.weight=.inf",
        "seed=-1",
        "name=../escape",
        "name=a/b",
    ],
)
def test_value_out_of_range_is_refused_at_its_key(override: str) -> None:
    assert refusal(tree(), override).startswith(f"{override.partition('=')[0]}: ")


@pytest.mark.parametrize("optim", [{}, {"steps": 3, "epochs": 1}, {"lr": 0.1}])
def test_exactly_one_duration(optim: dict[str, Any]) -> None:
    message = refusal(tree(optim=optim))
    assert message.startswith("optim: ")
    assert "epochs" in message
    assert "steps" in message


def test_other_duration_needs_the_first_set_to_null() -> None:
    assert load_recipe(tree(), ["optim.epochs=2", "optim.steps=null"]).optim.epochs == 2


def test_evaluation_during_training_needs_held_out_data() -> None:
    message = refusal(tree(), "evaluate.every=5")
    assert "evaluate.every" in message
    assert "data.eval" in message
    assert load_recipe(tree(), ["evaluate.every=5", "data.eval=0.1"]).evaluate.every == 5


def test_adapter_off_needs_lora() -> None:
    message = refusal(tree(), "model.reference=adapter-off")
    assert message.startswith("model")
    assert "lora" in message
    assert load_recipe(tree(), ["model.reference=adapter-off", "model.lora.r=2"]).model.reference == "adapter-off"


def test_prompt_length_must_leave_room() -> None:
    message = refusal(tree(), "batch.max_length=64", "batch.max_prompt_length=64")
    assert message.startswith("batch")
    assert "64" in message


@pytest.mark.parametrize("loss", [name for name, objective in OBJECTIVES.items() if objective.data == "paired"])
def test_pairs_need_room_for_two(loss: str) -> None:
    assert "batch.examples" in refusal(tree(loss={"type": loss}), "batch.examples=1")


def test_reference_that_no_term_reads_is_refused() -> None:
    message = refusal(tree(loss={"type": "sft"}), "model.reference=adapter-off", "model.lora.r=2")
    assert "model.reference" in message
    assert "sft" in message


def test_another_loss_drops_the_former_options_and_keeps_beta_and_mix(tmp_path: Path) -> None:
    before = {"type": "kldo", "beta": 0.7, "skew": 0.5, "estimator": "ema", "mix": {"sft": {"weight": 2.0}}}
    recipe = load_recipe(tree(loss=before), ["loss.type=dpo", "loss.label_smoothing=0.1"])
    main, mixed = recipe.loss.terms
    assert (main.name, main.options) == ("dpo", {"beta": 0.7, "label_smoothing": 0.1})
    assert (mixed.name, mixed.weight) == ("sft", 2.0)

    write(tmp_path / "base.yaml", "model: {id: m}\nloss: {type: kldo, beta: 0.7, skew: 0.5}\noptim: {steps: 3}\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\nloss: {type: bco}\n")
    assert load_recipe(child).loss.terms[0].options == OBJECTIVES["bco"].defaults | {"beta": 0.7}


def test_same_loss_again_keeps_its_options() -> None:
    recipe = load_recipe(tree(loss={"type": "kldo", "skew": 0.5}), ["loss.type=kldo"])
    assert recipe.loss.terms[0].options["skew"] == 0.5


@pytest.mark.parametrize("overrides", [["loss.type=dpo", "loss.skew=0.2"], ["loss.skew=0.2", "loss.type=dpo"]])
def test_overridden_option_of_the_former_loss_is_refused_in_any_order(overrides: list[str]) -> None:
    assert "loss.skew" in refusal(tree(), *overrides)


PLACE, SECTION = "a.jsonl", {"path": "hf://org/name", "split": "test", "weight": 0.5}


@pytest.mark.parametrize(
    ("written", "paths"),
    [
        (PLACE, ["a.jsonl"]),
        (SECTION, ["hf://org/name"]),
        ([PLACE], ["a.jsonl"]),
        ([PLACE, SECTION, "b"], ["a.jsonl", "hf://org/name", "b"]),
    ],
    ids=["place", "section", "list", "list of both"],
)
def test_sources_are_a_place_a_section_or_a_list(written: Any, paths: list[str]) -> None:
    data = load_recipe(tree(data={"train": written})).data
    assert [source.path for source in data.train] == paths
    assert data.eval is None
    assert data.eval_sources == []
    for source in data.train:
        hub = source.path == SECTION["path"]
        assert (source.split, source.weight) == (("test", 0.5) if hub else (None, 1.0))
        assert (source.config, source.revision, source.columns, source.constants) == (None, None, None, {})


@pytest.mark.parametrize(
    ("written", "paths"),
    [("b.jsonl", ["b.jsonl"]), ({"path": "b", "split": "x"}, ["b"]), (["b", {"path": "c"}], ["b", "c"])],
    ids=["place", "section", "list"],
)
def test_held_out_sources_are_a_place_a_section_or_a_list(written: Any, paths: list[str]) -> None:
    data = load_recipe(tree(data={"train": PLACE, "eval": written})).data
    assert [source.path for source in data.eval_sources] == paths
    assert data.eval == data.eval_sources


def test_held_out_share_is_no_source() -> None:
    data = load_recipe(tree(data={"eval": 0.25})).data
    assert (data.eval, data.eval_sources) == (0.25, [])
    assert [source.path for source in data.train] == ["bundled:compliance-refusal"]


def test_overrides_replace_sources_or_change_a_section() -> None:
    one, several = tree(data={"train": SECTION}), tree(data={"train": [PLACE, SECTION]})
    changed = load_recipe(one, ["data.train.weight=2"]).data.train
    assert [(source.path, source.split, source.weight) for source in changed] == [("hf://org/name", "test", 2.0)]
    for source in (one, several):
        assert [s.path for s in load_recipe(source, ["data.train=[x, y]"]).data.train] == ["x", "y"]
        assert [s.weight for s in load_recipe(source, ["data.train={path: x, weight: 3}"]).data.train] == [3.0]


def test_a_source_names_its_own_columns_or_takes_everyones() -> None:
    written = ["a", {"path": "b", "columns": {"prompt": "ask"}}, {"path": "c", "columns": {}}]
    data = load_recipe(tree(data={"train": written, "columns": {"prompt": "question"}})).data
    assert [data.columns_of(source) for source in data.train] == [{"prompt": "question"}, {"prompt": "ask"}, {}]


def test_truth_values_are_constants_of_a_source() -> None:
    constants = {"aligned": True, "harmful": False, "prompt": "true"}
    (source,) = load_recipe(tree(data={"train": {"path": "a", "constants": constants}})).data.train
    assert source.constants == constants
    assert [type(value) for value in source.constants.values()] == [bool, bool, str]


@pytest.mark.parametrize("key", ["train", "eval"])
@pytest.mark.parametrize(("unknown", "near"), [("wieght", "weight"), ("splitt", "split"), ("pth", "path")])
def test_unknown_key_of_a_source_names_the_nearest(key: str, unknown: str, near: str) -> None:
    for written, place in (({"path": "b", unknown: "x"}, 0), (["a", {"path": "b", unknown: "x"}], 1)):
        message = refusal(tree(data={"train": "a", key: written}))
        assert message == f"data.{key}.{place}.{unknown}: unknown key (did you mean {near}?)"


@pytest.mark.parametrize("written", [3, None, [3], [["a"]], ["a", None]], ids=str)
def test_what_is_no_source_is_refused(written: Any) -> None:
    message = refusal(tree(data={"train": written}))
    assert message.startswith("data.train")
    assert "a source is a path" in message


def test_sources_that_are_none_or_nowhere_are_refused() -> None:
    assert refusal(tree(data={"train": []})).startswith("data.train: ")
    assert refusal(tree(data={"train": PLACE, "eval": []})).startswith("data.eval: ")
    assert refusal(tree(data={"train": PLACE, "eval": [1]})).startswith("data.eval.0: a source is a path")
    assert refusal(tree(data={"train": {"weight": 2}})) == "data.train.0.path: missing"


@pytest.mark.parametrize("key", ["config", "revision"])
@pytest.mark.parametrize("path", ["a.jsonl", "data/*.parquet", "s3://bucket/name", "bundled:preference"])
def test_hub_options_do_not_apply_elsewhere(key: str, path: str) -> None:
    for data, place in (
        ({"train": {"path": path, key: "x"}}, "train.0"),
        ({"train": PLACE, "eval": [PLACE, {"path": path, key: "x"}]}, "eval.1"),
    ):
        message = refusal(tree(data=data))
        assert message.startswith(f"data.{place}: {key} does not apply to {path}")
        assert "hf://org/name" in message
    (source,) = load_recipe(tree(data={"train": {"path": "hf://org/name", key: "x"}})).data.train
    assert getattr(source, key) == "x"


@pytest.mark.parametrize("weight", [0, -1, 1e-7, ".inf"])
def test_weight_of_a_source_is_above_nothing(weight: Any) -> None:
    override = f"data.train=[a, {{path: b, weight: {weight}}}]"
    assert refusal(tree(), override).startswith("data.train.1.weight: ")


def test_held_out_sources_have_no_weight() -> None:
    message = refusal(tree(data={"train": PLACE, "eval": ["b", {"path": "c", "weight": 2}]}))
    assert "data: eval.1.weight: not supported" in message
    assert load_recipe(tree(data={"train": PLACE, "eval": {"path": "c", "weight": 1}})).data.eval_sources[0].weight == 1


@pytest.mark.parametrize(
    "data",
    [
        {"train": PLACE},
        {"train": SECTION, "eval": 0.125},
        {"train": [PLACE, SECTION], "eval": ["b", {"path": "hf://c", "config": "x", "revision": "y"}]},
        {"train": {"path": "a", "columns": {}, "constants": {"aligned": True, "source": "yes"}}, "columns": {"a": "b"}},
        {"train": {"path": "1e3", "columns": {"prompt": "true"}}, "eval": "0.5", "on_bad_row": "quarantine"},
    ],
    ids=str,
)
def test_sources_load_back_exactly(data: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(tree(data=data))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.model_dump() == recipe.model_dump()
    assert load_recipe(recipe.model_dump(by_alias=True)) == recipe


def test_saved_sources_say_no_more_than_they_must(tmp_path: Path) -> None:
    save_recipe(load_recipe(tree(data={"train": [{"path": "a", "weight": 1}, SECTION]})), tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["train"] == ["a", SECTION]


RICH = {
    "name": "rich-1.0",
    "seed": 3,
    "model": {"id": "m", "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "reference": "adapter-off"},
    "data": {
        "train": ["a.jsonl", {"path": "hf://b", "revision": "main", "constants": {"harmful": False}, "weight": 0.5}],
        "eval": 0.125,
        "on_bad_row": "quarantine",
        "template": "{% for m in messages %}\n{{ m['content'] }}\n{% endfor %}'\"é",
    },
    "loss": {"type": "kldo", "skew": 0.1, "estimator": "ema", "mix": {"sft": {"weight": 1 / 3}, "dpo": {"weight": 2}}},
    "optim": {"lr": 1e-7, "betas": [0.8, 0.95], "clip": None, "epochs": 1.5},
    "cluster": {"num_workers": 2, "env": {"NCCL_DEBUG": "INFO", "N": "1", "B": "yes"}},
    "separation": {"prompts": None},
    "evaluate": {"every": 2},
}


@pytest.mark.parametrize(
    "source", [*(tree(loss={"type": name}) for name in TYPES), RICH], ids=[*TYPES, "every section"]
)
def test_resolved_recipe_loads_exactly(tmp_path: Path, source: dict[str, Any]) -> None:
    recipe = load_recipe(source)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.model_dump() == recipe.model_dump()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_recipe_parses_and_loads_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_shipped_recipes_are_found() -> None:
    assert {"configs", "bundled"} <= {path.parent.name for path in SHIPPED}


def test_schema_names_every_objective_and_option() -> None:
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    losses = schema["properties"]["loss"]["discriminator"]["mapping"]
    assert set(losses) == set(TYPES)
    for name, reference in losses.items():
        properties = definitions[reference.rpartition("/")[2]]["properties"]
        assert set(properties) == {"type", "mix", "position", *OBJECTIVES[name].parameters}
        assert {key: properties[key]["default"] for key in OBJECTIVES[name].defaults} == OBJECTIVES[name].defaults
    assert set(definitions["Mix"]["properties"]) == set(OBJECTIVES)


@pytest.mark.parametrize("key", ["train", "eval"])
@pytest.mark.parametrize("written", [PLACE, SECTION, [PLACE, SECTION]], ids=str)
def test_schema_takes_sources_as_they_are_written(key: str, written: Any) -> None:
    import jsonschema

    sources = written if isinstance(written, list) else [written]
    if key == "eval":  # where a weight means nothing
        sources = [{k: v for k, v in one.items() if k != "weight"} if isinstance(one, dict) else one for one in sources]
    recipe = tree(data={"train": "a", key: sources if isinstance(written, list) else sources[0]})
    load_recipe(recipe)
    jsonschema.validate(recipe, Recipe.model_json_schema())


def test_schema_names_every_section_and_requires_what_has_no_default() -> None:
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert {"model", "loss", "optim"} <= set(schema["required"])
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("key", ["attacks=[prefill]", "toxicity=m", "pairwise_judge=m", "tasks=[gsm8k]"])
def test_what_is_asked_of_prompts_needs_prompts(key: str) -> None:
    with pytest.raises(UserError, match=f"evaluate.{key.partition('=')[0]} needs evaluate.prompts"):
        load_recipe({"model": {"id": "m"}, "loss": {"type": "dpo"}, "optim": {"steps": 1}}, [f"evaluate.{key}"])


@pytest.mark.parametrize("section", ["evaluate", "separation"])
def test_prompts_have_no_weight(section: str) -> None:
    weighted = {section: {"prompts": [{"path": "p.jsonl", "weight": 2.0}]}}
    with pytest.raises(UserError, match=f"{section}.prompts: .*weight does not apply"):
        load_recipe({"model": {"id": "m"}, "loss": {"type": "dpo"}, "optim": {"steps": 1}, **weighted}, [])


SECRETS = ("hf_planted", "plantedpassword", "AKIAPLANTED", "plantedplantedplanted")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.env={HF_TOKEN: hf_planted}", r"cluster\.env\.HF_TOKEN: .*set it in the environment"),
        ("cluster.env.AWS_SECRET_ACCESS_KEY=AKIAPLANTED", r"cluster\.env\.AWS_SECRET_ACCESS_KEY"),
        ("cluster.env.MLFLOW_TRACKING_PASSWORD=plantedpassword", r"cluster\.env\.MLFLOW_TRACKING_PASSWORD"),
        ("track.tags={api-key: AKIAPLANTED}", r"track\.tags\.api-key"),
        ("track.tags={note: 'by sk-proj-plantedplantedplanted'}", r"track\.tags\.note: a recipe is written"),
        ("cluster.env={LOGIN: github_pat_plantedplantedplanted}", r"cluster\.env\.LOGIN: a recipe is written"),
        ("track.uri=https://me:plantedpassword@mlflow.example", r"track\.uri: has a password in its address"),
        ("data.train=[s3://AKIAPLANTED:plantedpassword@bucket/x]", r"data\.train\.0: has a password"),
        ("checkpoint.storage=s3://AKIAPLANTED:plantedpassword@bucket/x", r"checkpoint\.storage: has a password"),
        ("track.uri=postgresql://me@db/x?password=plantedpassword", r"track\.uri: has a password"),
        ("cluster.env={PROXY: 'use http://me:plantedpassword@proxy'}", r"cluster\.env\.PROXY: has a password"),
        ("cluster.env=[{HF_TOKEN: hf_planted}]", r"cluster\.env\.0\.HF_TOKEN: "),
        ("cluster.env=HF_TOKEN=hf_planted", r"cluster\.env: a recipe is written"),
        ("cluster.env=[HF_TOKEN=hf_planted]", r"cluster\.env\.0: a recipe is written"),
        ("engine.deepspeed={comet: {api_key: hf_planted}}", r"engine\.deepspeed\.comet\.api_key: "),
        ("study={models: {a: {id: m, cluster.env.HF_TOKEN: hf_planted}}}", r"study\.models\.a\.cluster\.env\.HF_TOKEN"),
        ("study={models: {a: {cluster: {env: {HF_TOKEN: hf_planted}}}}}", r"study\.models\.a\.cluster\.env\.HF_TOKEN"),
        (
            "sweep={goal: minimize loss, trials: 1, space: {engine.deepspeed.comet.api_key: [hf_planted]}}",
            r"sweep\.space\.engine\.deepspeed\.comet\.api_key\.0: ",
        ),
    ],
)
def test_a_secret_is_refused_and_not_repeated(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_recipe({"model": {"id": "m"}, "loss": {"type": "dpo"}, "optim": {"steps": 1}}, [override])
    assert not any(secret in str(caught.value) for secret in SECRETS)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        *[(f"{start}{'a1B2' * 5}", True) for start in ("hf_", "ghp_", "github_pat_", "AKIA", "sk-", "sk-ant-api03-")],
        (f"xoxb-123456789012-1234567890123-{'a1B2' * 6}", True),
        (f"--token=hf_{'a' * 34}", True),
        ("hf_short", False),
        ("/shared/hf_datasets_cache_of_everybody", False),
        ("sk-learn-pipelines-and-more", False),
        (f"disk-{'a' * 20}", False),
    ],
)
def test_tokens_are_known_by_how_they_look(text: str, is_one: bool) -> None:
    assert has_token(text) is is_one


def test_what_only_looks_like_a_secret_is_kept() -> None:
    recipe = load_recipe(
        {"model": {"id": "m"}, "loss": {"type": "dpo"}, "optim": {"steps": 1}},
        [
            "cluster.env={TOKENIZERS_PARALLELISM: 'true', AWS_REGION: eu, VLLM_MAX_NUM_BATCHED_TOKENS: '64'}",
            "engine.deepspeed={token_lr: 0.1, schedule: {token_lr_schedule: {type: fixed}}}",
            "batch.tokens_per_microbatch=64",
            "track.uri=https://mlflow.example:5000/a@b",
            "track.tags={monkey: see, tokenizer: bpe, pad_token: '<pad>'}",
        ],
    )
    assert recipe.cluster.env.keys() == {"TOKENIZERS_PARALLELISM", "AWS_REGION", "VLLM_MAX_NUM_BATCHED_TOKENS"}
    assert recipe.engine.deepspeed["schedule"] == {"token_lr_schedule": {"type": "fixed"}}
    assert recipe.track.tags == {"monkey": "see", "tokenizer": "bpe", "pad_token": "<pad>"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.min_workers=3"], ("min_workers: 3", "num_workers (2)")),
        (["cluster.min_workers=1"], ("min_workers needs max_failures",)),
        (["cluster.min_workers=1", "cluster.max_failures=-1"], ("min_workers needs cpus_per_worker",)),
    ],
)
def test_workers_that_come_and_go_need_the_means_for_it(overrides: list[str], words: tuple[str, ...]) -> None:
    message = refusal(tree(), "cluster.num_workers=2", *overrides)
    assert all(word in message for word in ("cluster: ", *words))


def test_a_layout_is_made_for_the_fewest_workers() -> None:
    elastic = ["cluster.num_workers=8", "cluster.min_workers=2", "cluster.max_failures=3", "cluster.use_gpu=true"]
    assert load_recipe(tree(), elastic).cluster.least_workers == 2
    assert load_recipe(tree(), ["cluster.num_workers=8"]).cluster.least_workers == 8


def test_a_prompt_may_take_half_of_max_length_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", SMALLEST)
    assert load_recipe(path).batch.max_prompt_length == 512
    assert load_recipe(path, ["batch.max_length=256"]).batch.max_prompt_length == 128
    assert load_recipe(path, ["batch.max_length=256", "batch.max_prompt_length=200"]).batch.max_prompt_length == 200
