"""The command line: what it loads, what it prints, and how it refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from helpers.models import make_tokenizer
from helpers.stored import stream_here
from raydiv.cli import main
from raydiv.cli.main import make_parser
from raydiv.cli.options import NOT_OPTIONS, section_of
from raydiv.commands.quickstart import quickstart
from raydiv.config import Recipe
from raydiv.config.evaluate import EvaluateConfig
from raydiv.config.recipe import SeparationConfig
from raydiv.config.section import Section
from raydiv.losses import OBJECTIVES

Refuse = Callable[..., str]

PAIR = {"prompt": "How do I bake bread?", "chosen": "Mix flour and water.", "rejected": "No."}
HEAVY = ("torch", "ray", "transformers", "deepspeed", "mlflow", "pandas", "numpy")
PROBE = """
import io, json, sys, contextlib
from raydiv.cli import main
with contextlib.redirect_stdout(io.StringIO()) as printed:
    try:
        status = main(sys.argv[1:])
    except SystemExit as stop:
        status = stop.code
loaded = [name for name in {heavy!r} if name in sys.modules]
print(json.dumps([status, len(printed.getvalue()), loaded]))
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, write_jsonl: Callable[..., Path]) -> Path:
    """A recipe whose every part is in order."""
    path = tmp_path / "recipe.yaml"
    train = write_jsonl(*[PAIR | {"prompt": f"{PAIR['prompt']} {n}"} for n in range(4)])
    path.write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: {train}}}\nloss: {{type: kldo}}\noptim: {{steps: 1}}\n"
        f"output_dir: {tmp_path / 'runs'}\n"
    )
    return path


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command that the user must change; returns its one line. Ray is never started for it."""
    import ray

    def start(*arguments: object, **options: object) -> None:
        raise AssertionError("Ray was started before the mistake was found")

    monkeypatch.setattr(ray, "init", start)
    # a Ray that another test left running must not hide a start
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def run(*arguments: str | Path) -> str:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        assert status == 2
        assert printed.out == ""
        return one_line(printed.err)

    return run


@pytest.fixture
def refuse_data(refuse: Refuse, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command whose data the user must change, tokenised in this process; returns the last line, after the
    phases'.
    """
    monkeypatch.setattr("raydiv.commands.prepare.ray_session", lambda cluster: nullcontext())
    monkeypatch.setattr("raydiv.commands.prepare.require_nodes", lambda folders, files: None)
    monkeypatch.setattr("raydiv.data.tokenize.map_stream", stream_here)

    def run(*arguments: str | Path) -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        *phases, last = printed.err.splitlines(keepends=True)
        assert all(": done in " in line for line in phases)
        return one_line(last)

    return run


def one_line(text: str) -> str:
    assert "Traceback" not in text
    assert text.startswith("raydiv: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text.strip()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["schema"], ["losses", "--json"], ["train", "--help"], ["examples"], ["completion", "bash"]],
)
def test_cheap_command_loads_nothing_heavy(arguments: list[str]) -> None:
    probe = [sys.executable, "-c", PROBE.format(heavy=HEAVY), *arguments]
    done = subprocess.run(probe, capture_output=True, text=True, check=True)
    status, printed, loaded = json.loads(done.stdout)
    assert status == 0
    assert printed > 100
    assert loaded == []


def test_losses_json_is_one_object_of_every_objective(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["losses", "--json"]) == 0

    def never(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    printed = json.loads(capfd.readouterr().out, parse_constant=never)
    assert set(printed) == set(OBJECTIVES)
    for name, facts in printed.items():
        assert facts["data"] == OBJECTIVES[name].data
        assert set(facts["options"]) == set(OBJECTIVES[name].parameters)
        assert all(facts[key] for key in ("summary", "description", "paper"))
        first, *others = facts["estimates"]
        assert first["options"] == {}
        assert first["divergence"] == OBJECTIVES[name].divergence(OBJECTIVES[name].defaults)
        assert all(estimate["options"] for estimate in others)
        assert all(estimate["ceiling"] is None or estimate["ceiling"] > 0 for estimate in facts["estimates"])
    divergences = [estimate["divergence"] for estimate in printed["fdo"]["estimates"]]
    assert len(divergences) == len(set(divergences)) == 7
    assert {"skew": 0.5} in [estimate["options"] for estimate in printed["kldo"]["estimates"]]


def test_losses_table_names_every_objective_and_option(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["losses"]) == 0
    printed = capfd.readouterr().out
    for name, objective in OBJECTIVES.items():
        assert f"{name}: {objective.summary}" in printed
        assert all(f"{option}: " in printed for option in objective.parameters)


def test_losses_by_name_are_described_in_full(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["losses", "kldo"]) == 0
    printed = capfd.readouterr().out
    assert "running mean of the previous steps" in printed
    assert "dpo:" not in printed
    assert main(["losses", "kldoo"]) == 2
    assert "kldoo: no such loss (did you mean kldo?)" in capfd.readouterr().err


def test_reader_that_leaves_early_is_no_failure() -> None:
    code = "import sys\nfrom raydiv.cli import main\nsys.exit(main(['schema']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_schema_is_the_recipes_with_extends(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert set(printed["properties"]) == {"extends", *Recipe.model_fields}
    assert printed["$defs"] == Recipe.model_json_schema()["$defs"]


@pytest.mark.parametrize("arguments", [[], ["prepar"], ["train"], ["losses", "--jsn"]])
def test_bad_usage_is_status_2(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: raydiv" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rate=1", "optim.learning_rate: unknown key"),
        ("optim.lr=fast", "optim.lr: "),
        ("batch.examples=0", "batch.examples: "),
        ("loss.type=dppo", "did you mean dpo?"),
        ("loss.label_smoothing=0.1", "dpo"),
        ("nonsense", "nonsense"),
    ],
    ids=["unknown key", "wrong type", "out of range", "unknown loss", "option of another loss", "no override"],
)
@pytest.mark.parametrize("command", ["prepare", "train"])
def test_bad_recipe_is_one_line(command: str, override: str, words: str, recipe: Path, refuse: Refuse) -> None:
    assert words in refuse(command, recipe, override)


@pytest.mark.parametrize(("section", "command"), [(SeparationConfig, "separation"), (EvaluateConfig, "evaluate")])
def test_options_of_a_section_are_its_fields(section: type[Section], command: str) -> None:
    """Every field of the section is an option, whose help has the field's description and default."""
    options = {word: action for action in command_parser(command)._actions for word in action.option_strings}
    for name in section.model_fields.keys() - NOT_OPTIONS:
        field, option = section.model_fields[name], {"attacks": "attack", "tasks": "task"}.get(name, name)
        told = str(options[f"--{option.replace('_', '-')}"].help)
        assert field.description
        assert told.startswith(field.description.replace("%", "%%"))
        default = field.get_default(call_default_factory=True)
        if default not in (None, []):
            shown = ", ".join(map(str, default)) if isinstance(default, list) else str(default)
            assert told.endswith(f"(default: {shown})")
    assert section_of(section, make_parser().parse_args([command, "MODEL"])) == section()


def test_a_check_of_small_data_imports_neither_ray_nor_training(recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text(json.dumps(PAIR) + "\n")
    probe = [sys.executable, "-c", PROBE.format(heavy=HEAVY), "data", "check", str(data), "--recipe", str(recipe)]
    status, printed, loaded = json.loads(subprocess.run(probe, capture_output=True, text=True, check=True).stdout)
    assert (status, printed > 0) == (0, True)
    assert not set(loaded) & {"ray", "deepspeed", "mlflow"}


def test_given_options_reach_the_section() -> None:
    words = ["--pooling", "mean", "--intervals", "all", "--sample", "40"]
    options = make_parser().parse_args(["separation", "MODEL", "--prompts", "x", *words])
    assert section_of(SeparationConfig, options) == SeparationConfig(pooling="mean", intervals="all", sample=40)
    words = ["--task", "quick", "--task", "math", "--task-limit", "3", "--max-new-tokens", "7", "--judge", "harmbench"]
    options = make_parser().parse_args(["evaluate", "MODEL", *words])
    assert section_of(EvaluateConfig, options, attacks=["prefill"]) == EvaluateConfig.model_validate(
        {"tasks": ["quick", "math"], "task_limit": 3, "max_new_tokens": 7, "judge": "harmbench", "attacks": ["prefill"]}
    )


def command_parser(name: str) -> argparse.ArgumentParser:
    return next(parser for parser in every_parser(make_parser()) if parser.prog == f"raydiv {name}")


def every_parser(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from every_parser(inner)


def test_every_command_and_option_has_its_help() -> None:
    for parser in every_parser(make_parser()):
        assert "usage: raydiv" in parser.format_help()
        assert parser.description
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), (parser.prog, action.dest)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capfd.readouterr().out
    for parser in every_parser(make_parser()):
        assert parser.prog.split()[-1] in script
    assert "max-new-tokens" in script


def test_bash_takes_the_completion_script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "raydiv.bash"
    script.write_text(capfd.readouterr().out)
    words = ["bash", "-c", f"source {script} && complete -p raydiv"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("complete ")


def test_a_repeated_quickstart_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def train(recipe: Recipe, **_: Any) -> None:
        trained.append(recipe.name)
        (tmp_path / recipe.name).mkdir(exist_ok=True)

    monkeypatch.setattr("raydiv.commands.quickstart.train", train)
    for more in ([], [], [], ["name=mine"], ["name=mine"]):
        quickstart([f"output_dir={tmp_path}", *more])
    assert trained == ["quickstart", "quickstart-2", "quickstart-3", "mine", "mine"]


def test_quickstart_checks_its_overrides(refuse: Refuse) -> None:
    assert "optim.stepz" in refuse("quickstart", "optim.stepz=3")


def test_several_mistakes_are_still_one_line(recipe: Path, refuse: Refuse) -> None:
    line = refuse("prepare", recipe, "sed=1", "batch.examples=0", "optim.lr=x")
    assert all(path in line for path in ("sed:", "batch.examples:", "optim.lr:"))


def test_missing_recipe_file_is_one_line(tmp_path: Path, refuse: Refuse) -> None:
    assert "no.yaml" in refuse("prepare", tmp_path / "no.yaml")


def test_missing_data_file_is_one_line(tmp_path: Path, recipe: Path, refuse: Refuse) -> None:
    assert "gone.jsonl" in refuse("prepare", recipe, f"data.train={tmp_path / 'gone.jsonl'}")


def test_missing_held_out_file_is_one_line(tmp_path: Path, recipe: Path, refuse: Refuse) -> None:
    assert "gone.jsonl" in refuse("prepare", recipe, f"data.eval={tmp_path / 'gone.jsonl'}")


def test_empty_data_set_is_one_line(recipe: Path, write_jsonl: Callable[..., Path], refuse_data: Refuse) -> None:
    empty = write_jsonl(name="empty.jsonl")
    assert f"{empty}: holds no examples" in refuse_data("prepare", recipe, f"data.train={empty}")


def test_broken_first_row_is_found_before_anything_is_started(
    recipe: Path, write_jsonl: Callable[..., Path], refuse: Refuse
) -> None:
    broken = write_jsonl(PAIR | {"chosen": ""}, PAIR, name="broken.jsonl")
    assert f"{broken}:1: chosen" in refuse("prepare", recipe, f"data.train={broken}")
    assert f"{broken}:1: chosen" in refuse("train", recipe, f"data.eval=[{broken}]")


def test_broken_row_is_one_line(recipe: Path, write_jsonl: Callable[..., Path], refuse_data: Refuse) -> None:
    broken = write_jsonl(PAIR, PAIR | {"chosen": ""}, name="broken.jsonl")
    line = refuse_data("prepare", recipe, f"data.train={broken}")
    assert f"{broken}:2: chosen" in line
    assert f"raydiv data check {broken}" in line
    assert "data.on_bad_row=quarantine" in line


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("command", [["prepare"], ["prepare", "--json"]], ids=["", "json"])
def test_data_set_of_one_class_is_one_line(
    command: list[str], label: bool, recipe: Path, write_jsonl: Callable[..., Path], refuse_data: Refuse
) -> None:
    rows = [{"prompt": f"question {n}", "completion": "answer", "label": label} for n in range(3)]
    data = write_jsonl(*rows, name="one-class.jsonl")
    line = refuse_data(command[0], recipe, f"data.train={data}", *command[1:])
    assert "data.train" in line
    assert ("no unaligned example" if label else "no aligned example") in line


def test_unpaired_data_for_a_paired_loss_is_one_line(
    recipe: Path, write_jsonl: Callable[..., Path], refuse_data: Refuse
) -> None:
    rows = [{"prompt": f"question {n}", "completion": "answer", "label": n % 2 == 0} for n in range(4)]
    data = write_jsonl(*rows, name="unpaired.jsonl")
    line = refuse_data("prepare", recipe, f"data.train={data}", "loss.type=dpo")
    assert "4 of 4" in line
    assert "kldo" in line
    assert "aot-unpaired" in line
    assert "rdpo" not in line


def test_unpaired_data_for_a_paired_term_names_the_term(
    recipe: Path, write_jsonl: Callable[..., Path], refuse_data: Refuse
) -> None:
    data = write_jsonl(*[{"prompt": f"question {n}", "completion": "answer", "label": n % 2 == 0} for n in range(4)])
    line = refuse_data("prepare", recipe, f"data.train={data}", "loss.mix.ipo.weight=1")
    assert "the loss ipo takes pairs" in line


def test_held_out_data_must_fit_the_loss_too(
    recipe: Path, write_jsonl: Callable[..., Path], refuse_data: Refuse
) -> None:
    pairs = write_jsonl(*[PAIR | {"prompt": f"question {n}"} for n in range(4)], name="pairs.jsonl")
    rows = [{"prompt": f"other {n}", "completion": "answer", "label": n % 2 == 0} for n in range(4)]
    unpaired = write_jsonl(*rows, name="unpaired.jsonl")
    line = refuse_data("prepare", recipe, f"data.train={pairs}", f"data.eval={unpaired}", "loss.type=simpo")
    assert f"data.eval: {unpaired}: 4 of 4" in line


def test_aligned_examples_alone_are_enough_for_sft_only(
    recipe: Path, write_jsonl: Callable[..., Path], refuse_data: Refuse
) -> None:
    data = write_jsonl(*[{"prompt": f"question {n}", "completion": "answer", "label": True} for n in range(3)])
    line = refuse_data("prepare", recipe, f"data.train={data}", "loss.type=fdo")
    assert "no unaligned example" in line
    assert "aligned examples alone: sft)" in line
    unaligned = write_jsonl({"prompt": "question", "completion": "answer", "label": False}, name="unaligned.jsonl")
    assert "no aligned example" in refuse_data("prepare", recipe, f"data.train={unaligned}", "loss.type=sft")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows", "1000"], ("--rows: ", "--part train")),
        (["--part", "data", "--against", "trl"], ("--against: ", "--part data")),
        (["--part", "data", "--warmup", "1"], ("--warmup: ", "--part data")),
        (["--part", "start", "--steps", "1"], ("--steps: ", "--part start")),
        (["--against", "loop", "--against", "trl"], ("kldo: not a loss",)),
        (["--steps", "0"], ("--steps: 0: must be 1 or more",)),
        (["--part", "embed", "--rows", "1", "--rows", "2"], ("--rows: ", "--part embed")),
        (["model.id=bundled:w2"], ("bundled:w1",)),
    ],
)
def test_bench_that_cannot_be_run_is_one_line(
    options: list[str], said: tuple[str, ...], recipe: Path, refuse: Refuse
) -> None:
    line = refuse("bench", recipe, *options)
    assert all(part in line for part in said)


def test_missing_model_is_one_line(tmp_path: Path, recipe: Path, refuse: Refuse) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refuse("prepare", recipe, f"model.id={tmp_path / 'empty'}")
    assert "bundled:gpt" in refuse("prepare", recipe, "model.id=bundled:gpt")


def test_model_without_weights_is_one_line(tmp_path: Path, tiny_model: Path, recipe: Path, refuse: Refuse) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    line = refuse("prepare", recipe, f"model.id={bare}")
    assert str(bare) in line
    assert "weights" in line


def copy_with_template(tiny_model: Path, folder: Path, template: str | None) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    make_tokenizer(folder, template)
    return folder


def test_tokenizer_without_chat_template_is_one_line(
    tmp_path: Path, tiny_model: Path, recipe: Path, refuse: Refuse
) -> None:
    folder = copy_with_template(tiny_model, tmp_path / "plain", None)
    line = refuse("prepare", recipe, f"model.id={folder}")
    assert "data.template" in line
    assert str(folder) in line


@pytest.mark.parametrize("template", ["{% for m in messages %}", "gone.jinja"], ids=["broken Jinja", "missing file"])
def test_unusable_template_is_one_line(template: str, recipe: Path, refuse: Refuse) -> None:
    assert "data.template" in refuse("prepare", recipe, f"data.template={json.dumps(template)}")


@pytest.mark.parametrize("harmful", [True, False])
def test_prompts_of_one_class_are_one_line(
    harmful: bool, tiny_model: Path, write_jsonl: Callable[..., Path], refuse: Refuse
) -> None:
    prompts = write_jsonl(*[{"prompt": f"question {n}", "harmful": harmful} for n in range(4)])
    line = refuse("separation", tiny_model, "--prompts", prompts)
    assert str(prompts) in line
    assert ("4 harmful and 0 harmless" if harmful else "0 harmful and 4 harmless") in line


@pytest.mark.parametrize("command", ["separation", "evaluate"])
def test_unlabelled_prompts_are_one_line(
    command: str, tiny_model: Path, write_jsonl: Callable[..., Path], refuse: Refuse
) -> None:
    prompts = write_jsonl({"prompt": "PLANTED"})
    line = refuse(command, tiny_model, "--prompts", prompts)
    assert f"{prompts}:1: harmful" in line
    assert "PLANTED" not in line


def test_export_of_no_run_is_one_line(tmp_path: Path, tiny_model: Path, refuse: Refuse) -> None:
    for directory in (tmp_path / "gone", tiny_model):
        assert f"{directory}: no trained model" in refuse("export", directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_over_something_is_one_line(tmp_path: Path, refuse: Refuse) -> None:
    run, target = tmp_path / "run", tmp_path / "out"
    (run / "model").mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    assert str(target) in refuse("export", run, target)
    assert (target / "mine.txt").read_text() == "keep"


def test_train_over_a_run_is_one_line(tmp_path: Path, recipe: Path, refuse: Refuse) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("of another run")
    assert str(run) in refuse("train", recipe, "name=first")
    assert (run / "recipe.yaml").read_text() == "of another run"
    assert [path.name for path in run.iterdir()] == ["recipe.yaml"]


def test_show_text_needs_a_place_to_write(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, refuse: Refuse) -> None:
    def measure(*arguments: Any, **options: Any) -> list[Any]:
        raise AssertionError("answers were generated before the mistake was found")

    monkeypatch.setattr("raydiv.commands.evaluate.evaluate", measure)
    assert "--output" in refuse("evaluate", tiny_model, "--show-text")


def test_what_a_library_prints_is_no_result(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Ray prints its raylet's warnings on standard output: ``--json`` has one object there and nothing else."""
    from raydiv.commands import losses as catalogue

    described = catalogue.describe_losses

    def noisy(names: list[str]) -> dict[str, Any]:
        print("(raylet) a warning")
        return described(names)

    monkeypatch.setattr(catalogue, "describe_losses", noisy)
    assert main(["losses", "kldo", "--json"]) == 0
    out, err = capfd.readouterr()
    assert list(json.loads(out)) == ["kldo"]
    assert "(raylet) a warning" in err
