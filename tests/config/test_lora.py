"""LoRA's keys: TRL's names and defaults, what null means, and each refusal."""

from typing import Any

import pytest

from r1jax import config
from r1jax.config.lora import LINEAR_MODULES, LoraConfig

BASE = {"model_name_or_path": "m", "dataset_name": "d"}
ADAPTS = BASE | {"use_peft": True}


def test_defaults_are_trls_but_for_grpos_dropout() -> None:
    lora = config.resolve(BASE).config.model.lora
    assert (lora.use_peft, lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (False, 16, 32, 0.05)
    assert (lora.modules, lora.scaling, lora.use_rslora) == (("q_proj", "v_proj"), 2.0, False)
    assert config.resolve(BASE | {"task": "grpo"}).config.model.lora.lora_dropout == 0.0
    assert config.resolve(BASE).config.model.adapter is None
    assert config.resolve(ADAPTS).config.model.adapter == LoraConfig(use_peft=True)


@pytest.mark.parametrize(
    ("given", "modules"),
    [
        ("all-linear", LINEAR_MODULES),
        (["all-linear"], LINEAR_MODULES),
        # One module in a list stays a name; TRL hands it to PEFT as a pattern for whole paths, which matches none.
        (["o_proj"], ("o_proj",)),
        (["down_proj", "q_proj"], ("q_proj", "down_proj")),
    ],
)
def test_modules(given: Any, modules: tuple[str, ...]) -> None:
    assert config.resolve(ADAPTS | {"lora_target_modules": given}).config.model.lora.modules == modules


def test_rank_stabilised_scaling() -> None:
    assert LoraConfig(lora_r=64, lora_alpha=16, use_rslora=True).scaling == 2.0
    assert LoraConfig(lora_r=64, lora_alpha=16).scaling == 0.25


NAMES = ", ".join(LINEAR_MODULES)
REFUSALS = [
    ({"lora_r": 0}, "lora_r: need x >= 1, got 0; a usual value is 16"),
    ({"lora_alpha": 0}, "lora_alpha: need x > 0, got 0; a usual value is twice lora_r"),
    ({"lora_dropout": 1.0}, "lora_dropout: need 0 <= x < 1, got 1; a usual value is 0.05; 0 drops nothing"),
    (
        {"lora_target_modules": ["q_proj", "lm_head"]},
        f"lora_target_modules: need all-linear, or some of {NAMES}, got 'lm_head';"
        " name modules, or remove the key for q_proj and v_proj",
    ),
    (
        {"lora_target_modules": []},
        f"lora_target_modules: need all-linear, or some of {NAMES}, got an empty list;"
        " name modules, or remove the key for q_proj and v_proj",
    ),
    (
        {"lora_target_modules": ["q_proj", "q_proj"]},
        'lora_target_modules: need each module once, got ["q_proj", "q_proj"]; remove the repeated',
    ),
    (
        {"random_init": True},
        "random_init: need false with use_peft, got true;"
        " an adapter is worth nothing without the weights it was trained beside; train all parameters",
    ),
    (
        {"task": "grpo", "sync_ref_model": True},
        "sync_ref_model: need false with use_peft, got true;"
        " the reference is the model without its adapter, which never moves",
    ),
    (
        {"task": "grpo", "lora_dropout": 0.05},
        "lora_dropout: need 0 with task grpo, whose ratios are to the policy that sampled, without dropout, got 0.05;"
        " remove the key",
    ),
    (
        {"use_dora": True},
        "use_dora: need null or false (r1jax does not have it), got true; use LoRA: use_peft without it",
    ),
    (
        {"lora_modules_to_save": ["lm_head"]},
        'lora_modules_to_save: need null or false (r1jax does not have it), got ["lm_head"];'
        " train all parameters to train embeddings or lm_head",
    ),
]


@pytest.mark.parametrize(("changes", "line"), REFUSALS, ids=[next(iter(reversed(case[0]))) for case in REFUSALS])
def test_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(config.UserError) as caught:
        config.resolve(ADAPTS | changes)
    assert str(caught.value) == line


def test_keys_without_use_peft_are_told_to_do_nothing() -> None:
    resolved = config.resolve(BASE | {"lora_r": 8, "use_dora": False, "lora_task_type": "CAUSAL_LM"})
    assert dict(resolved.ignored) == {
        "lora_r": "use_peft is false",
        "use_dora": "it is off, as r1jax has it",
        "lora_task_type": "the models are causal language models",
    }
