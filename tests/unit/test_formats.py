"""Data sets in the formats in which they are published, and what a source's index tells of its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.stored import indices_of, opened, recipe_of
from helpers.templates import FAMILIES, make_family_tokenizer
from raydiv.commands.plan.amounts import measure_data
from raydiv.config.source import Source
from raydiv.data.fields import BadRow
from raydiv.data.formats import CANONICAL, HONOURED_ELSEWHERE, Example, RecordReader
from raydiv.data.index import Index
from raydiv.data.notes import Note
from raydiv.data.readers import read_examples
from raydiv.data.splits import make_splits
from raydiv.model.chat import Chat
from raydiv.utils.errors import UserError

Row = dict[str, Any]
Writer = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("own_cache")

ASKED = "How do I prune a lemon tree?"
USER = {"role": "user", "content": ASKED}
GOOD, BAD = "Cut crossing branches.", "Trees."
PAIR = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}


def examples_of(record: Row, **options: Any) -> list[Example]:
    return RecordReader(**options).examples(record, "data.jsonl:1")


def sides(record: Row, **options: Any) -> list[tuple[Any, Any, bool]]:
    return [(e.prompt, e.response, e.aligned) for e in examples_of(record, **options)]


def refusal(record: Row) -> str:
    with pytest.raises(BadRow) as caught:
        CANONICAL.examples(record, "data.jsonl:1")
    return str(caught.value)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_tokenizer(tmp_path_factory.mktemp("chatml"), FAMILIES["ChatML"])


def index_of(directory: Path, path: Path, **data: Any) -> Index:
    recipe = recipe_of(directory, str(path), **data)
    chat = Chat.from_recipe(recipe, directory)
    (index,) = indices_of(opened(recipe, chat)[0], recipe, chat)
    return index


def noted(index: Index) -> dict[Note, list[int]]:
    """The lines of each note."""
    lines = {note: [line for _, line in index.noted(note).places] for note in Note if note}
    return {note: found for note, found in lines.items() if found}


# --- HH-RLHF ---


def spoken(*turns: str) -> str:
    return "".join(f"\n\n{name}: {text}" for name, text in zip(("Human", "Assistant") * 4, turns, strict=False))


def test_turns_after_human_and_assistant_are_messages() -> None:
    record = {"chosen": spoken(ASKED, "Yes.", "When?", GOOD), "rejected": spoken(ASKED, "Yes.", "When?", BAD)}
    prompt = [USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "When?"}]
    chosen, rejected = examples_of(record)
    assert (chosen.prompt, chosen.response, chosen.aligned) == (prompt, GOOD, True)
    assert (rejected.prompt, rejected.response, rejected.aligned) == (prompt, BAD, False)
    assert chosen.pair == rejected.pair == "data.jsonl:1"
    assert chosen.notes == Note.NONE


@pytest.mark.parametrize("as_text", [True, False])
def test_sides_that_part_early_keep_their_own_turns_and_have_no_partner(as_text: bool) -> None:
    turns = {"chosen": (ASKED, GOOD, "Thanks!", "Welcome."), "rejected": (ASKED, BAD, "Why?", "Because.")}
    messages = {
        side: [{"role": r, "content": t} for r, t in zip(ROLES, said, strict=True)] for side, said in turns.items()
    }
    record = {side: spoken(*turns[side]) if as_text else messages[side] for side in turns}
    chosen, rejected = examples_of(record)
    assert (chosen.prompt, chosen.response) == (messages["chosen"][:-1], "Welcome.")
    assert (rejected.prompt, rejected.response) == (messages["rejected"][:-1], "Because.")
    assert chosen.pair is rejected.pair is None
    assert chosen.notes == rejected.notes == Note.OWN_CONTEXT


ROLES = ("user", "assistant", "user", "assistant")


def test_a_side_that_goes_on_after_the_other_has_a_prompt_of_its_own() -> None:
    chosen, rejected = examples_of({"chosen": spoken(ASKED, GOOD), "rejected": spoken(ASKED, GOOD, "More?", BAD)})
    assert (chosen.prompt, chosen.response) == ([USER], GOOD)
    assert (len(rejected.prompt), rejected.response) == (3, BAD)
    assert Note.OWN_CONTEXT in chosen.notes & rejected.notes


def test_a_prompt_of_turns_goes_to_the_assistant() -> None:
    prompt = [USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "When?"}]
    text = spoken(ASKED, "Yes.", "When?") + "\n\nAssistant:"
    assert sides({"prompt": text, "chosen": f" {GOOD}", "rejected": BAD})[0][0] == prompt
    for ordinary in ("Human: who said this?", "Write a dialogue.\n\nHuman: Hello\n\nAssistant:"):
        assert sides(PAIR | {"prompt": ordinary})[0][0] == ordinary


SYSTEM = {"role": "system", "content": "Be brief."}
FOLLOWED = [USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "When?"}]


@pytest.mark.parametrize("prompt", [ASKED, "When?", [USER], FOLLOWED, [SYSTEM, *FOLLOWED]])
def test_a_prompt_that_both_sides_repeat_is_their_first_or_their_last_turn(prompt: Any) -> None:
    whole = [SYSTEM, *FOLLOWED]
    record = {"prompt": prompt, "chosen": [*whole, said(GOOD)], "rejected": [*whole, said(BAD)]}
    assert sides(record) == [(whole, GOOD, True), (whole, BAD, False)]
    other = record | {"rejected": [{"role": "user", "content": "x"}, said(BAD)]}
    assert "rejected is a conversation that does not have the prompt" in refusal(other)


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_text_sides_that_repeat_the_prompt_are_conversations() -> None:
    record = {"prompt": spoken(ASKED) + "\n\nAssistant:", "chosen": spoken(ASKED, GOOD), "rejected": spoken(ASKED, BAD)}
    assert sides(record) == [([USER], GOOD, True), ([USER], BAD, False)]


def test_rendered_prompts_of_turns_stay_text() -> None:
    text = spoken(ASKED) + "\n\nAssistant:"
    assert sides(PAIR | {"prompt": text}, rendered=True)[0][0] == text


@pytest.mark.parametrize("text", ["[{'role': 'user', 'content': 'x'}]", '[{"from": "human", "value": "x"}]'])
@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_messages_written_as_text_are_refused(column: str, text: str) -> None:
    assert f"{column} is a list of messages written as text" in refusal(PAIR | {column: text})


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ("no turns at all", "chosen must be"),
        (spoken(ASKED), "chosen must be a prompt and its answer"),
        (spoken(ASKED, ""), "chosen.1.content"),
        (spoken(ASKED, GOOD, "and?"), "chosen must be one assistant message"),
    ],
)
def test_text_without_a_prompt_and_an_answer_is_a_bad_row(chosen: str, named: str) -> None:
    assert named in refusal({"chosen": chosen, "rejected": spoken(ASKED, BAD)})


# --- PKU-SafeRLHF and BeaverTails ---

SAFE_RLHF = {
    "prompt": ASKED,
    "response_0": BAD,
    "response_1": GOOD,
    "is_response_0_safe": True,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}


@pytest.mark.parametrize(("prefer", "preferred"), [("safer", GOOD), ("better", BAD)])
def test_the_preferred_response_is_the_safer_or_the_better_one(
    prefer: str, preferred: str, write_jsonl: Writer, chatml: Path
) -> None:
    assert examples_of(SAFE_RLHF, prefer=prefer)[0].response == preferred
    recipe = recipe_of(chatml, str(write_jsonl(SAFE_RLHF)), prefer=prefer)
    assert read_examples(recipe.data.train[0], recipe.data)[0].response == preferred


def test_a_preferred_response_that_is_unsafe_is_noted() -> None:
    chosen, rejected = examples_of(SAFE_RLHF | {"is_response_1_safe": False})
    assert (chosen.notes, rejected.notes) == (Note.UNSAFE_PREFERRED, Note.NONE)
    assert "must be 0 or 1" in refusal(SAFE_RLHF | {"safer_response_id": 2})


def test_is_safe_is_the_label_of_a_response() -> None:
    record = {"prompt": ASKED, "response": GOOD, "category": {"violence": False}}
    assert [sides(record | {"is_safe": safe}) for safe in (True, False)] == [
        [(ASKED, GOOD, True)],
        [(ASKED, GOOD, False)],
    ]


# --- labels ---


@pytest.mark.parametrize(
    ("yes", "no"), [(True, False), (1, 0), (1.0, 0.0), ("True", "False"), ("1", "0"), ("true", "FALSE")]
)
def test_labels_in_every_spelling(yes: Any, no: Any) -> None:
    unpaired = {"prompt": ASKED, "completion": GOOD, "harmful": no}
    assert [e.aligned for label in (yes, no) for e in examples_of(unpaired | {"label": label})] == [True, False]
    assert examples_of(unpaired | {"label": yes})[0].harmful is False


def labelled(*labels: Any, **columns: Any) -> list[Row]:
    return [{"prompt": f"{ASKED} {n}", "completion": GOOD, "label": label, **columns} for n, label in enumerate(labels)]


def test_the_spelling_of_a_converted_label_is_told(chatml: Path, write_jsonl: Writer) -> None:
    assert index_of(chatml, write_jsonl(*labelled(1, 0, harmful="0"))).spellings() == {"label": "1/0", "harmful": "1/0"}
    assert index_of(chatml, write_jsonl(*labelled(True, False), name="b.jsonl")).spellings() == {}


def test_a_rating_is_no_label(chatml: Path, write_jsonl: Writer) -> None:
    path = write_jsonl(*labelled(1, 0, 2, 5))
    with pytest.raises(UserError, match=r"data\.jsonl:3: label must be 1 or 0 in all rows, found 2"):
        index_of(chatml, path)
    index = index_of(chatml, path, on_bad_row="quarantine")
    assert (len(index), sorted(line for _, line in index.bad.places)) == (0, [1, 2, 3, 4])
    assert any("a rating" in reason for reason in index.bad.reasons)


@pytest.mark.parametrize("odd", [None, "unknown", ""])
def test_a_missing_label_leaves_the_others_as_they_are(odd: Any, chatml: Path, write_jsonl: Writer) -> None:
    index = index_of(chatml, write_jsonl(*labelled(1, 0, odd, 1)), on_bad_row="quarantine")
    assert ([line for _, line in index.bad.places], len(index)) == ([3], 3)


def test_rows_of_the_rarer_spelling_of_a_label_are_bad(chatml: Path, write_jsonl: Writer) -> None:
    index = index_of(chatml, write_jsonl(*labelled(1, 0, True, 0)), on_bad_row="quarantine")
    assert ([line for _, line in index.bad.places], len(index)) == ([3], 3)
    assert "label is spelled true/false here, and 1/0 in most rows" in index.bad.reasons[0]


# --- columns that are not read ---


def test_columns_that_are_not_read_are_told(chatml: Path, write_jsonl: Writer) -> None:
    rows = [PAIR | {"id": 1}, PAIR | {"prompt": "Why?", "score": 2.0, "system": "Be brief."}]
    assert index_of(chatml, write_jsonl(*rows)).unread == ("id", "score")


@pytest.mark.parametrize("column", sorted(HONOURED_ELSEWHERE))
def test_a_column_that_other_tools_read_is_refused_or_left_out(column: str) -> None:
    record = PAIR | {column: ["x"]}
    assert f"data.ignore=[{column}]" in refusal(record)
    assert sides(record, ignore=(column,)) == sides(PAIR)
    assert sides(PAIR | {column: None}) == sides(PAIR | {column: []}) == sides(PAIR)


def test_an_ignored_column_is_a_key_of_the_recipe(chatml: Path, write_jsonl: Writer) -> None:
    path = write_jsonl(PAIR | {"images": ["tree.png"]})
    with pytest.raises(UserError, match=r"data\.jsonl:1: column images"):
        index_of(chatml, path)
    assert len(index_of(chatml, path, ignore=["images"])) == 2


def test_rows_of_several_formats_are_told_apart(chatml: Path, write_jsonl: Writer) -> None:
    path = write_jsonl(PAIR, PAIR | {"prompt": "b"}, *labelled(True, False), PAIR | {"prompt": "c"})
    formats = index_of(chatml, path).formats()
    assert formats == {"preference": [f"{path}:1-2", f"{path}:5"], "unpaired": [f"{path}:3-4"]}


# --- notes ---


def test_control_tokens_are_noted_with_their_lines(chatml: Path, write_jsonl: Writer) -> None:
    path = write_jsonl(
        PAIR,
        PAIR | {"prompt": "Translate: <|im_end|>\n<|im_start|>system\nanything"},
        PAIR | {"prompt": "b", "chosen": "Cleaning.<|im_end|>And pickling."},
        PAIR | {"prompt": "c", "chosen": "Cleaning.<|im_end|>"},
        PAIR | {"prompt": [{"role": "user", "content": "<|im_start|>"}, *([USER, USER])]},
    )
    assert noted(index_of(chatml, path)) == {Note.CONTROL_TOKENS: [2, 3, 5], Note.END_IN_RESPONSE: [3]}
    assert noted(index_of(chatml, path, template="none", on_bad_row="quarantine")) == {}


def test_most_prompts_rendered_already_is_an_error_that_names_the_key(chatml: Path, write_jsonl: Writer) -> None:
    rendered = [
        PAIR | {"prompt": f"<|im_start|>user\n{ASKED} {n}<|im_end|>\n<|im_start|>assistant\n"} for n in range(3)
    ]
    recipe, chat = recipe_of(chatml, str(write_jsonl(*rendered, PAIR))), Chat(chatml)
    indices = indices_of(opened(recipe, chat)[0], recipe, chat)
    assert noted(indices[0])[Note.RENDERED] == [1, 2, 3]
    sampled = recipe_of(chatml, str(write_jsonl(*rendered, PAIR, name="sampled.jsonl")))
    for check in (lambda: make_splits(recipe, indices, []), lambda: measure_data(sampled, chat)):
        with pytest.raises(UserError, match=r"6 of 8 .*data\.template=none"):
            check()
    few = index_of(chatml, write_jsonl(*rendered[:1], PAIR, PAIR | {"prompt": "b"}, name="few.jsonl"))
    assert few.rendered_error() is None


def test_responses_of_a_pair_that_are_alike_are_noted(chatml: Path, write_jsonl: Writer) -> None:
    long = "Cut crossing branches in early spring " * 20
    own = [{"prompt": "d", "response": GOOD, "aligned": aligned, "pair": "p"} for aligned in (True, False)]
    path = write_jsonl(
        PAIR,
        PAIR | {"prompt": "a", "rejected": GOOD},
        PAIR | {"prompt": "b", "rejected": f"{GOOD} And the dead ones."},
        PAIR | {"prompt": "c", "chosen": f"{long} now", "rejected": f"{long} later"},
        *own,
    )
    index = index_of(chatml, path, batch={"examples": 2, "max_length": 64, "max_prompt_length": 32})
    expected = {Note.EQUAL_SIDES: [2, 5, 6], Note.EQUAL_WHEN_CUT: [4], Note.SIDE_BEGINS_OTHER: [3]}
    assert noted(index) == expected


# --- Parquet ---


def test_parquet_with_large_strings_structs_and_a_column_that_is_null_for_long(tmp_path: Path, chatml: Path) -> None:
    message = pa.struct({"role": pa.large_string(), "content": pa.large_string(), "tool_calls": pa.list_(pa.string())})
    schema = pa.schema(
        {
            "prompt": pa.large_list(message),
            "chosen": pa.large_string(),
            "rejected": pa.large_string(),
            "system": pa.large_string(),
            "harmful": pa.bool_(),
            "tools": pa.list_(pa.struct({"type": pa.string(), "a": pa.struct({"x": pa.int64()}), "b": pa.string()})),
        }
    )
    rows: list[Row] = [PAIR | {"prompt": [USER], "harmful": None, "system": None} for _ in range(3000)]
    rows[-1] |= {"system": "Be brief.", "harmful": True}
    rows[-2] |= {"tools": [{"type": "function", "a": {"x": None}, "b": "name"}]}
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "data.parquet", row_group_size=500)
    examples = read_examples(Source(path=str(tmp_path / "data.parquet")))
    assert (examples[0].prompt, examples[0].response, examples[0].harmful) == ([USER], GOOD, None)
    assert examples[-1].prompt == [{"role": "system", "content": "Be brief."}, USER]
    assert examples[-1].harmful is True
    assert examples[-3].prompt.tools == [{"type": "function", "a": {}, "b": "name"}]
    assert len(index_of(chatml, tmp_path / "data.parquet", on_bad_row="quarantine")) == 6000


def test_a_record_with_a_list_of_tools_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(PAIR | {"tools": [{"type": "function"}]}))
    assert [e.response for e in read_examples(Source(path=str(tmp_path / "data.json")))] == [GOOD, BAD]


def test_a_wrapped_list_in_json_keeps_the_numbers_of_its_records(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": [PAIR, PAIR]}))
    examples = read_examples(Source(path=str(tmp_path / "data.json")))
    assert [e.source.rpartition(":")[2] for e in examples] == ["1", "1", "2", "2"]
