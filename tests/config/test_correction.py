import pytest

from r1jax import config
from r1jax.config.correction import PRESETS, Correction, make_correction

BASE = {"model_name_or_path": "m", "dataset_name": "d", "task": "grpo", "use_vllm": True}
PREFIX = "vllm_importance_sampling_"


def made(*, same_policy: bool = False, **keys: object) -> Correction:
    return make_correction(config.resolve(BASE | keys).config.grpo.correction, same_policy=same_policy)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, Correction(mode="token_truncate", high=2.0)),
        ({f"{PREFIX}clip_max": 3}, Correction(mode="token_truncate", high=3.0)),
        ({f"{PREFIX}mode": "token_truncate"}, Correction(mode="token_truncate", high=2.0)),
        ({f"{PREFIX}mode": "sequence_mask"}, Correction(mode="sequence_mask", high=3.0)),
        ({f"{PREFIX}mode": "geometric_mask"}, Correction(mode="geometric_mask", low=0.99, high=1.01)),
        ({f"{PREFIX}mode": "token_mask", f"{PREFIX}clip_min": 0.2, f"{PREFIX}clip_max": 1e9},
         Correction(mode="token_mask", low=0.2, high=1e9)),
        ({"rollout_correction_preset": "icepop"}, Correction(mode="token_mask", low=0.5, high=5.0)),
        ({"rollout_correction_preset": "icepop", f"{PREFIX}clip_min": 0}, Correction(mode="token_mask", high=5.0)),
        ({"rollout_correction_preset": "dppo"}, Correction(mode="token_truncate", max_shift=0.2)),
        ({"dppo_mask_threshold": 0.1}, Correction(mode="token_truncate", high=2.0, max_shift=0.1)),
        ({f"{PREFIX}correction": False}, Correction()),
        ({f"{PREFIX}correction": False, "off_policy_mask_threshold": 0.3}, Correction(max_divergence=0.3)),
    ],
)  # fmt: skip
def test_what_the_keys_ask_for(keys, expected):
    """A preset is what is not given; a mode beside it has TRL's bounds."""
    assert made(**keys) == expected


@pytest.mark.parametrize("preset", list(PRESETS))
def test_each_preset_is_the_table(preset):
    assert made(rollout_correction_preset=preset) == PRESETS[preset]


def test_samples_of_the_trainer_itself_are_not_weighed_but_may_be_masked():
    assert made(same_policy=True, rollout_correction_preset="off_policy") == Correction(max_divergence=0.1)


def test_bounds_that_bound_nothing_are_reported():
    given = {f"{PREFIX}clip_max": 3.0, f"{PREFIX}correction": False}
    assert dict(config.resolve(BASE | given).ignored) == {f"{PREFIX}clip_max": f"{PREFIX}correction is false"}
    embedded = dict(config.resolve(BASE | {f"{PREFIX}clip_max": 3.0, "use_vllm": False}).ignored)
    assert embedded == {f"{PREFIX}clip_max": "rollout_engine is jax: trainer and sampler are one model"}
    for preset, useless in (("icepop", True), ("dppo", False)):
        ignored = config.resolve(BASE | {"rollout_correction_preset": preset, "use_vllm": False}).ignored
        assert ("rollout_correction_preset" in dict(ignored)) == useless


def test_the_old_name_of_the_bound_is_refused():
    with pytest.raises(config.UserError, match="vllm_importance_sampling_clip_max"):
        config.resolve(BASE | {f"{PREFIX}cap": 2.0})


def test_vespo_takes_weights_of_tokens():
    with pytest.raises(config.UserError) as caught:
        config.resolve(BASE | {"loss_type": "vespo", f"{PREFIX}mode": "sequence_mask"})
    assert str(caught.value) == (
        "vllm_importance_sampling_mode: need token_truncate or token_mask with loss_type vespo, got 'sequence_mask';"
        " vespo has the ratio of the completion already"
    )
