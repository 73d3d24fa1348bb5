from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.models.families import decoder_config
from r1jax.models.rope import frequencies, rotate, rotation

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 131072,
}
# What Llama 3.1 and 3.2 ship.
LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama 3.1": LLAMA_31,
    "llama 3.2": {**LLAMA_31, "factor": 32.0},
}


def test_plain_frequencies_worked_by_hand():
    config = decoder_config({**LLAMA, "head_dim": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    np.testing.assert_allclose(frequencies(config), [1.0, 0.01], rtol=1e-6)


def test_llama3_frequencies_worked_by_hand():
    # Frequencies 1, 0.1, 0.01, 0.001: wavelengths 6.28, 62.8, 628, 6283. Of 2 pi x 200 positions the first two make
    # more than 4 turns (200, 20) and stay, the third makes 2: blend (2 - 1) / (4 - 1) of 0.01 and the rest of
    # 0.01 / 8; the last makes 0.2 and is divided by 8.
    scaling = {**LLAMA_31, "rope_theta": 1e4, "original_max_position_embeddings": round(2 * np.pi * 200)}
    config = decoder_config({**LLAMA, "head_dim": 8, "rope_parameters": scaling})
    blended = 1 / 3 * 0.01 + 2 / 3 * 0.01 / 8
    np.testing.assert_allclose(frequencies(config), [1.0, 0.1, blended, 0.001 / 8], rtol=1e-3)


@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_equal_transformers(kind: str):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = {**LLAMA, "hidden_size": 256, "rope_parameters": SCALINGS[kind]}
    theirs = LlamaConfig(**hf)
    function = {"default": LlamaRotaryEmbedding.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}
    expected, attention_factor = function[SCALINGS[kind]["rope_type"]](theirs)
    assert attention_factor == 1.0
    # Both float32, and one rounding apart at most.
    np.testing.assert_allclose(frequencies(decoder_config(hf)), expected.numpy(), rtol=1.2e-7)


def test_rotation_by_a_quarter_turn():
    config = decoder_config({**LLAMA, "head_dim": 4, "rope_theta": 1e4})
    cosine, sine = rotation(config, jnp.asarray([[0, 1]]))
    np.testing.assert_allclose(cosine[0, :, 0], [[1, 1], [np.cos(1), np.cos(0.01)]], rtol=1e-6)
    quarter = jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2))
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    # Pairs are (1, 3) and (2, 4), halves of the head; (a, b) turns into (-b, a).
    np.testing.assert_array_equal(rotate(x, *quarter).ravel(), [-3.0, -4.0, 1.0, 2.0])
    np.testing.assert_array_equal(sine[0, 0, 0], [0.0, 0.0])
    assert rotate(x.astype(jnp.bfloat16), *quarter).dtype == jnp.bfloat16
