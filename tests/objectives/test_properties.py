"""What holds for every shape of the loss, on examples that hypothesis makes up."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.batch import PackedBatch
from r1jax.config.correction import Correction
from r1jax.config.mesh import MeshConfig
from r1jax.objectives.grpo import make_policy_loss
from r1jax.objectives.surrogate import Surrogate
from r1jax.sharding.mesh import make_mesh

ROWS, TOKENS, DOCUMENTS = 8, 12, 3
SHAPES = ("clip", "cispo", "sapo", "vespo")
SURROGATES = [
    Surrogate(shape=shape, level=level, beta=0.1, epsilon_high=5.0 if shape == "cispo" else 0.3)
    for shape, level in itertools.product(SHAPES, ("token", "sequence"))
] + [
    Surrogate(beta=0.1, correction=Correction(mode="token_mask", low=0.5, high=2.0, max_shift=0.2, max_divergence=0.1)),
    Surrogate(beta=0.1, level="sequence", correction=Correction(mode="sequence_truncate", high=2.0)),
]
SEEDS = st.integers(0, 2**32 - 1)
every_surrogate = pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: f"{s.shape}-{s.level}")
few = settings(max_examples=12, deadline=None)


def statistics(logprobs, batch):
    return logprobs, jnp.zeros_like(logprobs)


@functools.cache
def gradient_of(surrogate: Surrogate):
    return jax.jit(jax.value_and_grad(make_policy_loss(statistics, surrogate), has_aux=True))


def example(seed: int) -> tuple[np.ndarray, PackedBatch]:
    """(log-probabilities, a batch): documents of four tokens, the first of each a prompt, about a fifth masked."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, TOKENS)
    ids = np.tile(np.repeat(np.arange(1, DOCUMENTS + 1), TOKENS // DOCUMENTS), (ROWS, 1)).astype(np.int32)
    mask = (rng.uniform(size=shape) < 0.8) & (np.arange(TOKENS) % (TOKENS // DOCUMENTS) > 0)
    now = -rng.exponential(size=shape).astype(np.float32)
    advantages = np.repeat(rng.normal(size=(ROWS, DOCUMENTS)), TOKENS // DOCUMENTS, axis=1)
    floats = {
        "loss_weight": mask * rng.uniform(0.1, 1, shape), "advantages": mask * advantages,
        "old_logprobs": now + 0.4 * rng.normal(size=shape), "ref_logprobs": now + 0.4 * rng.normal(size=shape),
        "sampler_logprobs": now + 0.4 * rng.normal(size=shape),
    }  # fmt: skip
    batch = PackedBatch(
        tokens=ids, positions=ids, segment_ids=ids, loss_mask=mask.astype(np.int32), max_segments=DOCUMENTS,
        **{name: value.astype(np.float32) for name, value in floats.items()},
    )  # fmt: skip
    return now, batch


@every_surrogate
@few
@given(seed=SEEDS)
def test_nothing_to_train_on_is_no_loss_and_no_update(surrogate, seed):
    now, batch = example(seed)
    nothing = dataclasses.replace(batch, loss_mask=0 * batch.loss_mask, loss_weight=0 * batch.loss_weight)
    (value, sums), slope = gradient_of(surrogate)(now, nothing)
    assert float(value) == 0.0 and not slope.any() and float(sums["loss_tokens"]) == 0.0


@every_surrogate
@few
@given(seed=SEEDS)
def test_on_policy_every_shape_is_the_policy_gradient(surrogate, seed):
    """Ratio 1 and a sampler that agrees: minus weight times advantage, and the KL term's; nothing is cut or masked."""
    now, batch = example(seed)
    own = dataclasses.replace(batch, old_logprobs=now, sampler_logprobs=batch.loss_mask * now)
    (_, sums), slope = gradient_of(surrogate)(now, own)
    weight, away = batch.loss_weight, batch.ref_logprobs - now
    if surrogate.level == "sequence" and surrogate.shape in ("clip", "sapo"):
        by_document = weight.reshape(ROWS, DOCUMENTS, -1), batch.loss_mask.reshape(ROWS, DOCUMENTS, -1)
        mean = by_document[0].sum(-1, keepdims=True) / np.maximum(by_document[1].sum(-1, keepdims=True), 1)
        shared = (mean * by_document[1]).reshape(ROWS, TOKENS)
    else:
        shared = weight
    np.testing.assert_allclose(
        slope, -shared * batch.advantages + surrogate.beta * weight * (1 - np.exp(away)), atol=2e-5
    )
    for name in ("clipped_low", "clipped_high", "capped", "importance_truncated", "importance_masked"):
        assert float(sums.get(name, 0.0)) == 0.0


@every_surrogate
@few
@given(seed=SEEDS)
def test_where_completions_lie_makes_no_difference(surrogate, seed):
    """Rows in another order, and documents of a row in another: the same loss, the slopes moved along."""
    now, batch = example(seed)
    rng = np.random.default_rng(seed)
    rows, documents = rng.permutation(ROWS), rng.permutation(DOCUMENTS)

    def moved(x):
        return np.asarray(x)[rows].reshape(ROWS, DOCUMENTS, -1)[:, documents].reshape(ROWS, TOKENS)

    (value, _), slope = gradient_of(surrogate)(now, batch)
    other = dataclasses.replace(jax.tree.map(moved, batch), segment_ids=batch.segment_ids)
    (found, _), found_slope = gradient_of(surrogate)(moved(now), other)
    np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found_slope, moved(slope), rtol=1e-5, atol=1e-6)


@every_surrogate
def test_rows_spread_over_eight_devices_make_no_difference(surrogate):
    now, batch = example(7)
    (value, sums), slope = gradient_of(surrogate)(now, batch)
    rows = NamedSharding(make_mesh(MeshConfig(mesh_data=2, mesh_fsdp=4)), PartitionSpec(("fsdp", "data")))
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, rows), (now, batch))
    assert len(placed[0].sharding.device_set) == 8
    (found, found_sums), found_slope = gradient_of(surrogate)(*placed)
    np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_slope, slope, rtol=1e-5, atol=1e-6)
    for name in sums:
        np.testing.assert_allclose(found_sums[name], sums[name], rtol=1e-5, atol=1e-5)
