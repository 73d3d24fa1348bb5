"""What the corrections are for: a sampler that is not the policy, and the gradient that should have been.

Expectations are exact: every completion of three tokens over six words is in the batch, weighed by its probability to
the sampler, so that nothing is left to chance. The policy is a table of logits for each prefix.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import PackedBatch
from r1jax.config.correction import PRESETS, Correction
from r1jax.objectives.grpo import make_policy_loss, policy_metrics
from r1jax.objectives.surrogate import Surrogate

WORDS, LENGTH = 6, 3
COMPLETIONS = np.asarray(list(itertools.product(range(WORDS), repeat=LENGTH)))
REWARDS = np.random.default_rng(1).normal(size=len(COMPLETIONS))
"""Of each completion: it depends on all its tokens."""


def prefix_numbers() -> np.ndarray:
    """[completions, LENGTH]: the row of the table that a token is drawn from."""
    powers = WORDS ** np.arange(LENGTH)
    starts = np.concatenate([[0], np.cumsum(powers)[:-1]])
    columns = [np.zeros(len(COMPLETIONS), int)]
    for at in range(1, LENGTH):
        columns.append(starts[at] + COMPLETIONS[:, :at] @ (WORDS ** np.arange(at)))
    return np.stack(columns, axis=1)


PREFIXES = prefix_numbers()
POLICY = 2.0 * np.random.default_rng(0).normal(size=(PREFIXES.max() + 1, WORDS)).astype(np.float32)


def logprobs_of(table):
    """[completions, LENGTH]."""
    return jax.nn.log_softmax(table)[PREFIXES, COMPLETIONS]


def statistics(table, batch):
    logprobs = logprobs_of(table)
    return logprobs, jnp.zeros_like(logprobs)


def sampler(kind: str) -> np.ndarray:
    """The policy's table as another program has it, or another version of it."""
    if kind == "bfloat16":
        return np.asarray(jnp.asarray(POLICY).astype(jnp.bfloat16).astype(jnp.float32))
    if kind == "2 % hotter":
        return POLICY / 1.02
    if kind == "one step stale":
        # A step of gradient ascent on the reward that the sampler has not seen.
        return POLICY - 0.5 * np.asarray(jax.grad(expected_reward)(jnp.asarray(POLICY)))
    assert kind == "far", kind
    return POLICY + 0.7 * np.random.default_rng(2).normal(size=POLICY.shape).astype(np.float32)


def expected_reward(table):
    return jnp.sum(jnp.exp(logprobs_of(table).sum(axis=1)) * REWARDS)


def update(kind: str, correction: Correction) -> tuple[np.ndarray, dict[str, float]]:
    """(the gradient of the loss in expectation over the sampler, metrics)."""
    drawn = np.asarray(logprobs_of(jnp.asarray(sampler(kind))))
    chance = np.exp(drawn.sum(axis=1))
    ones = np.ones_like(COMPLETIONS)
    batch = PackedBatch(
        tokens=COMPLETIONS, positions=COMPLETIONS, segment_ids=ones, loss_mask=ones, max_segments=1,
        loss_weight=np.repeat(chance[:, None], LENGTH, axis=1), sampler_logprobs=drawn,
        advantages=np.repeat(REWARDS[:, None].astype(np.float32), LENGTH, axis=1),
    )  # fmt: skip
    loss = make_policy_loss(statistics, Surrogate(correction=correction))
    (value, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        jnp.asarray(POLICY), jax.tree.map(jnp.asarray, batch)
    )
    numbers = {name: float(one) for name, one in sums.items()}
    return np.asarray(gradient), policy_metrics({"loss": float(value), **numbers}, 1)


def error(gradient: np.ndarray) -> float:
    """Relative to the gradient of the expected reward under the policy itself."""
    exact = -np.asarray(jax.grad(expected_reward)(jnp.asarray(POLICY)))
    return float(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))


def test_without_a_difference_the_gradient_is_exact():
    drawn = np.asarray(logprobs_of(jnp.asarray(POLICY)))
    assert np.exp(drawn.sum(axis=1)).sum() == pytest.approx(1.0, abs=1e-6)
    table = jnp.asarray(POLICY)
    assert error(-np.asarray(jax.grad(expected_reward)(table))) == 0.0


# kind, the error without correction is at least, with truncation of tokens at most, of sequences at most
BOUNDS = [
    ("bfloat16", 4e-3, 4.5e-3, 1e-6),
    ("2 % hotter", 1.2e-2, 1.3e-2, 1e-6),
    ("one step stale", 4e-2, 4e-2, 1e-6),
]


@pytest.mark.parametrize(("kind", "uncorrected", "tokens", "sequences"), BOUNDS)
def test_truncation_restores_the_gradient(kind, uncorrected, tokens, sequences):
    """Whole completions' ratios restore it to rounding while none is cut, tokens' ratios but for what the other tokens
    of a completion say; each is better than nothing, and the metrics show the sampler."""
    plain, metrics = update(kind, Correction())
    by_token, told = update(kind, PRESETS["tis"])
    by_sequence, _ = update(kind, Correction(mode="sequence_truncate", high=3.0))
    assert error(plain) > uncorrected
    assert error(by_token) < min(tokens, 0.9 * error(plain))
    assert error(by_sequence) < sequences
    assert metrics["mismatch_kl"] > 1e-7
    assert (
        told["sampling/importance_sampling_ratio/max"] > 1.001 > 0.999 > told["sampling/importance_sampling_ratio/min"]
    )


def test_a_far_sampler_is_cut_and_shows():
    """Ratios beyond the bounds: the metrics count them, masks leave them out, and truncation is still nearer than
    nothing."""
    plain, metrics = update("far", Correction())
    by_token, told = update("far", PRESETS["tis"])
    _, masked = update("far", PRESETS["icepop"])
    assert metrics["mismatch_kl"] > 0.02
    assert error(by_token) < 0.9 * error(plain)
    assert told["sampling/importance_sampling_truncated"] > 0.05
    assert masked["sampling/importance_sampling_masked"] > 0.05
    assert 0.3 < told["sampling/effective_sample_size"] < 0.95
