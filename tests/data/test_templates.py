from pathlib import Path

import pytest

from r1jax.data.formats import RowFormat
from r1jax.data.templates import RowError, check_tokenizer, prepare_tokenizer, render

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


def test_prepare_tokenizer_overrides(tokenizer, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "other.jinja"
    file.write_text("{{ messages[0]['content'] }}")
    assert prepare_tokenizer(tmp_path).eos_token == "<|im_end|>"
    assert prepare_tokenizer(tmp_path).chat_template == tokenizer.chat_template
    changed = prepare_tokenizer(tmp_path, "{{ messages }}", "</s>")
    assert (changed.chat_template, changed.eos_token, changed.eos_token_id) == ("{{ messages }}", "</s>", 2)
    assert prepare_tokenizer(tmp_path, str(file)).chat_template == "{{ messages[0]['content'] }}"
    refusing = "{% generation %}{{ raise_exception('no') }}{% endgeneration %}"
    assert prepare_tokenizer(tmp_path, refusing).chat_template == refusing


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"chat_template": "gone.jinja"}, "^chat_template: need jinja text or an existing file, got 'gone.jinja'; "),
        ({"chat_template": "{% for %}"}, "^chat_template: need valid jinja, got line 1; "),
        ({"eos_token": "<eos>"}, "^eos_token: need a token of the vocabulary, got '<eos>'; "),
    ],
)
def test_prepare_tokenizer_errors(tokenizer, tmp_path: Path, keys, message):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        prepare_tokenizer(tmp_path, **keys)


def test_directory_without_tokenizer(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^model_name_or_path: need a model with a tokenizer, got ") as caught:
        prepare_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_a_format_needs_of_the_tokenizer(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match=r"^chat_template: need a template for the conversations in messages, got null; "
    ):
        check_tokenizer(tokenizer, MESSAGES)
    check_tokenizer(tokenizer, TEXT)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"^eos_token: need a token that ends a text, got null; "):
        check_tokenizer(tokenizer, TEXT)
