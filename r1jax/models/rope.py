"""Rotary position embedding (Su et al. 2021), half-split as in Hugging Face's Llama and Qwen."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r1jax.models.config import DecoderConfig, RopeScaling


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's stretch: long wavelengths divided by factor, short ones kept, a linear blend between."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def frequencies(config: DecoderConfig) -> Float[np.ndarray, " half"]:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2]; a constant of the model."""
    # Rounded to float32 where transformers rounds: in float64 the angle at position 8192 differs by up to 1e-3. Only
    # the power is taken in float64 first: numpy's float32 power is a unit in the last place away from torch's for one
    # frequency in ten or more, this one for hardly any.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = (np.float64(config.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1.0) / powers
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / np.float32(scaling.factor)
    return _llama3(plain, scaling).astype(np.float32)


def rotation(config: DecoderConfig, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T 1 half"], ...]:
    """Cosine and sine of every position's angles, in float32, ready to broadcast over heads."""
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies(config))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T heads H"], cosine: Float[Array, "B T 1 half"], sine: Float[Array, "B T 1 half"]
) -> Float[Array, "B T heads H"]:
    """Each head's (first half, second half) pairs turned by the position's angles; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
