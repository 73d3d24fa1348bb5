import re
from collections.abc import Callable
from typing import Any

import pytest

from r1jax.config.errors import UserError
from r1jax.models.config import DecoderConfig, RopeScaling
from r1jax.models.families import TensorName, decoder_config, tensor_names

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# What the released config.json of each says, both ways of writing the rotary part.
QWEN25 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA32 = {
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**LLAMA3, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def test_qwen2_config():
    assert decoder_config(QWEN25) == DecoderConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        norm_eps=1e-6,
        rope_theta=1e6,
        qkv_bias=True,
        tied_embeddings=True,
        initializer_range=0.02,
        max_position_embeddings=32768,
    )


def test_qwen3_config():
    assert decoder_config(QWEN3) == DecoderConfig(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm=True,
        tied_embeddings=True,
        initializer_range=0.02,
        max_position_embeddings=40960,
    )


def test_llama_config():
    scaling = RopeScaling(
        kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    assert decoder_config(LLAMA32) == DecoderConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=scaling,
        tied_embeddings=True,
        initializer_range=0.02,
        max_position_embeddings=131072,
    )


@pytest.mark.parametrize("old", [QWEN25, QWEN3, LLAMA32], ids=["qwen2", "qwen3", "llama"])
def test_both_spellings_of_the_rotary_part_agree(old: dict[str, Any]):
    """transformers reads the old spelling and writes the new one; both must mean the same to us."""
    import transformers

    new = transformers.AutoConfig.for_model(**old).to_dict()
    assert "rope_theta" not in new and new["rope_parameters"]["rope_theta"] == old["rope_theta"]
    assert decoder_config(new) == decoder_config(old)


def test_type_is_an_older_name_of_rope_type():
    config = decoder_config({**LLAMA32, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert config.rope_theta == 5e5


def test_defaults_are_those_of_the_config_classes():
    """Keys that a config.json may lack: those that transformers fills in without being told."""
    import transformers

    optional = ("head_dim", "rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings", "initializer_range")
    for full in (QWEN25, QWEN3, LLAMA32):
        short = {key: value for key, value in full.items() if key not in optional}
        assert decoder_config(short) == decoder_config(transformers.AutoConfig.for_model(**short).to_dict())
    alone = {key: value for key, value in LLAMA32.items() if key != "num_key_value_heads"}
    assert decoder_config(alone).num_kv_heads == 32


def test_biases_follow_the_family():
    def biases(hf: dict[str, Any]) -> tuple[bool, bool, bool]:
        config = decoder_config(hf)
        return config.qkv_bias, config.output_bias, config.mlp_bias

    assert biases({**QWEN25, "attention_bias": False}) == (True, False, False)
    assert biases({**QWEN3, "attention_bias": True}) == (True, True, False)
    assert biases({**LLAMA32, "attention_bias": True}) == (True, True, False)
    assert biases({**LLAMA32, "mlp_bias": True}) == (False, False, True)


REFUSED = {
    "another family": (
        {**QWEN25, "model_type": "gpt2"},
        "need model_type one of llama, qwen2, qwen3, got gpt2; choose a model of these families",
    ),
    "yarn": (
        {**QWEN25, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        "need rope scaling default, linear or llama3, got yarn; this scaling is not computed right here",
    ),
    "dynamic": (
        {**LLAMA32, "rope_scaling": None, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "need rope scaling default, linear or llama3, got dynamic; this scaling is not computed right here",
    ),
    "scaling without a key": (
        {**LLAMA32, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "need low_freq_factor in the rope scaling, got none; check config.json",
    ),
    "sliding window": (
        {**QWEN25, "use_sliding_window": True},
        "need full attention, got use_sliding_window: true; sliding windows are not in the decoder",
    ),
    "sliding layers": (
        {**QWEN3, "layer_types": ["full_attention", "sliding_attention"]},
        "need full attention in every layer, got ['full_attention', 'sliding_attention']; not supported",
    ),
    "gelu": (
        {**LLAMA32, "hidden_act": "gelu"},
        "need hidden_act silu, got gelu; other activations are not in the decoder",
    ),
    "partial rotary": (
        {**LLAMA32, "partial_rotary_factor": 0.5},
        "need partial_rotary_factor 1, got 0.5; partial rotation is not in the decoder",
    ),
    "partial rotary, transformers 5": (
        {**QWEN3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
        "need partial_rotary_factor 1, got 0.25; partial rotation is not in the decoder",
    ),
    "quantised": (
        {**QWEN25, "quantization_config": {"quant_method": "gptq"}},
        "need unquantised weights, got quantization_config; use the bf16 or fp32 release of the model",
    ),
    "kv heads": (
        {**QWEN25, "num_key_value_heads": 4},
        "need num_key_value_heads that divides num_attention_heads, got 4; check the file",
    ),
    "a key left out": (
        {key: value for key, value in QWEN25.items() if key != "vocab_size"},
        "need vocab_size in config.json, got none; check config.json",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_we_would_compute_otherwise_is_refused(why: str):
    hf, line = REFUSED[why]
    with pytest.raises(UserError, match="^" + re.escape(f"model_name_or_path: {line}")) as refusal:
        decoder_config(hf)
    assert "\n" not in str(refusal.value)


def test_tensor_names_are_those_that_transformers_saves(make_model: Callable):
    for case in ("qwen2_tied", "qwen2_untied", "qwen3_head_dim", "llama3_biases", "llama_linear"):
        model = make_model(case)
        config = decoder_config(model.config.to_dict())
        ours = [
            name.hf.format(layer=layer)
            for name in tensor_names(config)
            for layer in range(config.num_layers if name.stacked else 1)
        ]
        assert sorted(ours) == sorted(name for name, _ in model.named_parameters()), case


def test_kernels_are_transposed_and_layers_stacked():
    names = {name.hf: name for name in tensor_names(decoder_config(QWEN25))}
    down = "model.layers.{layer}.mlp.down_proj.weight"
    assert names[down] == TensorName(("layers", "mlp", "down", "kernel"), down, transpose=True, stacked=True)
    embedding = "model.embed_tokens.weight"
    assert names[embedding] == TensorName(("embed", "embedding"), embedding)
