"""Messages as people publish them: what a template is given, and what is refused with the name of its key."""

from __future__ import annotations

from typing import Any

import pytest

from raydiv.data.formats import CANONICAL, BadRow, Example
from raydiv.model.chat import Conversation

USER = {"role": "user", "content": "How do I prune a lemon tree?"}
PAIR = {"prompt": USER["content"], "chosen": "In spring.", "rejected": "Trees."}


def examples_of(record: Any) -> list[Example]:
    return CANONICAL.examples(record, "data.jsonl:1")


def refusal(record: Any) -> str:
    with pytest.raises(BadRow) as caught:
        examples_of(record)
    return str(caught.value)


def assistant(**message: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", **message}]


def test_content_parts_of_text_are_text() -> None:
    parts = [{"type": "text", "text": "How do I prune "}, {"type": "text", "text": "a lemon tree?"}]
    answer = [{"type": "text", "text": "In spring."}]
    record = {"prompt": [{"role": "user", "content": parts}], "chosen": assistant(content=answer), "rejected": "Trees."}
    chosen, _ = examples_of(record)
    assert (chosen.prompt, chosen.response) == ([USER], "In spring.")
    image = [{"role": "user", "content": [{"type": "image", "image": "tree.png"}]}]
    assert "prompt.0.content.0 is a part of type image" in refusal(record | {"prompt": image})


def test_messages_of_from_and_value_are_read() -> None:
    record = {
        "prompt": [{"from": "human", "value": USER["content"]}],
        "chosen": [{"from": "gpt", "value": "In spring."}],
        "rejected": [{"from": "gpt", "value": "Trees."}],
    }
    assert [(e.prompt, e.response) for e in examples_of(record)] == [([USER], "In spring."), ([USER], "Trees.")]
    assert "prompt.0.from" in refusal(record | {"prompt": [{"from": "narrator", "value": "x"}]})


def test_a_system_column_is_a_system_turn() -> None:
    system = {"role": "system", "content": "Answer in one sentence."}
    for prompt in (USER["content"], [USER]):
        assert examples_of(PAIR | {"system": system["content"], "prompt": prompt})[0].prompt == [system, USER]
    assert examples_of(PAIR | {"system": None})[0].prompt == USER["content"]
    assert "system" in refusal(PAIR | {"system": "x", "prompt": [system, USER]})


def test_tools_and_template_options_of_a_record_go_with_its_prompt() -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    record = PAIR | {"tools": [tool], "chat_template_kwargs": {"enable_thinking": False, "absent": None}}
    expected = Conversation([USER], [tool], {"enable_thinking": False})
    assert examples_of(record)[0].prompt == expected
    as_text = {"tools": '[{"type": "function"}]', "chat_template_kwargs": '{"enable_thinking": false}'}
    assert examples_of(PAIR | as_text)[0].prompt == Conversation(
        [USER], [{"type": "function"}], {"enable_thinking": False}
    )
    assert examples_of(PAIR | {"tools": [], "chat_template_kwargs": {}})[0].prompt == USER["content"]
    for name, value in (("tools", "x"), ("tools", ["x"]), ("chat_template_kwargs", "[]"), ("chat_template_kwargs", 3)):
        assert name in refusal(PAIR | {name: value})
    assert "messages is set" in refusal(PAIR | {"chat_template_kwargs": {"messages": []}})


def test_thought_and_tool_calls_stay_with_the_response() -> None:
    thought = {"content": "In spring.", "reasoning_content": "They ask about plants."}
    assert examples_of(PAIR | {"chosen": assistant(**thought)})[0].response == {"role": "assistant", **thought}
    call = {"type": "function", "function": {"name": "look_up", "arguments": '{"plant": "lemon"}'}}
    response = examples_of(PAIR | {"chosen": assistant(content=None, tool_calls=[call])})[0].response
    assert isinstance(response, dict)
    assert response["content"] == ""
    assert response["tool_calls"][0]["function"]["arguments"] == {"plant": "lemon"}
    assert "tool_calls" in refusal(PAIR | {"chosen": assistant(content=None, tool_calls=[{"name": "look_up"}])})
    assert "content" in refusal(PAIR | {"chosen": assistant(content=None)})


def test_sides_that_repeat_the_prompt_are_the_answers_after_it() -> None:
    sides = {"chosen": [USER, *assistant(content="In spring.")], "rejected": [USER, *assistant(content="Trees.")]}
    for prompt in (USER["content"], [USER]):
        found = examples_of({"prompt": prompt, **sides})
        assert [(e.prompt, e.response, e.aligned) for e in found] == [
            ([USER], "In spring.", True),
            ([USER], "Trees.", False),
        ]
    system = {"role": "system", "content": "Be brief."}
    with_system = {name: [system, *side] for name, side in sides.items()}
    assert examples_of({"prompt": USER["content"], **with_system})[0].prompt == [system, USER]
    other = [{"role": "user", "content": "And roses?"}, *assistant(content="Trees.")]
    assert "prompt" in refusal({"prompt": USER["content"], **sides, "rejected": other})
    assert "prompt" in refusal({"prompt": "And roses?", **sides})


def test_both_sides_without_a_prompt_column_keep_the_other_columns() -> None:
    sides = {"chosen": [USER, *assistant(content="In spring.")], "rejected": [USER, *assistant(content="Trees.")]}
    system = {"role": "system", "content": "Be brief."}
    assert examples_of({**sides, "system": "Be brief."})[0].prompt == [system, USER]


@pytest.mark.parametrize(
    "turn",
    [
        {"from": ["human"], "value": "x"},
        {"role": "assistant", "content": "x", "tool_calls": 5},
        {"role": "user", "content": [{"type": "PLANTED text of a row"}]},
    ],
)
def test_messages_of_other_shapes_are_bad_rows_without_their_text(turn: dict[str, Any]) -> None:
    assert "PLANTED" not in refusal(PAIR | {"prompt": [turn]})
