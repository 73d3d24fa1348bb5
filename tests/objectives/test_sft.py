import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import PackedBatch
from r1jax.models.config import DecoderConfig
from r1jax.models.execution import Execution
from r1jax.models.parameters import init_params
from r1jax.models.transformer import forward, logits
from r1jax.objectives.sft import make_nll

CONFIG = DecoderConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-6,
    rope_theta=1e4,
    tied_embeddings=True,
    initializer_range=0.2,
)
LENGTHS = (9, 5, 12, 3, 7)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def make_document(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, loss mask (never the first token) and weights that differ from token to token."""
    rng = np.random.default_rng(index)
    length = LENGTHS[index]
    mask = (rng.uniform(size=length) < 0.7) & (np.arange(length) > 0)
    return rng.integers(0, 48, length), mask, mask * rng.uniform(0.01, 0.1, length)


def pack(rows: list[list[int]], shape: tuple[int, int]) -> PackedBatch:
    """Rows of documents by their number; weights belong to the document, wherever it lies."""
    fields: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
    mask, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for at, row in enumerate(rows):
        start = 0
        for segment, index in enumerate(row, start=1):
            tokens, trained, weights = make_document(index)
            span = (at, slice(start, start + len(tokens)))
            fields["tokens"][span], fields["positions"][span] = tokens, np.arange(len(tokens))
            fields["segment_ids"][span], mask[span], weight[span] = segment, trained, weights
            start += len(tokens)
    return PackedBatch(**fields, loss_mask=mask, loss_weight=weight)


PACKED = [[0, 1], [2, 3], [4]]
TIGHT, ROOMY = (3, 16), (5, 40)
ONE_EACH = [[index] for index in range(5)]


@functools.cache
def gradients_of(by_probability: bool = False, **options):
    loss = make_nll(CONFIG, Execution(**options), by_probability=by_probability)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@jax.jit
def scores_of(params, batch: PackedBatch):
    """All logits, float32 [B, T, V]."""
    return logits(params, forward(params, batch.tokens, batch.layout, CONFIG))


def relative_error(one, other) -> float:
    return max(
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_a_model_that_knows_nothing_pays_ln_vocabulary(params):
    """Zero weights make all 48 tokens equally likely; id 0 is as top as any, so each trained token counts as right."""
    batch = pack(PACKED, TIGHT)
    (loss, sums), _ = gradients_of()(jax.tree.map(jnp.zeros_like, params), batch)
    np.testing.assert_allclose(loss, batch.loss_weight.sum() * np.log(48), rtol=1e-6)
    assert float(sums["loss_tokens"]) == float(sums["correct_tokens"]) == batch.loss_mask.sum()


def test_against_each_document_alone(params):
    """Plain log-softmax in float64 over the logits of one document at a time, alone in its row."""
    total = right = 0.0
    for index in range(5):
        tokens, mask, weights = make_document(index)
        scores = np.asarray(scores_of(params, pack([[index]], (1, 16))), np.float64)[0, : len(tokens) - 1]
        logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        total -= (weights[1:] * logprobs[np.arange(len(tokens) - 1), tokens[1:]]).sum()
        right += (mask[1:] & (scores.argmax(-1) == tokens[1:])).sum()
    (loss, sums), _ = gradients_of()(params, pack(PACKED, TIGHT))
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert float(sums["correct_tokens"]) == right


def test_against_transformers_loss(params):
    """Labels -100 where nothing is trained, and the number of trained tokens as the denominator."""
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    batch = pack(PACKED, TIGHT)
    scores = np.array(scores_of(params, batch))
    labels = torch.from_numpy(np.where(batch.loss_mask == 1, batch.tokens, -100)).long()
    count = torch.tensor(batch.loss_mask.sum())
    theirs = ForCausalLMLoss(torch.from_numpy(scores), labels, 48, num_items_in_batch=count)
    batch.loss_weight[:] = batch.loss_mask / batch.loss_mask.sum()
    np.testing.assert_allclose(gradients_of()(params, batch)[0][0], theirs.item(), rtol=1e-5)


@pytest.mark.parametrize("rows", [ONE_EACH, [[4, 3, 0, 1, 2]], [[2, 3], [], [1, 4, 0]]])
def test_packing_padding_and_chunks_change_nothing(params, rows):
    """One document a row, all in one row, or in another order beside an empty row; more padding; chunks of 7."""
    (loss, sums), gradients = gradients_of()(params, pack(PACKED, TIGHT))
    (other, other_sums), other_gradients = gradients_of(loss_chunk=7)(params, pack(rows, ROOMY))
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    assert other_sums == sums
    assert relative_error(other_gradients, gradients) <= 1e-5


def test_what_lies_in_padding_changes_nothing(params):
    """Exactly: padding's tokens and even its positions are read by nothing that is trained."""
    batch = pack(PACKED, ROOMY)
    expected = gradients_of(loss_chunk=7)(params, batch)
    padding = batch.segment_ids == 0
    batch.tokens[padding], batch.positions[padding] = 17, 3
    (loss, sums), gradients = gradients_of(loss_chunk=7)(params, batch)
    assert (loss, sums) == expected[0]
    assert relative_error(gradients, expected[1]) <= 1e-6


def test_bfloat16_is_near_float32(params):
    """8 bits of mantissa through two layers: 1 % of the loss, 5 % of each gradient's norm; gradients are float32."""
    (loss, _), gradients = gradients_of()(params, pack(PACKED, TIGHT))
    (other, _), other_gradients = gradients_of(dtype="bfloat16")(params, pack(PACKED, TIGHT))
    assert other != loss
    np.testing.assert_allclose(other, loss, rtol=1e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(other_gradients)} == {jnp.dtype(jnp.float32)}
    assert relative_error(other_gradients, gradients) <= 5e-2


def test_noise_only_with_a_key(params):
    """Without a key (evaluation) the loss is the plain one; with one it differs, by the key and by nothing else."""
    batch = pack(PACKED, TIGHT)
    noisy = jax.jit(make_nll(CONFIG, neftune_noise_alpha=5.0))
    plain = jax.jit(make_nll(CONFIG))(params, batch)[0]
    assert noisy(params, batch)[0] == plain
    first, again, second = (noisy(params, batch, jax.random.key(seed))[0] for seed in (1, 1, 2))
    assert first == again
    assert len({float(plain), float(first), float(second)}) == 3
