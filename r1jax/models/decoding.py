"""Generation's forward pass: prompts into a KV cache, then one token at a time for every row.

Parameters are unstacked for it: indexing stacked layers inside the decode program copies them, which was 2-7 times
slower. The cache is one pair of buffers a layer; a program that takes it should donate it, or each token copies it
(1.7-3 times slower). Slots are not aligned with each other: a row's token at position p is in slot p.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax.batch import Layout
from r1jax.models.attention import attend, grouped_attention
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import Params
from r1jax.models.rope import rotation
from r1jax.models.transformer import heads_of, linear, logits, mlp, rms_norm

DecodeParams = dict[str, Any]
"""The parameter tree with `layers` as a list of one tree a layer, in the dtype of the computation."""
Cache = list[tuple[Array, Array]]
"""Keys and values of each layer, [B, S, K, H] both."""


def unstack(params: Params, dtype: DTypeLike = jnp.float32) -> DecodeParams:
    """The parameters as generation reads them: cast to dtype, a list of layers; jit it to do all in one program."""
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    num_layers = jax.tree.leaves(cast["layers"])[0].shape[0]
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], cast["layers"]) for i in range(num_layers)]
    return {**cast, "layers": layers}


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty cache of `length` slots a row."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]


def prefill(
    params: DecodeParams, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache, config: DecoderConfig
) -> tuple[Float[Array, "B V"], Cache]:
    """Each prompt's logits for its next token, in float32, and the cache with the prompts in slots 0..T-1.

    Row b's prompt is its first lengths[b] >= 1 tokens; what follows is padding. The slots of padding hold rubbish that
    `decode` overwrites before it reads them.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    layout = Layout(segment_ids=(positions < lengths[:, None]).astype(jnp.int32), positions=positions)
    filled = []

    def attention(index: int, q: Array, k: Array, v: Array) -> Array:
        keys, values = cache[index]
        filled.append((_write_rows(keys, k), _write_rows(values, v)))
        return attend(q, k, v, layout)

    hidden = _through_layers(params, tokens, positions, config, attention)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return logits(params, last)[:, 0], filled


def decode(
    params: DecodeParams, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: Cache, config: DecoderConfig
) -> tuple[Float[Array, "B V"], Cache]:
    """Each row's logits for the token after `tokens`, in float32, and the cache with `tokens` in slots `positions`.

    Every slot before a row's position must hold a token of it.
    """
    rows, slots = jnp.arange(tokens.shape[0]), jnp.arange(cache[0][0].shape[1])
    seen = (slots[None, :] <= positions[:, None])[:, None]
    filled = []

    def attention(index: int, q: Array, k: Array, v: Array) -> Array:
        keys, values = cache[index]
        keys = keys.at[rows, positions].set(k[:, 0].astype(keys.dtype))
        values = values.at[rows, positions].set(v[:, 0].astype(values.dtype))
        filled.append((keys, values))
        return grouped_attention(q, keys, values, seen)

    hidden = _through_layers(params, tokens[:, None], positions[:, None], config, attention)
    return logits(params, hidden)[:, 0], filled


def _write_rows(buffer: Float[Array, "B S K H"], rows: Float[Array, "B T K H"]) -> Float[Array, "B S K H"]:
    """The buffer with its first T slots replaced."""
    return jax.lax.dynamic_update_slice(buffer, rows.astype(buffer.dtype), (0, 0, 0, 0))


def _through_layers(
    params: DecodeParams,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    config: DecoderConfig,
    attention: Callable[[int, Array, Array, Array], Array],
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm; attention(layer index, q, k, v) keeps the cache."""
    rope = rotation(config, positions)
    normed = partial(rms_norm, eps=config.norm_eps)
    x = params["embed"]["embedding"][tokens]
    for index, layer in enumerate(params["layers"]):
        q, k, v = heads_of(layer["attention"], normed(x, layer["input_norm"]["scale"]), rope, config)
        attended = attention(index, q, k, v).reshape(*x.shape[:2], -1)
        x = x + linear(layer["attention"]["o"], attended)
        x = x + mlp(layer["mlp"], normed(x, layer["post_attention_norm"]["scale"]))
    return normed(x, params["final_norm"]["scale"])
