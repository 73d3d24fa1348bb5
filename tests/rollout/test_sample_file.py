import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from r1jax.config.errors import UserError
from r1jax.rollout.sample_file import (
    Finished,
    PromptRow,
    append,
    begin,
    encode_prompt,
    finished,
    read_prompts,
    settings_path,
)

ROWS = [PromptRow(1, {"prompt": "one", "id": 7}), PromptRow(2, {"prompt": "zwei", "ü": None})]
ANSWERS = [[{"text": "a"}, {"text": "b"}], [{"text": "ß"}, {"text": "d"}]]
SETTINGS = {"num_generations": 2, "temperature": 0.5}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last or m.role != 'assistant' %}|{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def prompts_file(tmp_path):
    def write(text):
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def output(tmp_path):
    return tmp_path / "deep" / "out.jsonl"


def test_rows_come_with_their_lines(prompts_file):
    path = prompts_file('{"prompt": "one", "id": 7}\n\n{"messages": [{"role": "user", "content": "x"}]}\r\n')
    assert [(found.line, list(found.row)) for found in read_prompts(path)] == [(1, ["prompt", "id"]), (3, ["messages"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "x"}\n{"prompt": ', "JSON on every line, got something else at line 2;"),
        (b'{"prompt": "\xff"}', "JSON on every line, got something else at line 1;"),
        ('{"prompt": "\\ud800"}', "JSON on every line, got something else at line 1;"),
        ('[1]\n{"prompt": "x"}', r"in every row, got \[1\] at line 1;"),
        ('{"text": "x"}', r'got only \["text"\] at line 1;'),
        ('{"prompt": 3}', "got prompt: 3 at line 1;"),
        ('{"messages": []}', r"got messages: \[\] at line 1;"),
        ('{"messages": [{"role": "user"}]}', r'got the message {"role": "user"} at line 1;'),
        ("\n \n", "at least one row"),
    ],
)
def test_a_row_without_a_prompt_is_refused_by_its_line(prompts_file, text, message):
    with pytest.raises(UserError, match=f"^prompts: .*{message}"):
        read_prompts(prompts_file(text))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path, what in ((tmp_path / "none", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=what):
            read_prompts(path)


@pytest.fixture(scope="module")
def tokenizer():
    """A token a character, and `^` (id 0) put before a text that is tokenised by itself."""
    characters = "^abcdefghijklmnopqrstuvwxyz<>| "
    inner = Tokenizer(models.WordLevel({character: index for index, character in enumerate(characters)}, "^"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "ab"}, "^ab"),
        ({"messages": [{"role": "user", "content": "ab"}]}, "<user>ab|<assistant>"),
        (
            {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]},
            "<user>ab|<assistant>c",
        ),
        ({"prompt": "ab", "messages": [{"role": "user", "content": "c"}]}, "^ab"),
    ],
)
def test_text_is_read_as_it_is_and_messages_by_the_template(tokenizer, row, text):
    ids = encode_prompt(PromptRow(1, row), tokenizer)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == text


def test_messages_need_a_template_that_takes_them(tokenizer):
    row = PromptRow(4, {"messages": [{"role": "user", "content": "ab"}]})
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="chat template for messages, got messages at line 4"):
        encode_prompt(row, bare)
    bare.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="got others at line 4; no"):
        encode_prompt(row, bare)


def write(output, count):
    begin(output, Finished(0, 0), SETTINGS)
    append(output, [found.row for found in ROWS[:count]], ANSWERS[:count])
    return output.read_bytes()


def test_rows_keep_their_values_and_gain_their_generations(output):
    write(output, 2)
    lines = output.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"prompt": "one", "id": 7, "generations": ANSWERS[0]}
    assert lines[1] == '{"prompt": "zwei", "ü": null, "generations": [{"text": "ß"}, {"text": "d"}]}'


@pytest.mark.parametrize("cut", [b"", b"{", b'{"prompt": "zwei", "\xc3', b'{"prompt": "zw\n'])
def test_finished_rows_are_kept_and_a_piece_of_a_line_goes(output, cut):
    whole = write(output, 1)
    output.write_bytes(whole + cut)
    done = finished(output, ROWS, SETTINGS)
    assert done == Finished(1, len(whole))
    begin(output, done, SETTINGS)
    append(output, [ROWS[1].row], ANSWERS[1:])
    resumed = output.read_bytes()
    assert resumed == write_afresh(output)
    assert finished(output, ROWS, SETTINGS) == Finished(2, len(resumed))


def write_afresh(output):
    output.unlink()
    return write(output, 2)


def test_no_file_and_an_empty_one_hold_nothing(output):
    assert finished(output, ROWS, SETTINGS) == Finished(0, 0)
    begin(output, Finished(0, 0), SETTINGS)
    assert finished(output, ROWS, SETTINGS) == Finished(0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "somebody's notes",
        '{"prompt": "other", "id": 7, "generations": [{}, {}]}\n',
        '{"prompt": "one", "id": 8, "generations": [{}, {}]}\n',
        '{"prompt": "one", "id": 7}\n',
        '{"prompt": "one", "id": 7, "generations": [{}]}\n',
        "{\n\n",
    ],
)
def test_a_file_with_anything_else_is_left_alone(output, text):
    output.parent.mkdir()
    output.write_text(text)
    with pytest.raises(UserError, match=r"output: need .*, got something else at line 1;"):
        finished(output, ROWS, SETTINGS)
    assert output.read_text() == text


def test_more_rows_than_prompts_are_refused(output):
    write(output, 2)
    with pytest.raises(UserError, match="something else at line 2"):
        finished(output, ROWS[:1], SETTINGS)


def test_other_settings_never_continue_a_file(output):
    write(output, 1)
    with pytest.raises(UserError, match=r"temperature: need 0.5, with which .* was begun, got 0.7;"):
        finished(output, ROWS, {**SETTINGS, "temperature": 0.7})
    settings_path(output).unlink()
    assert finished(output, ROWS, {**SETTINGS, "temperature": 0.7}).rows == 1


def test_the_output_is_no_folder(tmp_path):
    with pytest.raises(UserError, match="output: need a file"):
        finished(tmp_path, ROWS, SETTINGS)
