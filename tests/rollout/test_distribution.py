from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.rollout.distribution import (
    amounts,
    min_p_logits,
    nucleus_logits,
    penalised_logits,
    reshapes,
    sample,
    sample_keys,
    switches,
    top_k_logits,
)
from r1jax.rollout.settings import SamplingSettings

LOGITS = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]]))


def draw(logits, *, seed=0, prompts=None, samples=None, step=None, index=0, seen=None, **settings):
    rows = logits.shape[0]
    ids = jnp.arange(rows) if prompts is None else jnp.asarray(prompts)
    numbers = jnp.zeros(rows, jnp.int32) if samples is None else jnp.asarray(samples)
    keys = sample_keys(seed, ids, numbers, None if step is None else jnp.uint32(step))
    chosen = SamplingSettings(max_new_tokens=1, **settings)
    on = switches(chosen, logits.shape[1])
    return sample(logits, keys, jnp.asarray(index), amounts(chosen), on, seen)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [[0], [3]]), (0.5, [[0], [2, 3]]), (0.81, [[0, 1, 2], [1, 2, 3]]), (0.999, [[0, 1, 2, 3], [0, 1, 2, 3]])],
)
def test_the_nucleus_is_the_fewest_tokens_that_hold_top_p(top_p, kept):
    assert finite(nucleus_logits(LOGITS, jnp.float32(top_p))) == kept


@pytest.mark.parametrize(("top_k", "kept"), [(1, [[0], [3]]), (3, [[0, 1, 2], [1, 2, 3]]), (4, [[0, 1, 2, 3]] * 2)])
def test_the_top_k_likeliest(top_k, kept):
    assert finite(top_k_logits(LOGITS, top_k)) == kept


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.09, [[0, 1, 2, 3]] * 2), (0.29, [[0, 1, 2], [1, 2, 3]]), (1, [[0], [3]])]
)
def test_tokens_of_at_least_a_share_of_the_likeliest(min_p, kept):
    assert finite(min_p_logits(LOGITS, jnp.float32(min_p))) == kept


def finite(logits):
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in logits]


def test_seen_tokens_are_penalised_on_both_sides_of_zero():
    logits, seen = jnp.asarray([[3.0, -3.0, 3.0]]), jnp.asarray([[True, True, False]])
    assert penalised_logits(logits, seen, jnp.float32(1.5)).tolist() == [[2.0, -4.5, 3.0]]


def test_among_equals_the_nucleus_takes_no_more_than_it_needs_and_top_k_takes_all():
    found = nucleus_logits(jnp.zeros((1, 4)), jnp.float32(0.5))
    assert np.isfinite(found).tolist() == [[True, True, False, False]]
    assert np.isfinite(top_k_logits(jnp.zeros((1, 4)), 2)).all()


SETTINGS = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 0.6, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 1.7, "top_k": 3, "top_p": 0.95, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_distributions_are_those_of_transformers(settings):
    """The log-probability of each token that we draw, under what transformers' processors make of the same logits."""
    logits, ids = np.random.default_rng(0).normal(size=(64, 40)).astype(np.float32) * 3, np.arange(0, 64 * 9, 9) % 40
    ids = np.stack([ids, (ids + 7) % 40, ids], axis=1)
    expected = processed(logits, ids, settings)
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    tokens, logprobs, policy_logprobs = draw(jnp.asarray(logits), seen=jnp.asarray(seen), **settings)
    chosen = np.take_along_axis(expected, np.asarray(tokens)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(logprobs, chosen, atol=2e-6)
    tempered = jax.nn.log_softmax(logits / settings.get("temperature", 1.0))
    np.testing.assert_allclose(policy_logprobs, tempered[np.arange(64), tokens], atol=2e-6)
    # Few and likely tokens alone are left to draw, where that is asked for.
    assert len(set(np.asarray(tokens).tolist())) > 10 and (np.asarray(logprobs) != np.asarray(policy_logprobs)).any()


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_processors_of_transformers_keep_what_ours_keep(settings):
    logits = np.random.default_rng(1).normal(size=(16, 40)).astype(np.float32) * 2
    ids = np.zeros((16, 1), np.int64)
    expected = processed(logits, ids, settings)
    found = jnp.asarray(logits)
    if "repetition_penalty" in settings:
        found = penalised_logits(
            found, jnp.arange(40)[None] == jnp.zeros((16, 1), jnp.int32), jnp.float32(settings["repetition_penalty"])
        )
    found = found / settings.get("temperature", 1.0)
    if "top_k" in settings:
        found = top_k_logits(found, settings["top_k"])
    if "top_p" in settings:
        found = nucleus_logits(found, jnp.float32(settings["top_p"]))
    if "min_p" in settings:
        found = min_p_logits(found, jnp.float32(settings["min_p"]))
    found = np.asarray(jax.nn.log_softmax(found))
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    kept = np.isfinite(expected)
    np.testing.assert_allclose(found[kept], expected[kept], atol=2e-6)


def processed(logits, ids, settings):
    """Log-probabilities by the list of processors that transformers' `generate` makes of the same settings."""
    import torch
    import transformers

    config = transformers.GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    tiny = transformers.LlamaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    tiny.intermediate_size = 8
    model: Any = transformers.LlamaForCausalLM(tiny)
    made = model._get_logits_processor(config, input_ids_seq_length=ids.shape[1], device="cpu")
    names = [type(one).__name__ for one in made]
    assert len(names) == len(settings), names
    scores = made(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logits.copy()))
    return torch.log_softmax(scores, dim=-1).numpy()


def test_log_probabilities_are_those_of_the_distribution_drawn_from():
    # At temperature 0.5 the probabilities are squared and normed; the nucleus of 0.9 then holds 0.25, 0.09 of 0.365.
    drawn = draw(jnp.broadcast_to(LOGITS[0], (64, 4)), temperature=0.5, top_p=0.9)
    assert set(drawn.tokens.tolist()) == {0, 1}
    kept = np.array([0.25, 0.09])
    np.testing.assert_allclose(drawn.logprobs, np.log(kept / 0.34)[drawn.tokens], rtol=1e-5)
    np.testing.assert_allclose(drawn.policy_logprobs, np.log(kept / 0.365)[drawn.tokens], rtol=1e-5)


def test_greedy_takes_the_likeliest_and_the_models_own_log_probability():
    rows = jnp.concatenate([LOGITS, jnp.zeros((1, 4))])
    tokens, logprobs, policy_logprobs = draw(rows, temperature=0, top_k=2, min_p=0.5, top_p=0.3)
    assert tokens.tolist() == [0, 3, 0]
    np.testing.assert_allclose(logprobs, np.log([0.5, 0.4, 0.25]), rtol=1e-5)
    np.testing.assert_array_equal(logprobs, policy_logprobs)
    # Logits 1 and 0.5, the first seen and halved: the second wins if penalised by more.
    two, seen = jnp.asarray([[1.0, 0.5]]), jnp.asarray([[True, False]])
    tokens, logprobs, policy_logprobs = draw(two, temperature=0, repetition_penalty=4.0, seen=seen)
    assert tokens.tolist() == [1]
    np.testing.assert_allclose(logprobs, -np.log1p(np.exp(0.25 - 0.5)), rtol=1e-5)
    np.testing.assert_allclose(policy_logprobs, -np.log1p(np.exp(1 - 0.5)), rtol=1e-5)


def test_only_what_is_switched_on_is_compiled():
    off = SamplingSettings(max_new_tokens=1, top_k=0, min_p=0.0, top_p=1.0)
    assert not reshapes(switches(off, 40)) and switches(off, 40) == (False, False, 0, False, False)
    assert switches(SamplingSettings(max_new_tokens=1, top_k=40), 40).top_k == 0
    greedy = SamplingSettings(max_new_tokens=1, temperature=0, top_k=3, top_p=0.5, min_p=0.1)
    assert switches(greedy, 40) == (True, False, 0, False, False)
    on = SamplingSettings(max_new_tokens=1, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.1)
    assert switches(on, 40) == (False, True, 3, True, True)


def test_frequencies_follow_the_probabilities():
    rows = 4000
    tokens = draw(jnp.broadcast_to(LOGITS[0], (rows, 4))).tokens
    shares = np.bincount(tokens, minlength=4) / rows
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=4 * 0.5 / rows**0.5)


def test_so_they_do_over_the_blocks_of_a_vocabulary():
    """Three blocks, of which nothing of the first can be drawn and the last is not whole."""
    rows, size = 40_000, 300
    logits = np.random.default_rng(0).normal(size=size).astype(np.float32)
    logits[:128] = -np.inf
    logits[150:200] += 3
    drawn = draw(jnp.broadcast_to(logits, (rows, size)))
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    shares = np.bincount(drawn.tokens, minlength=size) / rows
    assert len(shares) == size and not shares[:128].any()
    # 5 deviations for each of 172 tokens; both blocks have tokens enough to be told from one that takes all.
    np.testing.assert_array_less(np.abs(shares - expected)[128:], 5 * np.sqrt(expected[128:] / rows))
    assert min(expected[128:256].sum(), expected[256:].sum()) > 0.03
    np.testing.assert_allclose(drawn.logprobs, np.log(expected[drawn.tokens]), atol=2e-6)


def test_a_rows_number_depends_on_seed_step_prompt_sample_and_index_and_not_on_its_place():
    logits = jax.random.normal(jax.random.key(3), (1, 1000)).repeat(3, axis=0)
    base = draw(logits, prompts=[5, 6, 7], samples=[0, 1, 2]).tokens
    moved = draw(logits, prompts=[7, 5, 6], samples=[2, 0, 1]).tokens
    assert moved.tolist() == [base[2], base[0], base[1]]
    changes = [{"seed": 1}, {"index": 1}, {"samples": [3, 4, 5]}, {"prompts": [8, 9, 10]}, {"step": 0}, {"step": 1}]
    others = [
        tuple(draw(logits, **{"prompts": [5, 6, 7], "samples": [0, 1, 2], **change}).tokens.tolist())
        for change in changes
    ]
    assert len({tuple(base.tolist()), *others}) == 7


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_every_seed_of_32_bits_works(seed):
    assert draw(LOGITS, seed=seed).tokens.shape == (2,)
    keys = [sample_keys(number, jnp.arange(2), jnp.arange(2)) for number in (seed, jnp.uint32(seed))]
    assert (jax.random.key_data(keys[0]) == jax.random.key_data(keys[1])).all()
