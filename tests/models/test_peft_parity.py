"""Adapters against PEFT: what we write it reads, what it writes we read, each with the logits of the other."""

import copy
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Layout
from r1jax.checkpoints.hf_export import export
from r1jax.checkpoints.peft import CONFIG_FILE, WEIGHTS_FILE, open_model
from r1jax.checkpoints.peft_export import export_adapter
from r1jax.config.errors import UserError
from r1jax.config.lora import LoraConfig
from r1jax.models import lora as adapters
from r1jax.models.config import DecoderConfig
from r1jax.models.families import decoder_config
from r1jax.models.parameters import abstract_params
from r1jax.models.transformer import forward, logits

logger = logging.getLogger(__name__)

CASES = {
    "qwen2_tied": LoraConfig(use_peft=True, lora_r=4, lora_alpha=6),
    "qwen3_head_dim": LoraConfig(use_peft=True, lora_r=3, lora_alpha=5, lora_target_modules=("o_proj", "up_proj")),
    "llama3_biases": LoraConfig(use_peft=True, lora_target_modules=("all-linear",), use_rslora=True),
}
TOLERANCE = 1e-5
"""Of the norm of all logits."""


def tokens_of(config: DecoderConfig) -> np.ndarray:
    return np.random.default_rng(5).integers(0, config.vocab_size, (2, 37), dtype=np.int32)


def ours(params: Any, config: DecoderConfig) -> np.ndarray:
    tokens = jnp.asarray(tokens_of(config))
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    layout = Layout(segment_ids=jnp.ones_like(tokens), positions=places)
    return np.asarray(logits(params, forward(params, tokens, layout, config)))


def theirs(model: Any, config: DecoderConfig) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens_of(config)).long()).logits.numpy()


def assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    logger.info("relative %.1e, largest difference %.1e", error, np.abs(found - expected).max())
    assert error < TOLERANCE


def trained_adapter(config: DecoderConfig, lora: LoraConfig) -> Any:
    """An adapter with B other than 0, which changes the logits by much."""
    adapter = adapters.init_adapter(config, lora, jax.random.key(1))
    for name, factors in adapters.sites_of(adapter):
        factors["lora_b"] = 0.1 * jax.random.normal(jax.random.key(len(name)), factors["lora_b"].shape)
    return adapter


@pytest.mark.parametrize("case", CASES)
def test_peft_has_the_logits_of_what_we_export(
    case: str, make_model: Callable, params_of: Callable, tmp_path: Path
) -> None:
    import peft
    import transformers

    model, lora = make_model(case), CASES[case]
    config = decoder_config(model.config.to_dict())
    base, adapter = jax.tree.map(jnp.asarray, params_of(model, config)), trained_adapter(config, lora)
    joined = adapters.join(adapters.with_scale(base, lora, lambda depth: adapters.scales(lora, depth)), adapter)
    expected = ours(joined, config)
    assert np.linalg.norm(expected - theirs(model, config)) > 0.1 * np.linalg.norm(expected)

    about = {"config": config, "hf_config": model.config.to_dict()}
    export_adapter(tmp_path / "adapter", adapter, lora=lora, base_model="org/base", **about)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that are missing or too many
        warnings.simplefilter("ignore", FutureWarning)  # that transformers has for PEFT
        other: Any = copy.deepcopy(model)
        wrapped = peft.PeftModel.from_pretrained(other, str(tmp_path / "adapter"))
    assert_equal(theirs(wrapped.eval(), config), expected)
    read = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (read.base_model_name_or_path, read.task_type, read.inference_mode) == ("org/base", "CAUSAL_LM", True)

    export(tmp_path / "merged", joined, dtype="float32", **about)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert_equal(theirs(merged.eval(), config), expected)


@pytest.fixture
def from_peft(make_model: Callable, tmp_path: Path) -> tuple[Path, np.ndarray, DecoderConfig]:
    """(an adapter's folder as PEFT saves it, PEFT's logits, the decoder); its model is in the folder beside it."""
    import peft
    import torch

    model = make_model("qwen2_tied")
    model.save_pretrained(tmp_path / "model")
    modules = r".*\.(q_proj|down_proj)"  # a pattern, as PEFT allows
    settings = {"r": 4, "lora_alpha": 16, "target_modules": modules, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings, init_lora_weights=False)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    adapted.save_pretrained(str(tmp_path / "adapter"))
    config = decoder_config(model.config.to_dict())
    return tmp_path / "adapter", theirs(adapted, config), config


def loaded(folder: Path, config: DecoderConfig) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = open_model(str(folder))
    found.check(config)
    return found.load(config, jax.tree.map(lambda _: device, abstract_params(config)))


def test_we_have_the_logits_of_what_peft_saves(from_peft: tuple[Path, np.ndarray, DecoderConfig]) -> None:
    folder, expected, config = from_peft
    assert_equal(ours(loaded(folder, config), config), expected)


REFUSALS = {
    "dora": (lambda c: c.update(use_dora=True), "an adapter of LoRA alone, got use_dora: true"),
    "another method": (lambda c: c.update(peft_type="IA3"), "an adapter of LoRA alone, got peft_type: 'IA3'"),
    "trained biases": (lambda c: c.update(bias="all"), "an adapter of LoRA alone, got bias: 'all'"),
    "whole modules": (lambda c: c.update(modules_to_save=["lm_head"]), 'got modules_to_save: ["lm_head"]'),
    "a start in the weights": (lambda c: c.update(init_lora_weights="pissa"), "got init_lora_weights: 'pissa', which"),
    "another rank": (lambda c: c.update(r=8), "need factors of rank 8 beside q_proj, down_proj in every layer"),
    "no rank": (lambda c: c.pop("r"), "need r and lora_alpha, numbers, in"),
    "no model": (lambda c: c.update(base_model_name_or_path=None), "that names its model in base_model_name_or_path"),
    "a model elsewhere": (lambda c: c.update(base_model_name_or_path="./gone"), "(the model of the adapter in"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_decoder_would_compute_differently_is_refused(
    case: str, from_peft: tuple[Path, np.ndarray, DecoderConfig]
) -> None:
    folder, _, config = from_peft
    change, words = REFUSALS[case]
    content = json.loads((folder / CONFIG_FILE).read_text())
    change(content)
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        loaded(folder, config)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("model_name_or_path: need ")


def test_a_layer_without_its_factors_is_refused(from_peft: tuple[Path, np.ndarray, DecoderConfig]) -> None:
    from safetensors.numpy import load_file, save_file

    folder, _, config = from_peft
    tensors = load_file(folder / WEIGHTS_FILE)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    del tensors[name]
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(UserError, match=f"got {name} none in"):
        loaded(folder, config)
