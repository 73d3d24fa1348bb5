"""Keys of selection and of advantages: what follows from them, and what they make useless."""

import pytest

from r1jax import config
from r1jax.config.correction import PRESETS
from r1jax.config.selection import SelectionConfig
from r1jax.objectives.surrogate import make_surrogate

BASE = {"task": "grpo", "model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["format", "accuracy"]}


@pytest.mark.parametrize(("given", "judge"), [(None, 0), ("format", 0), ("accuracy", 1)])
def test_the_reward_that_says_what_passed(given, judge):
    assert SelectionConfig(curriculum_reward_func=given).judge(("format", "accuracy")) == judge


def test_a_buffer_needs_a_correction():
    """It is on, whoever samples, unless it is switched off."""
    keys = {"replay_buffer_size": 64}
    for use_vllm in (True, False):
        run = config.resolve(BASE | keys | {"use_vllm": use_vllm}).config
        assert run.grpo.selection.replays and not run.samples_itself
        assert make_surrogate(run).correction == PRESETS["tis"]
    assert config.resolve(BASE).config.samples_itself
    with pytest.raises(config.UserError, match="replay_buffer_size: need 0 without an importance correction, got 64"):
        config.resolve(BASE | keys | {"vllm_importance_sampling_correction": False})
    assert not config.resolve(BASE).config.grpo.selection.replays


@pytest.mark.parametrize(
    ("given", "scaling"), [(True, "group"), (False, "none"), ("group", "group"), ("batch", "batch"), ("none", "none")]
)
def test_scaling_by_its_name(given, scaling):
    assert config.resolve(BASE | {"scale_rewards": given}).config.grpo.advantages.scaling == scaling


def test_what_another_key_makes_useless_is_reported():
    keys = {"dynamic_sampling_max_rounds": 5, "curriculum_column": "rate", "curriculum_pass_value": 0.5}
    assert config.resolve(BASE | keys).ignored == (
        ("curriculum_column", "prompt_curriculum is none"),
        ("curriculum_pass_value", "prompt_curriculum is none"),
        ("dynamic_sampling_max_rounds", "dynamic_sampling is false"),
    )
    keys |= {"dynamic_sampling": True, "prompt_curriculum": "pass_rate"}
    assert config.resolve(BASE | keys).ignored == ()
    keys |= {"shuffle_dataset": False, "scale_rewards": False, "multi_objective_aggregation": "normalize_then_sum"}
    assert dict(config.resolve(BASE | keys).ignored) == {
        "shuffle_dataset": "prompt_curriculum draws the prompts",
        "scale_rewards": (
            "multi_objective_aggregation: normalize_then_sum divides each reward by its group's deviation"
        ),
    }
