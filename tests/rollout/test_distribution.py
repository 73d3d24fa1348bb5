import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.rollout.distribution import nucleus_logits, sample, sample_keys

LOGITS = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]]))


def draw(logits, *, seed=0, prompts=None, samples=None, index=0, temperature=1.0, top_p=1.0):
    rows = logits.shape[0]
    ids = jnp.arange(rows) if prompts is None else jnp.asarray(prompts)
    keys = sample_keys(seed, ids, jnp.zeros(rows, jnp.int32) if samples is None else jnp.asarray(samples))
    return sample(
        logits,
        keys,
        jnp.asarray(index),
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(top_p, jnp.float32),
        greedy=temperature == 0,
        nucleus=top_p < 1,
    )


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [[0], [3]]), (0.5, [[0], [2, 3]]), (0.81, [[0, 1, 2], [1, 2, 3]]), (0.999, [[0, 1, 2, 3], [0, 1, 2, 3]])],
)
def test_the_nucleus_is_the_fewest_tokens_that_hold_top_p(top_p, kept):
    found = nucleus_logits(LOGITS, jnp.float32(top_p))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in found] == kept


def test_among_equals_the_nucleus_takes_no_more_than_it_needs():
    found = nucleus_logits(jnp.zeros((1, 4)), jnp.float32(0.5))
    assert np.isfinite(found).tolist() == [[True, True, False, False]]


def test_log_probabilities_are_those_of_the_distribution_drawn_from():
    # At temperature 0.5 the probabilities are squared and normed; the nucleus of 0.9 then holds 0.25, 0.09 of 0.365.
    row = LOGITS[:1]
    expected = {0: np.log(0.25 / 0.34), 1: np.log(0.09 / 0.34)}
    seen = set()
    for seed in range(12):
        token, logprob = draw(row, seed=seed, temperature=0.5, top_p=0.9)
        seen.add(int(token[0]))
        np.testing.assert_allclose(logprob[0], expected[int(token[0])], rtol=1e-5)
    assert seen == {0, 1}


def test_greedy_takes_the_likeliest_and_the_models_own_log_probability():
    tokens, logprobs = draw(jnp.concatenate([LOGITS, jnp.zeros((1, 4))]), temperature=0)
    assert tokens.tolist() == [0, 3, 0]
    np.testing.assert_allclose(logprobs, np.log([0.5, 0.4, 0.25]), rtol=1e-5)


def test_frequencies_follow_the_probabilities():
    rows = 4000
    tokens, _ = draw(jnp.broadcast_to(LOGITS[0], (rows, 4)))
    shares = np.bincount(tokens, minlength=4) / rows
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=4 * 0.5 / rows**0.5)


def test_a_rows_number_depends_on_seed_prompt_sample_and_index_and_not_on_its_place():
    logits = jax.random.normal(jax.random.key(3), (1, 1000)).repeat(3, axis=0)
    base, _ = draw(logits, prompts=[5, 6, 7], samples=[0, 1, 2])
    moved, _ = draw(logits, prompts=[7, 5, 6], samples=[2, 0, 1])
    assert moved.tolist() == [base[2], base[0], base[1]]
    for change in ({"seed": 1}, {"index": 1}, {"samples": [3, 4, 5]}, {"prompts": [8, 9, 10]}):
        other, _ = draw(logits, **{"prompts": [5, 6, 7], "samples": [0, 1, 2], **change})
        assert other.tolist() != base.tolist()


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_every_seed_of_32_bits_works(seed):
    tokens, _ = draw(LOGITS, seed=seed)
    assert tokens.shape == (2,)
