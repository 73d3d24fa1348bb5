import datasets
import pytest

from r1jax.config.data import DataConfig
from r1jax.config.errors import UserError
from r1jax.config.sampling import SamplingConfig
from r1jax.data.prompts import longest_answerable, read_prompts, with_solutions

SYSTEM = "system"


def read(tokenizer, rows, sampling=None, **data):
    keys = {"dataset_name": "x", **data}
    found = datasets.Dataset.from_list(rows)
    return read_prompts(found, DataConfig(**keys), SamplingConfig(**(sampling or {})), tokenizer)


def text(tokenizer, prompts, index):
    return "".join(tokenizer.convert_ids_to_tokens(prompts.ids(index)))


ASKED = [{"prompt": "1", "solution": "a", "other": 1}, {"prompt": "hi you", "solution": "b", "other": 2}]


def test_a_text_becomes_the_users_message_behind_the_system_prompt(tokenizer):
    prompts = read(tokenizer, ASKED, system_prompt=SYSTEM)
    assert text(tokenizer, prompts, 1) == (
        "<|im_start|>system\nsystem<|im_end|>\n<|im_start|>user\nhi you<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(prompts) == 2 and prompts.lengths.tolist() == [len(prompts.ids(0)), len(prompts.ids(1))]
    assert prompts.asked([1]) == [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hi you"}]]
    assert prompts.columns([1, 0]) == {"solution": ["b", "a"], "other": [2, 1]}
    assert prompts.prefill == "" and prompts.num_cut == 0


def test_a_conversation_stays_one_and_keeps_its_own_system_message(tokenizer):
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "c"}]
    own = [{"role": "system", "content": "a"}, *turns]
    prompts = read(tokenizer, [{"prompt": turns}, {"prompt": own}], system_prompt=SYSTEM)
    assert text(tokenizer, prompts, 0).startswith("<|im_start|>system\nsystem<|im_end|>\n<|im_start|>user\n1<|im_end|>")
    assert text(tokenizer, prompts, 1).startswith("<|im_start|>system\na<|im_end|>\n<|im_start|>user\n1<|im_end|>")
    assert text(tokenizer, prompts, 1).endswith("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")


def test_a_conversation_that_the_assistant_ends_is_continued(tokenizer):
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "<think>"}]
    assert text(tokenizer, read(tokenizer, [{"prompt": turns}]), 0).endswith("<|im_start|>assistant\n<think>")


def test_another_column_and_messages_that_rewards_do_not_see(tokenizer):
    rows = [{"question": "1", "prompt": "not this", "messages": [{"role": "user", "content": "2"}], "solution": "2"}]
    prompts = read(tokenizer, rows, dataset_prompt_column="question")
    assert "1<|im_end|>" in text(tokenizer, prompts, 0)
    assert prompts.columns([0]) == {"question": ["1"], "solution": ["2"]}


def test_what_the_template_opens_of_every_answer(tokenizer):
    """DeepSeek-R1's generation prompt ends with <think>; special tokens are no tags."""
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%"
    )
    prompts = read(tokenizer, ASKED)
    assert prompts.prefill == "<think>\n"
    assert text(tokenizer, prompts, 0).endswith("<|im_start|>assistant\n<think>\n")


def test_a_prompt_is_cut_at_its_beginning(tokenizer):
    whole, cut = read(tokenizer, ASKED), read(tokenizer, ASKED, {"max_prompt_length": 9})
    assert cut.ids(1) == whole.ids(1)[-9:] and cut.num_cut == 1 and cut.ids(0) == whole.ids(0)
    assert len(whole.ids(0)) <= 9 < len(whole.ids(1))


def test_a_model_without_a_template_gets_the_text_as_it_is(byte_tokenizer):
    byte_tokenizer.chat_template = None
    prompts = read(byte_tokenizer, ASKED)
    assert prompts.ids(1) == byte_tokenizer("hi you")["input_ids"]
    assert prompts.asked([1]) == ["hi you"] and not prompts.conversational


def test_the_fingerprint_is_of_the_prompts(tokenizer):
    one, same, other = read(tokenizer, ASKED), read(tokenizer, ASKED), read(tokenizer, ASKED[::-1])
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_many_rows_in_chunks(tokenizer):
    rows = [{"prompt": "1" if at % 2 else "hi"} for at in range(2500)]
    prompts = read(tokenizer, rows)
    assert len(prompts) == 2500 and prompts.ids(2001) == prompts.ids(1) != prompts.ids(2000)


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        (
            ASKED,
            {"dataset_prompt_column": "question"},
            "dataset_prompt_column: need a column of the dataset, got question",
        ),
        ([{"prompt": "1"}, {"prompt": None}], {}, "dataset_prompt_column: need a prompt in every row .* none in row 1"),
        ([{"prompt": 5}], {}, "dataset_prompt_column: need a prompt in every row of prompt, got none in row 0"),
        ([{"prompt": "1", "tools": "{"}], {}, "need JSON in tools"),
    ],
)
def test_rows_without_a_prompt_are_named(tokenizer, rows, data, message):
    with pytest.raises(UserError, match=message):
        read(tokenizer, rows, **data)


def test_what_needs_a_template_is_refused_without(byte_tokenizer):
    byte_tokenizer.chat_template = None
    with pytest.raises(UserError, match="system_prompt: need a model with a chat template"):
        read(byte_tokenizer, ASKED, system_prompt="a")
    with pytest.raises(UserError, match="need a text, as the model has no chat template, got conversation"):
        read(byte_tokenizer, [{"prompt": [{"role": "user", "content": "1"}]}])


def test_the_longest_prompt_must_leave_room(tokenizer):
    prompts = read(tokenizer, ASKED)
    longest = int(prompts.lengths.max())
    assert longest_answerable(prompts, 20, longest + 20) == longest + 20
    assert longest_answerable(prompts, 20, None) == longest + 20
    with pytest.raises(UserError, match=rf"max_completion_length: .* got {longest} \(row 1\) \+ 21"):
        longest_answerable(prompts, 21, longest + 20)


def test_solutions_under_another_name():
    rows = datasets.Dataset.from_list([{"prompt": "1", "answer": "a", "solution": "not this"}])
    assert with_solutions(rows, "answer").to_list() == [{"prompt": "1", "solution": "a"}]
    assert with_solutions(rows, "solution") is rows
    with pytest.raises(UserError, match="dataset_solution_column: need a column of the dataset, got gold"):
        with_solutions(rows, "gold")
