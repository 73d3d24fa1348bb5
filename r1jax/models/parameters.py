"""The parameter tree, declared once as a Flax NNX module; everybody else sees a nested dict of arrays.

NNX ends here: calling an `nnx.jit`ed module of many leaves costs tens of milliseconds a call, a stacked dict under
`jax.jit` a tenth of one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from r1jax.models.config import DecoderConfig

Params = dict[str, Any]
"""Nested dict of float32 arrays; layer leaves are stacked with a leading layer dimension."""


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param[Array]:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class _Linear(nnx.Module):
    """[..., in, out] kernel, and a bias where the family has one."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, ...], std: float, bias: bool):
        self.kernel = _normal(rngs, shape, std)
        if bias:
            self.bias = nnx.Param(jnp.zeros((*shape[:-2], shape[-1]), jnp.float32))


class _Norm(nnx.Module):
    """RMSNorm's scale."""

    def __init__(self, shape: tuple[int, ...]):
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32))


class _Embedding(nnx.Module):
    """Token embedding [V, D]."""

    def __init__(self, rngs: nnx.Rngs, config: DecoderConfig):
        self.embedding = _normal(rngs, (config.vocab_size, config.hidden_size), config.initializer_range)


class _Attention(nnx.Module):
    """Grouped-query attention of all layers: four projections and, for Qwen3, a norm over each head of q and k."""

    def __init__(self, rngs: nnx.Rngs, c: DecoderConfig):
        layers, width, std = c.num_layers, c.hidden_size, c.initializer_range
        query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q = _Linear(rngs, (layers, width, query), std, c.qkv_bias)
        self.k = _Linear(rngs, (layers, width, key), std, c.qkv_bias)
        self.v = _Linear(rngs, (layers, width, key), std, c.qkv_bias)
        self.o = _Linear(rngs, (layers, query, width), std, c.output_bias)
        if c.qk_norm:
            self.q_norm = _Norm((layers, c.head_dim))
            self.k_norm = _Norm((layers, c.head_dim))


class _Mlp(nnx.Module):
    """Gated MLP of all layers."""

    def __init__(self, rngs: nnx.Rngs, c: DecoderConfig):
        layers, width, hidden, std = c.num_layers, c.hidden_size, c.intermediate_size, c.initializer_range
        self.gate = _Linear(rngs, (layers, width, hidden), std, c.mlp_bias)
        self.up = _Linear(rngs, (layers, width, hidden), std, c.mlp_bias)
        self.down = _Linear(rngs, (layers, hidden, width), std, c.mlp_bias)


class _Layers(nnx.Module):
    """All transformer layers, stacked."""

    def __init__(self, rngs: nnx.Rngs, c: DecoderConfig):
        self.input_norm = _Norm((c.num_layers, c.hidden_size))
        self.attention = _Attention(rngs, c)
        self.post_attention_norm = _Norm((c.num_layers, c.hidden_size))
        self.mlp = _Mlp(rngs, c)


class Decoder(nnx.Module):
    """The declaration of every parameter."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.embed = _Embedding(rngs, config)
        self.layers = _Layers(rngs, config)
        self.final_norm = _Norm((config.hidden_size,))
        if not config.tied_embeddings:
            shape = (config.hidden_size, config.vocab_size)
            self.lm_head = _Linear(rngs, shape, config.initializer_range, bias=False)


def init_params(config: DecoderConfig, key: PRNGKeyArray) -> Params:
    """Fresh parameters: normal(initializer_range) weights, zero biases, unit norms, as transformers starts them."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(key)), nnx.Param))


def abstract_params(config: DecoderConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s; allocates nothing."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
