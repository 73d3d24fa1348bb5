"""Generation's forward pass: prompts into a cache, then one token at a time for every row.

Parameters are unstacked for it: indexing stacked layers inside the decode program copies them, which was 2-7 times
slower. A cache is one pair of buffers a layer; a program that takes one should donate it, or each token copies it
(1.7-3 times slower). Prompts have a cache of their own, which the samples of a prompt share: it is filled once, lies
in memory once and is read once a token for all of them. The rows' completions are aligned, token i in slot i.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax.batch import Layout
from r1jax.models.attention.backends import Attend
from r1jax.models.attention.blocks import attend
from r1jax.models.attention.cached import Cached, cached_attention
from r1jax.models.config import DecoderConfig
from r1jax.models.lora import merge
from r1jax.models.parameters import Params
from r1jax.models.rope import rotation
from r1jax.models.transformer import heads_of, linear, logits, mlp, rms_norm

DecodeParams = dict[str, Any]
"""The parameter tree with `layers` as a list of one tree a layer, in the dtype of the computation."""
Cache = list[tuple[Array, Array]]
"""Keys [B, K, H, S] and values [B, K, S, H] of each layer: the orientation in which one token's products read them."""


def unstack(params: Params, dtype: DTypeLike = jnp.float32) -> DecodeParams:
    """The parameters as generation reads them: cast to dtype, a list of layers; jit it to do all in one program.

    An adapter is merged into its kernels, a layer at a time.
    """

    def cast(tree: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)

    num_layers = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = [cast(merge(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]))) for i in range(num_layers)]
    return {**cast({name: leaf for name, leaf in params.items() if name != "layers"}), "layers": layers}


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty cache of `length` slots a row."""
    heads, width = config.num_kv_heads, config.head_dim
    keys, values = (batch, heads, width, length), (batch, heads, length, width)
    return [(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(config.num_layers)]


def grown(cache: Cache, length: int) -> Cache:
    """The cache with empty slots behind its own, `length` in all."""
    more = length - cache[0][0].shape[-1]
    none = (0, 0)
    return [(jnp.pad(k, (none, none, none, (0, more))), jnp.pad(v, (none, none, (0, more), none))) for k, v in cache]


def prefill(
    params: DecodeParams,
    tokens: Int[Array, "P T"],
    lengths: Int[Array, " P"],
    config: DecoderConfig,
    attend: Attend = attend,
) -> tuple[Float[Array, "P V"], Cache]:
    """Each prompt's logits for its next token, in float32, and the cache of the prompts, T slots each.

    Prompt p is its first lengths[p] >= 1 tokens; what follows is padding.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    layout = Layout(segment_ids=segment_ids, positions=positions, lengths=lengths[:, None])
    filled = []

    def attention(index: int, q: Array, k: Array, v: Array) -> Array:
        del index
        filled.append((k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)))
        return attend(q, k, v, layout)

    hidden = _through_layers(params, tokens, positions, config, attention)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return logits(params, last)[:, 0], filled


def decode(
    params: DecodeParams,
    tokens: Int[Array, " B"],
    step: Int[Array, ""],
    lengths: Int[Array, " P"],
    prompts: Cache,
    completions: Cache,
    config: DecoderConfig,
    attend: Cached = cached_attention,
) -> tuple[Float[Array, "B V"], Cache]:
    """Each row's logits for the token after `tokens`, in float32, and `completions` with `tokens` in slot `step`.

    `tokens` are number `step` of the completions, whose slots before it hold those before. The first B / P rows are
    samples of the first prompt, and so on.
    """
    samples = tokens.shape[0] // lengths.shape[0]
    positions = jnp.repeat(lengths, samples) + step
    write = jax.lax.dynamic_update_slice_in_dim
    filled = []

    def attention(index: int, q: Array, k: Array, v: Array) -> Array:
        keys, values = completions[index]
        keys = write(keys, k[:, 0, :, :, None].astype(keys.dtype), step, 3)
        values = write(values, v[:, 0, :, None].astype(values.dtype), step, 2)
        filled.append((keys, values))
        return attend(q[:, 0], prompts[index], (keys, values), lengths, step)

    hidden = _through_layers(params, tokens[:, None], positions[:, None], config, attention)
    return logits(params, hidden)[:, 0], filled


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
        with jax.named_scope("attention"):
            q, k, v = heads_of(layer["attention"], normed(x, layer["input_norm"]["scale"]), rope, config)
            attended = attention(index, q, k, v).reshape(q.shape)
            x = x + linear(layer["attention"]["o"], attended, over=2)
        with jax.named_scope("mlp"):
            x = x + mlp(layer["mlp"], normed(x, layer["post_attention_norm"]["scale"]))
    return normed(x, params["final_norm"]["scale"])
