import pickle
from importlib import util

import pytest

from r1jax.config.errors import UserError
from r1jax.config.rewards import REWARD_NAMES, CodeRewardsConfig, RewardsConfig
from r1jax.rewards.registry import check_columns, make_rewards

RUNS_CODE = ("code", "binary_code", "ioi_code", "cf_code")
FUNCTIONS = {
    "accuracy": "accuracy_reward",
    "format": "format_reward",
    "tag_count": "tag_count_reward",
    "reasoning_steps": "reasoning_steps_reward",
    "cosine": "cosine_scaled_reward",
    "repetition_penalty": "repetition_penalty_reward",
    "length": "len_reward",
    "code_format": "code_format_reward",
    "soft_overlong_punishment": "soft_overlong_punishment_reward",
    "answer_accuracy": "answer_accuracy_reward",
    "strict_format": "strict_format_reward",
    "think_format": "think_format_reward",
    "strict_tag_count": "strict_tag_count_reward",
    "reasoning_steps_by_line": "reasoning_steps_by_line_reward",
    "clamped_cosine": "clamped_cosine_reward",
    "group_length": "group_length_reward",
    "strict_code_format": "strict_code_format_reward",
}


def make(*names, code=None, **options):
    return make_rewards(RewardsConfig(reward_funcs=names, **options), code or CodeRewardsConfig())


def refusal(*names, **options):
    with pytest.raises(UserError) as caught:
        make(*names, **options)
    return str(caught.value)


def test_every_name_is_made_or_refused():
    assert set(REWARD_NAMES) == set(FUNCTIONS) | set(RUNS_CODE)
    rewards = make(*FUNCTIONS)
    assert [reward.name for reward in rewards] == list(FUNCTIONS.values())
    needing = {"accuracy", "answer_accuracy", "cosine", "clamped_cosine", "length", "group_length"}
    assert [reward.columns for reward in rewards] == [("solution",) if name in needing else () for name in FUNCTIONS]
    assert {reward.name for reward in rewards if reward.pooled} == {"len_reward", "group_length_reward"}
    assert [reward.name for reward in pickle.loads(pickle.dumps(rewards))] == list(FUNCTIONS.values())


@pytest.mark.parametrize("name", RUNS_CODE)
def test_rewards_that_run_code_are_refused(name):
    line = (
        f"reward_funcs: need rewards that do not run code, got '{name}'; remove it: rewards that run code are not built"
    )
    assert refusal("format", name) == line


def test_numbers_come_from_the_options(said):
    options = {"cosine_max_value_correct": 3.0, "cosine_max_len": 10, "repetition_n_grams": 1} | {
        "repetition_max_penalty": -4.0,
        "max_completion_len": 4,
        "soft_punish_cache": 2,
    }
    cosine, repetition, overlong = make("cosine", "repetition_penalty", "soft_overlong_punishment", **options)
    assert cosine.function(said(r"\boxed{6} "), solution=["$6$"]) == [0.5]
    assert repetition.function(said("a a")) == [-2.0]
    assert overlong.function(completion_ids=[[1, 2, 3]]) == [-0.5]
    (code,) = make("code_format", code=CodeRewardsConfig(code_language="cpp"))
    assert code.optional_columns == ("language",)
    assert code.function(said("<think>\na\n</think>\n<answer>\n```cpp\n```\n</answer>")) == [1.0]


def test_chinese_needs_its_extra(monkeypatch, said):
    (reward,) = make("repetition_penalty", repetition_language="zh", repetition_n_grams=2)
    assert reward.function(said("苹果苹果苹果")) == [-0.5]
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert refusal("repetition_penalty", repetition_language="zh") == (
        "repetition_language: need jieba for zh, got no such package;"
        " install the extra that brings jieba: pip install 'r1jax[zh]'"
    )
    make("repetition_penalty")


def test_a_missing_column_is_named():
    check_columns(make("accuracy", "format"), ["problem", "solution"])
    with pytest.raises(UserError) as caught:
        check_columns(make("format", "accuracy"), ["problem", "answer"])
    assert str(caught.value) == (
        "reward_funcs: need a dataset with the column solution, which accuracy_reward reads, got none;"
        " the dataset's columns are answer, problem"
    )


def test_two_functions_of_one_name_are_refused():
    assert refusal("accuracy", "hostile_graders:accuracy_reward") == (
        'reward_funcs: need functions of different names, got ["accuracy", "hostile_graders:accuracy_reward"];'
        " rename one of the functions called 'accuracy_reward'"
    )
