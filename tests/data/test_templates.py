from pathlib import Path

import pytest

from r1jax.config.errors import UserError
from r1jax.data.formats import RowFormat
from r1jax.data.templates import check_tokenizer, end_of_turn, prepare_tokenizer, with_chatml

MESSAGES = RowFormat(kind="messages", columns=("messages",), conversational=True, completion_only=False)
TEXT = RowFormat(kind="text", columns=("text",), conversational=False, completion_only=False)


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


def test_a_format_needs_an_eos_that_ends_its_rows(tokenizer):
    assert check_tokenizer(tokenizer, MESSAGES) == check_tokenizer(tokenizer, TEXT) == "<|im_end|>"
    tokenizer.eos_token = "</s>"
    message = r"^eos_token: need <\|im_end\|>, with which the .*, got </s>; set eos_token: <\|im_end\|>$"
    with pytest.raises(UserError, match=message):
        check_tokenizer(tokenizer, MESSAGES)
    assert check_tokenizer(tokenizer, TEXT) == "</s>"
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"^eos_token: need <\|im_end\|>.*, got null; "):
        check_tokenizer(tokenizer, MESSAGES)
    with pytest.raises(UserError, match=r"^eos_token: need a token that ends a text, got null; "):
        check_tokenizer(tokenizer, TEXT)


def test_an_eos_whose_text_is_not_one_token_is_refused_until_it_is_named(tokenizer, tmp_path: Path):
    tokenizer.eos_token = "yes no"
    with pytest.raises(UserError, match=r"^eos_token: need a text that the tokenizer reads as one token, got 'yes no'"):
        check_tokenizer(tokenizer, TEXT)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    named = prepare_tokenizer(tmp_path, eos_token="yes")  # a plain word of the vocabulary
    assert named("hiyes")["input_ids"][-1] == named.eos_token_id == tokenizer.convert_tokens_to_ids("yes")


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        ("{% for m in messages %}{{ m['content'] }}</s>\n{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m['content'] }}\n<|im_end|>\n{% endfor %}</s>", "<|im_end|>"),
        ("{% for m in messages %}{{ ' ' + m['content'] | trim + ' ' + '</s>' }}{% endfor %}", "</s>"),
    ],
)
def test_end_of_turn_is_the_first_special_token_after_the_answer(tokenizer, template, ending):
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == ending


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "^chat_template: need a template for conversations, got null; "),
        ("{% for m in messages %}{{ m['content'] }}?{% endfor %}", "need a special token after .*, got '\\?'; "),
        ("<s>{{ messages[0]['content'] }}</s>", "need the assistant's words in what it writes"),
        ("{{ raise_exception('no') }}", "need a template for a question and its answer, got the chat .* it: no; "),
    ],
)
def test_templates_that_end_no_turn(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        end_of_turn(tokenizer)


def test_chatml_adds_what_is_missing(byte_tokenizer, tokenizer):
    made = with_chatml(byte_tokenizer)
    size = len(byte_tokenizer)
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id, len(made)) == (size, size + 1, size + 1, size + 2)
    assert byte_tokenizer.chat_template is None and len(byte_tokenizer) == size
    assert end_of_turn(made) == made.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    text = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"
    assert made.apply_chat_template(messages, tokenize=False) == text
    asked = made.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == text[: text.index("sat")]
    assert len(with_chatml(tokenizer)) == len(tokenizer)  # both tokens were there
