"""``raydiv data check``: counts, bad rows, invalid pairs, overlap with evaluation prompts, and no text in output."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.stored import stream_here
from raydiv.cli import main
from raydiv.commands.data_check import DataReport, check_data
from raydiv.config import load_recipe
from raydiv.config.cluster import ClusterConfig
from raydiv.model.chat import Chat
from raydiv.runs.progress import ProgressDisplay
from raydiv.runtime.session import ray_session

Row = dict[str, Any]
Writer = Callable[..., Path]

PLANTED = "planted"
BATCH = {"max_length": 120, "max_prompt_length": 80}


def example(prompt: str, response: str, aligned: bool, harmful: bool | None = None, pair: str | None = None) -> Row:
    return {"prompt": f"{prompt} {PLANTED}", "response": f"{response} {PLANTED}", "aligned": aligned} | {
        "harmful": harmful,
        "pair": pair,
    }


LONELY = "What helps lonely people in large northern cities make new friends?"
ROWS: list[Any] = [
    example("Harm someone", "I refuse.", True, True, "a"),
    example("Harm someone", "Sure.", False, True, "a"),  # a pair
    example("Bake bread, at home", "Mix flour.", True, False),
    example("Bake bread, at home", "Mix flour.", True, False),  # a duplicate
    example("Bake bread, at home", "Mix flour.", False, False),  # aligned and unaligned
    example("Harm someone", "Another answer.", True, False),  # a prompt with both labels
    example(LONELY, "Clubs.", True, None, "b"),  # a pair without a partner
    example("Both", "One.", True, None, "c"),
    example("Both", "Two.", True, None, "c"),  # an invalid pair: one class
    b'{"prompt": "' + PLANTED.encode(),
    example("First", "One.", True, None, "d"),
    example("Second", "Two.", False, None, "d"),  # an invalid pair: two prompts
    {"prompt": f"Choose {PLANTED}", "chosen": "this", "rejected": "that", "harmful": True},
    example("long " * 30, "short", True),  # a prompt that is truncated
    example("short", "long " * 60, False),  # a response that is truncated
    example("nothing", PLANTED, True) | {"response": None},
    example("nothing", PLANTED, True) | {"response": None},
]
NUMBER_OF_EXAMPLES = 15


def write(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


class Checked:
    """A folder with a data set, evaluation sets of every kind, and a recipe with all of them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.data = write(folder / "data.jsonl", ROWS)
        self.eval = write(
            folder / "eval.jsonl",
            [
                example("BAKE: bread at home?!", "x", True),
                example("Bake bread at home", "y", False),  # the same prompt
                example("What helps lonely people in large northern cities to make friends", "x", True),
                example("Which volcano erupted first", "x", True),
            ],
        )
        prompts = [{"prompt": f"Harm, someone: {PLANTED}", "harmful": True}, {"prompt": "Volcanoes", "harmful": False}]
        self.prompts = write(folder / "prompts.jsonl", prompts)
        self.anchors = write(folder / "anchors.jsonl", [p | {"prompt": f"Anchor {n}"} for n, p in enumerate(prompts)])
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(
            yaml.safe_dump(
                {
                    "model": {"id": str(model)},
                    "data": {"train": str(self.data), "eval": str(self.eval)},
                    "loss": {"type": "kldo"},
                    "optim": {"steps": 1},
                    "batch": BATCH,
                    "evaluate": {"prompts": str(self.prompts)},
                    "separation": {"prompts": str(self.anchors)},
                }
            )
        )


@pytest.fixture(scope="module")
def checked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    return Checked(tmp_path_factory.mktemp("checked"), tiny_model)


@pytest.fixture(scope="module")
def report(small_sources_use_ray: None, checked: Checked) -> Iterator[DataReport]:
    """The report on ROWS, through Ray."""
    with ray_session(ClusterConfig()):
        (report,) = check_data(load_recipe(checked.recipe), display=ProgressDisplay(quiet=True))
        yield report


@pytest.fixture
def facts(report: DataReport) -> dict[str, Any]:
    return report.facts


pytestmark = pytest.mark.slow


def test_examples_are_counted_by_class_and_label(facts: dict[str, Any]) -> None:
    assert facts["examples"] == NUMBER_OF_EXAMPLES
    assert facts["files"] == 1
    assert facts["classes"] == {
        "aligned": {"harmful": 2, "harmless": 3, "unlabelled": 5},
        "unaligned": {"harmful": 2, "harmless": 1, "unlabelled": 2},
    }


def test_duplicates_and_contradictions_are_counted(facts: dict[str, Any]) -> None:
    assert facts["duplicates"] == {"examples": 1, "aligned_and_unaligned": 1}
    assert facts["prompts"] == {"different": 9, "with_both_labels": 1}


def test_pairs_are_counted_and_invalid_ones_listed(checked: Checked, facts: dict[str, Any]) -> None:
    assert facts["pairs"]["complete"] == 2
    assert facts["pairs"]["without_partner"] == 7
    reasons = dict(message.split(": ") for message in facts["pairs"]["broken"])
    assert reasons.keys() == {f"{checked.data}:8, {checked.data}:9", f"{checked.data}:11, {checked.data}:12"}
    assert "2 aligned and 0 unaligned" in reasons[f"{checked.data}:8, {checked.data}:9"]
    assert "two prompts" in reasons[f"{checked.data}:11, {checked.data}:12"]


def test_bad_rows_are_listed_and_counted_by_reason(checked: Checked, facts: dict[str, Any]) -> None:
    bad = facts["bad_rows"]
    assert bad["count"] == 3
    assert [(row["file"], row["line"]) for row in bad["rows"]] == [(str(checked.data), line) for line in (10, 16, 17)]
    assert list(bad["reasons"].values()) == [2, 1]
    assert next(iter(bad["reasons"])) == "response must be non-empty text, found None"
    assert bad["rows"][0]["reason"].startswith("not JSON")


def test_truncation_is_counted_at_the_recipes_lengths(
    checked: Checked, facts: dict[str, Any], tiny_model: Path
) -> None:
    assert facts["tokens"]["truncated"] == {"prompts": 1, "responses": 1} | {
        "max_prompt_length": 80,
        "max_length": 120,
    }
    chat = Chat(tiny_model)
    long_prompt, long_response = ROWS[13]["prompt"], ROWS[14]["response"]
    assert facts["tokens"]["prompts"]["max"] == len(chat.prompt_ids(long_prompt)) > 80
    whole = chat.tokenize_one("x", long_response, 1000, 5000)
    assert facts["tokens"]["unaligned responses"]["max"] == len(whole.response) > 120


def test_histograms_hold_every_example_once(facts: dict[str, Any]) -> None:
    sizes = {"prompts": NUMBER_OF_EXAMPLES, "aligned responses": 10, "unaligned responses": 5}
    for name, examples in sizes.items():
        spread = facts["tokens"][name]
        assert spread["examples"] == examples
        bins = spread["histogram"]
        assert sum(interval["examples"] for interval in bins) == examples
        assert (bins[0]["from"], bins[-1]["to"]) == (spread["min"], spread["max"])
        assert all(interval["to"] + 1 == following["from"] for interval, following in itertools.pairwise(bins))
        assert spread["min"] <= spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["max"]


def test_evaluation_prompts_in_the_data_are_found(checked: Checked, facts: dict[str, Any]) -> None:
    def match(prompts: Path, line: int, data_line: int, same: bool) -> Row:
        return {"prompt": f"{prompts}:{line}", "found": f"{checked.data}:{data_line}", "same": same}

    overlap = facts["overlap"]
    assert overlap.keys() == {str(checked.eval), str(checked.prompts), str(checked.anchors)}
    of_eval = overlap[str(checked.eval)]
    assert (of_eval["prompts"], of_eval["same"], of_eval["near"]) == (3, 1, 1)
    bread, lonely = sorted(of_eval["found"], key=lambda row: row["prompt"])
    assert bread["found"] in {f"{checked.data}:{line}" for line in (3, 4, 5)}
    assert bread == match(checked.eval, 1, int(bread["found"].rpartition(":")[2]), same=True)
    assert lonely == match(checked.eval, 3, 7, same=False)
    of_prompts = overlap[str(checked.prompts)]
    assert (of_prompts["prompts"], of_prompts["same"], of_prompts["near"]) == (2, 1, 0)
    assert overlap[str(checked.anchors)] == {"prompts": 2, "same": 0, "near": 0, "found": []}


def test_report_holds_no_text(facts: dict[str, Any]) -> None:
    printed = json.dumps(facts)
    assert PLANTED not in printed
    for words in ("Mix flour", "Harm someone", "lonely", "volcano"):
        assert words not in printed


def test_data_with_bad_rows_or_invalid_pairs_is_not_valid(report: DataReport) -> None:
    assert not report.valid
    bad = {"count": 0, "reasons": {}, "rows": []}
    pairs = report.facts["pairs"]
    assert not DataReport(report.facts | {"bad_rows": bad}).valid
    assert not DataReport(report.facts | {"pairs": pairs | {"broken": []}}).valid
    assert DataReport(report.facts | {"bad_rows": bad, "pairs": pairs | {"broken": []}}).valid


# --- the command, without Ray ---


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs everything in this process, with an empty cache."""
    monkeypatch.setenv("RAYDIV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("raydiv.commands.data_check.check.ray_session", lambda cluster: nullcontext())
    for module in ("raydiv.data.tokenize", "raydiv.data.overlap"):
        monkeypatch.setattr(f"{module}.map_stream", stream_here)


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A recipe without evaluation sets; ``data`` is its section."""

    def make(**data: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        sections = {"model": {"id": str(tiny_model)}, "data": data, "loss": {"type": "kldo"}, "optim": {"steps": 1}}
        path.write_text(yaml.safe_dump({**sections, "batch": BATCH, "separation": {"prompts": None}}))
        return path

    return make


GOOD = [example("Harm someone", "No.", True, True, "a"), example("Harm someone", "Yes.", False, True, "a")]


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and output of ``raydiv data check``."""
    capsys.readouterr()
    status = main(["data", "check", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_json_is_the_whole_report(
    here: None, checked: Checked, report: DataReport, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = check(capsys, checked.data, "--recipe", checked.recipe, "--json")
    assert status == 2
    assert json.loads(printed) == report.facts


def test_table_lists_errors_and_shows_no_text(here: None, checked: Checked, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = check(capsys, checked.data, "--recipe", checked.recipe, "--rows", 2)
    assert status == 2
    assert PLANTED not in printed
    assert f"{checked.data}:10: not JSON" in printed
    assert f"{checked.data}:16: response must be" in printed
    assert f"{checked.data}:17" not in printed
    assert "1 more bad rows" in printed
    for label, count in (("invalid pairs", 2), ("duplicate examples", 1), ("bad rows", 3)):
        assert re.search(rf"^ *{label} +{count} *$", printed, re.MULTILINE)
    assert f"{checked.data}:8, {checked.data}:9: one pair with 2 aligned" in printed
    assert re.search(rf"{checked.eval}: 1 of 3 prompts, 1 .*nearly", printed)
    assert re.search("truncated: 1 prompts at 80 tokens, 1 responses at 120 ", printed)


def test_valid_data_exits_with_0(
    here: None, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = check(capsys, write(tmp_path / "good.jsonl", GOOD), "--recipe", recipe())
    assert status == 0
    assert "bad rows" in printed
    assert PLANTED not in printed


@pytest.mark.parametrize("wrong", [b"{", GOOD[0]], ids=["bad row", "invalid pair"])
def test_invalid_data_exits_with_2(
    wrong: Any, here: None, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = check(capsys, write(tmp_path / "d.jsonl", [*GOOD, wrong]), "--recipe", recipe(), "--json")
    assert status == 2
    assert json.loads(printed)["examples"] == 2 + isinstance(wrong, dict)


@pytest.mark.parametrize("missing", ["source", "evaluation set"])
def test_missing_file_exits_with_2_before_the_model_is_loaded(
    missing: str,
    here: None,
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any) -> Path:
        raise AssertionError("the model was loaded before the files were checked")

    monkeypatch.setattr("raydiv.commands.data_check.check.model_directory", load)
    gone, good = tmp_path / "gone.jsonl", write(tmp_path / "good.jsonl", GOOD)
    data, section = (gone, {}) if missing == "source" else (good, {"eval": str(gone)})
    assert main(["data", "check", str(data), "--recipe", str(recipe(**section)), "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"raydiv: {gone}: ")
    assert printed.err.count("\n") == 1


def test_data_of_one_class_can_be_checked(
    here: None, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "aligned.jsonl", [example("p", "r", True)])
    status, printed = check(capsys, data, "--recipe", recipe(), "--json")
    assert status == 0
    assert json.loads(printed)["tokens"]["unaligned responses"] == {"examples": 0}
    assert check(capsys, data, "--recipe", recipe())[0] == 0


def test_columns_and_lengths_are_overridden_on_the_command_line(
    here: None, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": row["prompt"], "response": row["response"], "aligned": row["aligned"]} for row in GOOD]
    data = write(tmp_path / "renamed.jsonl", rows)
    source = f"{{path: {data}, constants: {{harmful: true}}}}"
    changes = ("data.columns.prompt=question", "batch.max_length=50", "batch.max_prompt_length=40")
    status, printed = check(capsys, source, *changes, "--recipe", recipe(), "--json")
    facts = json.loads(printed)
    assert status == 0
    assert facts["classes"]["aligned"] == {"harmful": 1, "harmless": 0, "unlabelled": 0}
    assert facts["tokens"]["truncated"]["max_length"] == 50


def test_options_of_the_recipes_source_do_not_apply_to_the_checked_file(
    here: None, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"path": "elsewhere.jsonl", "columns": {"prompt": "question"}, "constants": {"harmful": True}}
    data = write(tmp_path / "good.jsonl", GOOD)
    status, printed = check(capsys, data, "--recipe", recipe(train=source), "--json")
    assert status == 0
    assert json.loads(printed)["examples"] == 2


@pytest.mark.parametrize("name", ["2024", "a: b.jsonl", "[a].jsonl", "*.jsonl", "a #1.jsonl"])
def test_special_characters_in_the_path(
    name: str,
    here: None,
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "2024":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.jsonl", GOOD)
    else:
        write(tmp_path / name.replace("*", "rows"), GOOD)
    status, printed = check(capsys, name, "--recipe", recipe(), "--json")
    assert status == 0
    assert json.loads(printed)["source"] == name


def test_bad_rows_alone_are_listed(
    here: None, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "bad.jsonl", [b"{", GOOD[0] | {"response": None}])
    status, printed = check(capsys, data, "--recipe", recipe(), "--json")
    assert status == 2
    assert [row["line"] for row in json.loads(printed)["bad_rows"]["rows"]] == [1, 2]


def test_invalid_pair_of_three_does_not_reduce_complete_pairs(
    here: None, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = [example("Three", f"r{n}", n == 0, None, "three") for n in range(3)]
    _, printed = check(capsys, write(tmp_path / "d.jsonl", [*GOOD, *three]), "--recipe", recipe(), "--json")
    pairs = json.loads(printed)["pairs"]
    assert len(pairs["broken"]) == 1
    assert pairs["complete"] == 1


def test_columns_of_the_recipe_apply_to_its_evaluation_set(
    here: None, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": row["prompt"], "response": row["response"], "aligned": row["aligned"]} for row in GOOD]
    data, held_out = write(tmp_path / "train.jsonl", rows), write(tmp_path / "eval.jsonl", rows)
    section = {"columns": {"prompt": "question"}, "eval": str(held_out)}
    status, printed = check(capsys, data, "--recipe", recipe(**section), "--json")
    assert status == 0
    assert json.loads(printed)["overlap"][str(held_out)]["same"] == 1


def test_fraction_for_evaluation_is_not_an_evaluation_set(
    here: None, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = check(capsys, write(tmp_path / "d.jsonl", GOOD), "--recipe", recipe(eval=0.5), "--json")
    assert status == 0
    assert json.loads(printed)["overlap"] == {}


def test_show_text_and_html_show_examples(
    here: None, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, page = write(tmp_path / "good.jsonl", GOOD), tmp_path / "page.html"
    arguments = (data, "--recipe", recipe())
    assert "end of turn" not in check(capsys, *arguments)[1]
    status, printed = check(capsys, *arguments, "--html", page)
    assert status == 0
    assert "shown" not in json.loads(check(capsys, *arguments, "--html", page, "--json")[1])
    assert 'class="end-of-turn"' in page.read_text()
    assert f"aligned, {data}:1" in page.read_text()
    printed = check(capsys, *arguments, "--show-text")[1]
    assert f"unaligned, {data}:2: " in printed
    assert len(re.findall("end of turn +", printed)) == 2
    shown = json.loads(check(capsys, *arguments, "--show-text", "--json")[1])["shown"]
    assert "".join(token for run in shown[0]["parts"] for token in run["tokens"]).count(PLANTED) == 2


def test_a_model_of_ones_own_keeps_its_template(
    here: None, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "good.jsonl", GOOD)
    without = ("data.eval=null", "evaluate.every=null", "evaluate.prompts=null", "evaluate.attacks=[]")
    for template, source in ((), "tokenizer"), (("data.template='{{ messages[0].content }}'",), "data.template"):
        printed = check(capsys, data, f"model.id={tiny_model}", *without, *template, "--json")[1]
        assert json.loads(printed)["chat"]["template"] == source


def test_sources_that_are_small_only_one_by_one_have_a_session(
    here: None, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are tokenised together."""
    sessions: list[Any] = []
    files = [write(tmp_path / f"{name}.jsonl", GOOD) for name in ("a", "b")]
    monkeypatch.setattr("raydiv.data.index.SMALL_BYTES", files[0].stat().st_size)
    monkeypatch.setattr(
        "raydiv.commands.data_check.check.ray_session", lambda cluster: sessions.append(cluster) or nullcontext()
    )
    for count in (1, 2):
        given = load_recipe(recipe(train=[{"path": str(file)} for file in files[:count]]))
        assert len(check_data(given, display=ProgressDisplay(quiet=True))) == count
        assert len(sessions) == count - 1
