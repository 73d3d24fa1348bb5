import json

import pytest
import transformers

from r1jax.quickstart.base_model import END, make_tokenizer, write_base_model
from r1jax.quickstart.problems import Problem, response

PROBLEM = Problem((7, 8, -5, 9))
MESSAGES = [
    {"role": "user", "content": PROBLEM.question},
    {"role": "assistant", "content": response(PROBLEM)},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_each_digit_role_and_tag_is_a_token(tokenizer):
    tokens = tokenizer.tokenize("<|im_start|>user\n12+3<think>\n</answer><|im_end|>")
    assert tokens == ["<|im_start|>", "user", "\n", "1", "2", "+", "3", "<think>", "\n", "</answer>", "<|im_end|>"]


def test_the_template_ends_each_turn_with_eos_and_opens_the_assistants(tokenizer):
    asked = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\n7+8-5+9=?<|im_end|><|im_start|>assistant\n"
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert whole == asked + MESSAGES[1]["content"] + END
    assert tokenizer.eos_token == END


def test_printable_text_comes_back_with_its_tags_and_without_special_tokens(tokenizer):
    text = "".join(chr(code) for code in range(32, 127)) + "\n the user's  <think> ok </think>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_transformers_loads_the_base_model_as_it_is(tmp_path):
    num_weights = write_base_model(tmp_path, seed=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_weights
    assert 4e5 < num_weights < 1e6
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).endswith(END)
    eos = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert eos == tokenizer.eos_token_id


def test_weights_follow_from_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_base_model(tmp_path / name, seed)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
