import json

import pytest

from r1jax.data.messages import RowError, is_conversation, read_messages, read_template_kwargs, read_tools

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_sharegpt_becomes_roles():
    given = [("system", "s"), ("human", "u"), ("gpt", "a"), ("observation", "o"), ("tool", "t"), ("assistant", "b")]
    messages = read_messages([{"from": name, "value": words, "weight": None} for name, words in given])
    roles = ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert messages == [{"role": role, "content": words} for role, (_, words) in zip(roles, given, strict=True)]


def test_keys_that_arrow_filled_with_none_are_taken_out_at_every_depth():
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": None}}, "id": None}
    given = {"role": "assistant", "content": None, "name": None, "from": None, "tool_calls": [call]}
    (message,) = read_messages([given])
    expected = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    assert message == {"role": "assistant", "content": None, "tool_calls": expected}
    assert call["id"] is None and call["function"]["arguments"]["b"] is None  # the row itself stays as it is


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"from": "narrator", "value": "x"}, "need `from` to be one of human, .*, got 'narrator' in message 0"),
        ({"from": "human", "value": None}, "need text in every message, got none from the user"),
        ({"role": "user", "content": None}, "need text in every message, got none from the user"),
        ({"role": None, "content": "x"}, "need a role in every message, got none in message 0"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "got none from the assistant"),
    ],
)
def test_malformed_messages(message, error):
    assert is_conversation([message])
    with pytest.raises(RowError, match=error):
        read_messages([message])


def test_what_is_no_conversation():
    for value in (
        None,
        "x",
        [],
        [{}],
        [{"role": "user"}],
        [{"from": "human"}],
        [{"role": "user", "content": "x"}, "y"],
    ):
        assert not is_conversation(value)


def test_tools_as_a_list_or_json():
    filled = {**TOOL, "strict": None}
    assert read_tools([filled]) == read_tools(json.dumps([TOOL])) == [TOOL]
    assert read_tools(None) is read_tools([]) is read_tools("") is read_tools("null") is None


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("[{", r"need JSON in tools, got '\[\{'"),
        (json.dumps(TOOL), "need a list of functions"),
        (["add"], "need a list of functions"),
        ({"a": 1}, "need a list of functions"),
    ],
)
def test_malformed_tools(value, error):
    with pytest.raises(RowError, match=error):
        read_tools(value)


def test_template_kwargs_as_an_object_or_json():
    assert read_template_kwargs({"enable_thinking": False, "date": None}) == {"enable_thinking": False}
    assert read_template_kwargs('{"enable_thinking": false}') == {"enable_thinking": False}
    assert read_template_kwargs(None) == read_template_kwargs("") == {}


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ([1], "need an object, or JSON of one, in chat_template_kwargs"),
        ("x", "need JSON in chat_template_kwargs, got 'x'"),
        ({"tools": []}, "names in chat_template_kwargs that are not r1jax's own, got tools"),
        ({"add_generation_prompt": True}, "got add_generation_prompt"),
        ({"continue_final_message": True}, "got continue_final_message"),
    ],
)
def test_malformed_template_kwargs(value, error):
    with pytest.raises(RowError, match=error):
        read_template_kwargs(value)
