import dataclasses

import pytest

from r1jax.data.formats import RowFormat
from r1jax.data.messages import RowError
from r1jax.data.rendering import render

MESSAGES = RowFormat(kind="messages", columns=("messages",), conversational=True, completion_only=False)
TEXT = RowFormat(kind="text", columns=("text",), conversational=False, completion_only=False)


def pair(*, conversational: bool, completion_only: bool = True) -> RowFormat:
    return RowFormat(
        kind="prompt_completion",
        columns=("prompt", "completion"),
        conversational=conversational,
        completion_only=completion_only,
    )


def say(role: str, content: str | None, **more) -> dict:
    return {"role": role, "content": content, **more}


def trained_text(rendered) -> str:
    return "".join(rendered.text[start:stop] for start, stop in rendered.trained)


def test_messages_are_trained_on_as_the_template_writes_them(tokenizer):
    rendered = render({"messages": [say("user", "hi"), say("assistant", "yes")]}, MESSAGES, tokenizer)
    assert rendered.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert trained_text(rendered) == rendered.text
    assert rendered.prompt is None


def test_conversational_completion_starts_after_the_generation_prompt(tokenizer):
    row = {"prompt": [say("user", "hi")], "completion": [say("assistant", "yes")]}
    rendered = render(row, pair(conversational=True), tokenizer)
    assert rendered.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert trained_text(rendered) == "yes<|im_end|>\n"
    whole = render(row, pair(conversational=True, completion_only=False), tokenizer)
    assert trained_text(whole) == rendered.text


def test_generation_prompt_that_the_answer_does_not_repeat(tokenizer):
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    row = {"prompt": [say("user", "hi")], "completion": [say("assistant", "yes")]}
    rendered = render(row, pair(conversational=True), tokenizer)
    assert rendered.prompt is not None and rendered.prompt.endswith("assistant\n<think>\n")
    assert trained_text(rendered) == "yes<|im_end|>\n"


def test_prompt_that_ends_with_the_assistant_is_continued(tokenizer):
    row = {"prompt": [say("user", "hi"), say("assistant", "yes")], "completion": [say("user", "hi")]}
    rendered = render(row, pair(conversational=True), tokenizer)
    assert rendered.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes"
    assert trained_text(rendered).startswith("<|im_end|>\n<|im_start|>user")


def test_plain_text_gets_the_eos_once(tokenizer):
    assert render({"text": "hi"}, TEXT, tokenizer).text == "hi<|im_end|>"
    assert render({"text": "hi<|im_end|>"}, TEXT, tokenizer).text == "hi<|im_end|>"
    rendered = render({"prompt": "a", "completion": " b"}, pair(conversational=False), tokenizer)
    assert (rendered.text, trained_text(rendered)) == ("a b<|im_end|>", " b<|im_end|>")


def test_keys_that_arrow_filled_with_none_are_not_there_for_the_template(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ 'tool' if 'tool_calls' in m }}{% endfor %}"
    row = {"messages": [say("user", "hi", tool_calls=None), say("assistant", " you", tool_calls=["x"])]}
    assert render(row, MESSAGES, tokenizer).text == "hi youtool"


@pytest.mark.parametrize(
    ("row", "row_format", "message"),
    [
        ({"text": None}, TEXT, "need a string in text, got nothing"),
        ({"messages": []}, MESSAGES, "need a conversation in messages, got a list that is neither"),
        ({"messages": [say("user", None)]}, MESSAGES, "need text in every message, got none from the user"),
    ],
)
def test_rows_that_cannot_be_rendered(tokenizer, row, row_format, message):
    with pytest.raises(RowError, match=message):
        render(row, row_format, tokenizer)


def test_row_that_the_template_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match="the chat template refuses it: roles must alternate"):
        render({"messages": [say("user", "hi")]}, MESSAGES, tokenizer)


def test_sharegpt_rows_are_written_like_messages(tokenizer):
    sharegpt = dataclasses.replace(MESSAGES, columns=("conversations",))
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
    same = {"messages": [say("user", "hi"), say("assistant", "yes")]}
    assert render(row, sharegpt, tokenizer) == render(same, MESSAGES, tokenizer)


def test_tools_and_variables_reach_the_template_for_text_prompt_and_answers(tokenizer):
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.name }}:{% endfor %}{{ mood }}\n" + tokenizer.chat_template
    )
    both = {"template_columns": ("tools", "chat_template_kwargs"), "assistant_only": True}
    row_format = dataclasses.replace(pair(conversational=True), **both)
    row = {"prompt": [say("user", "hi")], "completion": [say("assistant", "yes")]}
    row |= {"tools": '[{"name": "add"}]', "chat_template_kwargs": {"mood": "a"}}
    rendered = render(row, row_format, tokenizer)
    assert rendered.prompt == "add:a\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.text == rendered.prompt + "yes<|im_end|>\n"
    assert trained_text(rendered) == "yes<|im_end|>"
    # Columns that the format does not name are not read.
    assert render(row, pair(conversational=True), tokenizer).text.startswith("\n<|im_start|>")
