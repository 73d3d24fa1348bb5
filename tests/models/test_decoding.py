import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Layout
from r1jax.models.attention import filled, pallas
from r1jax.models.attention.blocks import attend
from r1jax.models.attention.cached import cached_attention
from r1jax.models.config import DecoderConfig, RopeScaling
from r1jax.models.decoding import decode, grown, init_cache, prefill, unstack
from r1jax.models.parameters import init_params
from r1jax.models.transformer import forward, logits

QWEN3 = DecoderConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    rope_theta=1e4,
    qk_norm=True,
    tied_embeddings=True,
    initializer_range=0.3,
)
SCALING = RopeScaling(kind="llama3", factor=8.0, original_max_position=16)
BIASED = dataclasses.replace(
    QWEN3, qk_norm=False, tied_embeddings=False, qkv_bias=True, output_bias=True, mlp_bias=True, rope_scaling=SCALING
)
PROMPTS = [[7, 3, 9, 1, 4], [11], [2, 2, 8]]
AFTER = [[5, 6, 7, 8], [1, 2, 3, 4], [40, 30, 20, 10]]


def random_params(config):
    """Fresh parameters, with biases and norm scales that show when they are left out."""
    leaves, tree = jax.tree.flatten(init_params(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [leaf + more for leaf, more in zip(leaves, noise, strict=True)])


def whole(params, config, tokens):
    """The training forward's logits of one sequence, [T, V]."""
    row = jnp.asarray([tokens])
    layout = Layout(segment_ids=jnp.ones_like(row), positions=jnp.arange(row.shape[1])[None])
    return np.asarray(logits(params, forward(params, row, layout, config))[0])


def stepwise(params, config, prompts, after, *, prompt_size, cache_size, rubbish=0, grow_at=None, kernels=None):
    """Logits of prefill and of each decode step, [B, 1 + steps, V]; padding of prompts holds `rubbish`."""
    tokens = np.full((len(prompts), prompt_size), rubbish, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt) for prompt in prompts])
    decode_params = unstack(params)
    cache = init_cache(config, len(after), cache_size)
    of_prefill, of_decode = kernels or (attend, cached_attention)
    out, shared = jax.jit(partial(prefill, config=config, attend=of_prefill))(
        decode_params, jnp.asarray(tokens), lengths
    )
    found = [jnp.repeat(out, len(after) // len(prompts), axis=0)]
    step = jax.jit(partial(decode, config=config, attend=of_decode), donate_argnums=5)
    for index in range(len(after[0])):
        drawn = jnp.asarray([row[index] for row in after])
        out, cache = step(decode_params, drawn, jnp.asarray(index), lengths, shared, cache)
        found.append(out)
        if index == grow_at:
            cache = grown(cache, cache_size + 3)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("config", [QWEN3, BIASED])
def test_prefill_and_decode_give_the_training_forwards_logits(config):
    params = random_params(config)
    found = stepwise(params, config, PROMPTS, AFTER, prompt_size=8, cache_size=4)
    for row, (prompt, after) in enumerate(zip(PROMPTS, AFTER, strict=True)):
        expected = whole(params, config, prompt + after)[len(prompt) - 1 :]
        assert expected.std() > 0.5  # logits that say something
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [QWEN3, BIASED])
def test_samples_share_the_cache_of_their_prompt(config):
    """Two samples of each of two prompts, in a cache that grows on the way, are four rows with prompts of their own."""
    params = random_params(config)
    after = [*AFTER, [9, 9, 1, 0]]
    shared = stepwise(params, config, PROMPTS[:2], after, prompt_size=8, cache_size=2, grow_at=1)
    alone = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    np.testing.assert_allclose(
        shared, stepwise(params, config, alone, after, prompt_size=8, cache_size=9), rtol=0, atol=1e-5
    )


def test_a_gpus_kernels_give_the_same_logits():
    """Prompts by the packed rows' kernel, new tokens by the cache's, both as Pallas interprets them."""
    params = random_params(QWEN3)
    kernels = partial(pallas.attend, interpret=True), partial(filled.cached_attention, interpret=True)
    sizes = {"prompt_size": 8, "cache_size": 16}
    found = stepwise(params, QWEN3, PROMPTS, AFTER, **sizes, kernels=kernels)
    np.testing.assert_allclose(found, stepwise(params, QWEN3, PROMPTS, AFTER, **sizes), rtol=0, atol=1e-5)


def test_padding_of_prompts_cache_and_batch_changes_nothing():
    params = random_params(QWEN3)
    alone = stepwise(params, QWEN3, PROMPTS[:1], AFTER[:1], prompt_size=5, cache_size=9)
    among = stepwise(params, QWEN3, PROMPTS, AFTER, prompt_size=16, cache_size=40, rubbish=13)
    np.testing.assert_allclose(among[0], alone[0], rtol=0, atol=1e-5)


def test_unstack_casts_and_lists_the_layers():
    params = random_params(QWEN3)
    unstacked = jax.jit(partial(unstack, dtype=jnp.bfloat16))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(unstacked)} == {jnp.dtype(jnp.bfloat16)}
    assert len(unstacked["layers"]) == QWEN3.num_layers
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(unstacked["layers"][2]["mlp"]["up"]["kernel"], kernel[2].astype(jnp.bfloat16))


def test_bfloat16_keeps_float32_logits_near_the_exact_ones():
    params = random_params(QWEN3)
    decode_params = unstack(params, jnp.bfloat16)
    cache = init_cache(QWEN3, 1, 8, jnp.bfloat16)
    tokens, lengths = jnp.asarray([PROMPTS[0]]), jnp.asarray([5])
    _, shared = prefill(decode_params, tokens, lengths, QWEN3)
    found, cache = decode(decode_params, jnp.asarray([5]), jnp.asarray(0), lengths, shared, cache, QWEN3)
    assert found.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((cache, shared))} == {jnp.dtype(jnp.bfloat16)}
    expected = whole(params, QWEN3, [*PROMPTS[0], 5])[-1]
    # Three layers of bfloat16 (8 bits): a few percent of the logits' spread.
    assert np.abs(np.asarray(found[0]) - expected).max() < 0.15 * expected.std()
