"""Records in the layouts people have, as examples; what is not used is named."""

from __future__ import annotations

import json
import logging
from datetime import date
from typing import Any

import pytest

from mira.core.errors import UserError
from mira.data.records import Tally, to_example
from mira.data.types import Example, Message

ASKED, SAID = Message("user", "Hi"), Message("assistant", "Ho")
TALK = Example("", "", "Ho", (ASKED, SAID))
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLED = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def calls(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [TURNS[0], *turns, {"role": "tool", "content": "sunny"}, TURNS[1]], **more}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"conversations": TURNS},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"conversation": [{"from": "Human", "value": "Hi"}, {"from": " GPT", "value": "Ho"}]},
        {"messages": [{"role": "User", "content": "Hi"}, {"role": "Assistant", "content": "Ho"}]},
        {"messages": [{"role": "human", "content": "Hi"}, {"role": "model", "content": "Ho"}]},
        {"messages": json.dumps(TURNS)},
        {"Messages": [{**turn, "weight": 1, "name": None} for turn in TURNS], "tools": [], "system": ""},
        {
            "messages": [
                {**TURNS[0], "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                TURNS[1],
            ]
        },
        {"messages": TURNS, "prompt": None, "completion": ""},
    ],
)
def test_a_conversation_in_any_spelling(record: dict[str, Any]) -> None:
    assert to_example(record, "f:1") == TALK


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "q", "context": "c", "response": "a"}, Example("q", "c", "a")),
        ({"question": "q", "answer": "a"}, Example("q", "", "a")),
        ({"query": "q", "response": "a"}, Example("q", "", "a")),
        ({"prompt": "q", "response": "a"}, Example("q", "", "a")),
        ({"Instruction": "q", " Output ": "a"}, Example("q", "", "a")),
        ({"instruction": "", "input": "q", "output": "a"}, Example("", "q", "a")),
        ({"instruction": "q", "input": float("nan"), "output": "a"}, Example("q", "", "a")),
        ({"prompt": "France is", "completion": " Paris"}, Example("France is", "", " Paris", raw=True)),
        ({"prompt": "", "completion": "Paris"}, Example("", "", "Paris", raw=True)),
    ],
)
def test_a_pair_in_any_spelling(record: dict[str, Any], expected: Example) -> None:
    assert to_example(record, "f:1") == expected


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (0, "0"), (2.5, "2.5"), (True, "true"), (False, "false")])
def test_numbers_and_booleans_are_text_as_json_writes_them(value: object, text: str) -> None:
    assert to_example({"instruction": "q", "output": value}, "f:1").output == text


def test_an_example_knows_its_place() -> None:
    for record in ({"messages": TURNS}, {"prompt": "p", "completion": "c"}, {"instruction": "q", "output": "a"}):
        assert to_example(record, "f:7").place == "f:7"


def test_messages_in_prompt_and_completion_learn_the_completion_alone() -> None:
    earlier = [*TURNS, {"role": "user", "content": "And?"}]
    found = to_example({"prompt": earlier, "completion": [TURNS[1]]}, "f:1")
    assert [(m.role, m.learned) for m in found.messages] == [
        ("user", True), ("assistant", False), ("user", True), ("assistant", True)
    ]  # fmt: skip
    assert to_example({"prompt": [TURNS[0]], "completion": "Ho"}, "f:1") == TALK
    assert to_example({"prompt": "Hi", "completion": [TURNS[1]]}, "f:1") == TALK


def test_a_turn_of_weight_0_is_context() -> None:
    wrong = {"role": "assistant", "content": "Hm", "weight": 0}
    found = to_example({"messages": [TURNS[0], wrong, *TURNS]}, "f:1")
    assert [m.learned for m in found.messages] == [True, False, True, True]
    cut = to_example({"messages": [*TURNS, TURNS[0], wrong]}, "f:1")  # nothing after the last learned turn is of use
    assert cut == TALK


def test_system_and_history_make_a_conversation() -> None:
    record = {"instruction": "Sum", "input": "1", "output": "2", "system": "Be kind.", "history": [["Hi", "Ho"]]}
    found = to_example(record, "f:1")
    asked = (Message("system", "Be kind."), ASKED, SAID, Message("user", "Sum\n\n1"))
    assert found.messages == (*asked, Message("assistant", "2"))
    bare = to_example({"question": "Hi", "response": "Ho", "system_prompt": "Be kind."}, "f:1")
    assert bare.messages == (Message("system", "Be kind."), ASKED, SAID)
    shared = to_example({"conversations": TURNS, "system": "Be kind."}, "f:1")
    assert shared.messages == (Message("system", "Be kind."), ASKED, SAID)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [call({"city": "Rome"})]},
        {"role": "assistant", "tool_calls": [call('{"city": "Rome"}')]},
        {"role": "assistant", "content": "", "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
    ],
)
def test_calls_of_tools_keep_their_arguments_as_objects(turn: dict[str, Any]) -> None:
    found = to_example(calls(turn, tools=[WEATHER]), "f:1")
    assert found.messages[1] == Message("assistant", "", more=json.dumps({"tool_calls": [CALLED]}))
    assert found.messages[2] == Message("tool", "sunny")
    assert json.loads(found.tools) == [WEATHER]


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER]), [WEATHER["function"]]])
@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_are_in_one_layout_with_their_keys_in_the_order_given(name: str, tools: object) -> None:
    assert to_example({"messages": TURNS, name: tools}, "f:1").tools == json.dumps([WEATHER])


def test_what_else_templates_read_of_a_turn_is_kept() -> None:
    turn = {**TURNS[1], "reasoning_content": "since é", "name": "bot"}
    found = to_example({"messages": [TURNS[0], turn]}, "f:1")
    assert json.loads(found.messages[1].more) == {"name": "bot", "reasoning_content": "since é"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [{**TURNS[0], "content": [{"type": "image_url"}]}, TURNS[1]]},
            r"\[0\]: part 0 .* is 'image_url'",
        ),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}, r"messages\[1\]: weight 0\.5 is not 0"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "every assistant turn of 'messages' has weight 0"),
        ({"messages": [{"role": "system", "content": "s"}, *TURNS], "system": "s"}, "field 'system' and a system turn"),
        (calls({"role": "assistant", "tool_calls": "weather"}), "tool_calls must be a list"),
        (calls({"role": "assistant", "tool_calls": [{"type": "function"}]}), "needs a function with its name"),
        (calls({"role": "assistant", "tool_calls": [call("{")]}), "field 'arguments' is text that is not JSON"),
        ({"messages": TURNS, "tools": {"name": "w"}}, "field 'tools' must be a list"),
        ({"messages": TURNS, "tools": [{"name": "\ud800"}]}, "field 'tools' holds half a character"),
        (
            {"messages": [TURNS[0], {**TURNS[1], "name": date(2026, 1, 2)}]},
            "field 'name' holds no JSON value",
        ),
        ({"instruction": "q", "output": "a", "history": 7}, "field 'history' must be a list of pairs"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "data.columns={prompt: prompt, completion: chosen}"),
        ({"version": 1, "data": [{"question": "q", "answer": "a"}]}, "the list in field 'data'; write that list alone"),
    ],
)
def test_what_cannot_be_learned_is_one_line(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        to_example(record, "f:1")
    assert str(caught.value).startswith("f:1: ")


def test_what_is_not_used_is_named_once_with_its_count(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally(also={"client"})
    pair = {"instruction": "q", "output": "a", "client": "x"}
    records = [
        {**pair, "Text": "q a", "id": 0},
        {**pair, "prompt": "as a prompt", "id": None},
        {"messages": [TURNS[0], {**TURNS[1], "rating": 5}], "client": "x"},
        {"prompt": "p", "completion": "c", "system": "s"},
    ]
    for number, record in enumerate(records):
        tally.example(f"f:{number}", record)
    with caplog.at_level(logging.WARNING):
        tally.tell()
    assert caplog.messages == [
        "unused fields: 'Text' (in 1 of 4 examples), 'id' (in 1 of 4 examples), 'messages[].rating' (in 1 of 4 examples),"
        " 'prompt' (in 1 of 4 examples), 'system' (in 1 of 4 examples)"
    ]
    assert tally.layouts == {"instruction + output": 2, "messages": 1, "prompt + completion": 1}
