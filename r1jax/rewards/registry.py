"""Rewards by name: from reward_funcs to what the run calls."""

import importlib.util
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from r1jax.config.errors import need, shown
from r1jax.config.rewards import CodeRewardsConfig, RewardsConfig
from r1jax.rewards import accuracy, formats, lengths, wording
from r1jax.rewards.reward import Reward
from r1jax.rewards.user_functions import user_reward

Maker = Callable[[RewardsConfig, CodeRewardsConfig], Reward]

_RUNS_CODE = ("code", "binary_code", "ioi_code", "cf_code")


def make_rewards(rewards: RewardsConfig, code: CodeRewardsConfig) -> tuple[Reward, ...]:
    """The rewards of reward_funcs in their order; UserError for what cannot be had here, before a device is touched."""
    made = tuple(_make(name, rewards, code) for name in rewards.reward_funcs)
    twice = [name for name, count in Counter(reward.name for reward in made).items() if count > 1]
    if twice:
        advice = f"rename one of the functions called {shown(twice[0])}"
        raise need("reward_funcs", "functions of different names", shown(rewards.reward_funcs), advice)
    return made


def check_columns(rewards: Sequence[Reward], column_names: Collection[str]) -> None:
    """Nothing, or the UserError for a column that a reward needs and the dataset has not."""
    for reward in rewards:
        for column in reward.columns:
            if column not in column_names:
                have = f"the dataset's columns are {', '.join(sorted(column_names)) or 'none'}"
                rule = f"a dataset with the column {column}, which {reward.name} reads"
                raise need("reward_funcs", rule, "none", have)


def _make(name: str, rewards: RewardsConfig, code: CodeRewardsConfig) -> Reward:
    if name in _RUNS_CODE:
        advice = "remove it: rewards that run code are not built"
        raise need("reward_funcs", "rewards that do not run code", shown(name), advice)
    if name in _MAKERS:
        return _MAKERS[name](rewards, code)
    return user_reward(name)


def _plain(function: Callable[..., Any], *columns: str) -> Maker:
    return lambda rewards, code: _reward(function, *columns)


def _reward(function: Callable[..., Any], *columns: str, **more: Any) -> Reward:
    return Reward(name=function.__name__, columns=columns, function=function, **more)


def _pooled(function: Callable[..., Any], judge: Callable[..., Any], *columns: str) -> Maker:
    return lambda rewards, code: _reward(function, *columns, judge=judge)


def _cosine(get: Callable[..., Callable[..., Any]]) -> Maker:
    def make(rewards: RewardsConfig, code: CodeRewardsConfig) -> Reward:
        function = get(
            min_value_wrong=rewards.cosine_min_value_wrong,
            max_value_wrong=rewards.cosine_max_value_wrong,
            min_value_correct=rewards.cosine_min_value_correct,
            max_value_correct=rewards.cosine_max_value_correct,
            max_len=rewards.cosine_max_len,
        )
        return _reward(function, "solution")

    return make


def _code_format(get: Callable[[str], Callable[..., Any]]) -> Maker:
    return lambda rewards, code: _reward(get(code.code_language), optional_columns=("language",))


def _repetition(rewards: RewardsConfig, code: CodeRewardsConfig) -> Reward:
    language = rewards.repetition_language
    if language == "zh" and importlib.util.find_spec("jieba") is None:
        advice = "install the extra that brings jieba: pip install 'r1jax[zh]'"
        raise need("repetition_language", "jieba for zh", "no such package", advice)
    size, penalty = rewards.repetition_n_grams, rewards.repetition_max_penalty
    return _reward(wording.get_repetition_penalty_reward(size, penalty, language))


def _overlong(rewards: RewardsConfig, code: CodeRewardsConfig) -> Reward:
    return _reward(lengths.get_soft_overlong_punishment(rewards.max_completion_len, rewards.soft_punish_cache))


_MAKERS: Mapping[str, Maker] = {
    "accuracy": _plain(accuracy.accuracy_reward, "solution"),
    "answer_accuracy": _plain(accuracy.answer_accuracy_reward, "solution"),
    "format": _plain(formats.format_reward),
    "strict_format": _plain(formats.strict_format_reward),
    "think_format": _plain(formats.think_format_reward),
    "tag_count": _plain(formats.tag_count_reward),
    "strict_tag_count": _plain(formats.strict_tag_count_reward),
    "code_format": _code_format(formats.get_code_format_reward),
    "strict_code_format": _code_format(formats.get_strict_code_format_reward),
    "reasoning_steps": _plain(wording.reasoning_steps_reward),
    "reasoning_steps_by_line": _plain(wording.reasoning_steps_by_line_reward),
    "repetition_penalty": _repetition,
    "length": _pooled(lengths.len_reward, lengths.latex_correct, "solution"),
    "group_length": _pooled(lengths.group_length_reward, lengths.answer_correct, "solution"),
    "cosine": _cosine(lengths.get_cosine_scaled_reward),
    "clamped_cosine": _cosine(lengths.get_clamped_cosine_reward),
    "soft_overlong_punishment": _overlong,
}
