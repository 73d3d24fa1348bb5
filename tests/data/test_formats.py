import datasets
import pytest

from r1jax.config.data import DataConfig
from r1jax.config.objective import ObjectiveConfig
from r1jax.data.formats import detect_format

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def detect(row: dict, **keys):
    masks = {name: keys.pop(name) for name in list(keys) if name.endswith("_only_loss")}
    return detect_format(
        datasets.Dataset.from_list([row]), DataConfig(dataset_name="x", **keys), ObjectiveConfig(**masks)
    )


def test_columns_decide_and_messages_go_first():
    row = {"text": "a", "completion": "b", "prompt": "a", "messages": MESSAGES}
    for kind, columns, conversational in [
        ("messages", ("messages",), True),
        ("prompt_completion", ("prompt", "completion"), False),
        ("text", ("text",), False),
    ]:
        found = detect(row)
        assert (found.kind, found.columns, found.conversational) == (kind, columns, conversational)
        del row[columns[0]]


def test_sharegpt_conversations_tools_and_template_variables():
    row = {"conversations": [{"from": "human", "value": "x"}], "tools": "[]", "chat_template_kwargs": {"a": 1}}
    found = detect(row)
    assert (found.kind, found.columns, found.conversational) == ("messages", ("conversations",), True)
    assert found.all_columns == ["conversations", "tools", "chat_template_kwargs"]
    assert detect({"text": "a", "tools": "[]"}).all_columns == ["text"]


def test_tokens_go_before_all_else():
    row = {"messages": MESSAGES, "input_ids": [1], "labels": [1], "assistant_masks": [1]}
    found = detect(row)
    assert (found.kind, found.all_columns) == ("tokens", ["input_ids", "labels", "assistant_masks"])


def test_named_columns_go_before_those_found():
    row = {"messages": MESSAGES, "question": "a", "answer": "b", "body": "c"}
    found = detect(row, dataset_prompt_column="question", dataset_completion_column="answer")
    assert (found.kind, found.columns) == ("prompt_completion", ("question", "answer"))
    assert detect(row, dataset_text_field="body").columns == ("body",)


def test_prompt_and_completion_as_conversations():
    assert detect({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}).conversational


@pytest.mark.parametrize(("key", "pair", "text"), [(None, True, False), (True, True, None), (False, False, False)])
def test_completion_only_loss(key, pair, text):
    assert detect({"prompt": "a", "completion": "b"}, completion_only_loss=key).completion_only is pair
    if text is not None:
        assert detect({"text": "a"}, completion_only_loss=key).completion_only is text
        return
    with pytest.raises(
        ValueError, match=r"^completion_only_loss: need rows of prompt and completion, got rows of text; "
    ):
        detect({"text": "a"}, completion_only_loss=key)


def test_assistant_only_loss_needs_conversations():
    assert detect({"messages": MESSAGES}, assistant_only_loss=True).assistant_only
    both = detect({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, assistant_only_loss=True)
    assert both.assistant_only and both.completion_only
    message = r"^assistant_only_loss: need rows of messages with roles, got strings in prompt and completion; "
    with pytest.raises(ValueError, match=message):
        detect({"prompt": "a", "completion": "b"}, assistant_only_loss=True)


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ({"a": "x", "b": "y"}, {}, "^dataset_name: need a column messages.*got the columns a, b; name yours"),
        ({"prompt": "x"}, {}, "^dataset_name: need a column messages.*got the columns prompt; "),
        ({"text": "x"}, {"dataset_prompt_column": "q"}, "^dataset_prompt_column: need a column .* got q; .* text"),
        ({"text": "x"}, {"dataset_text_field": "t"}, "^dataset_text_field: need a column .* got t; "),
        (
            {"prompt": "x", "completion": MESSAGES},
            {},
            "^dataset_name: .*got string in prompt and conversation in compl",
        ),
        ({"messages": "x"}, {}, "^dataset_name: need a conversation in messages, got string in messages"),
        ({"text": MESSAGES}, {}, "^dataset_name: need a string in text, got conversation in text"),
        ({"messages": [{"name": "a", "value": "b"}]}, {}, "^dataset_name: .*a list that is neither in messages"),
    ],
)
def test_errors(row, keys, message):
    with pytest.raises(ValueError, match=message):
        detect(row, **keys)
