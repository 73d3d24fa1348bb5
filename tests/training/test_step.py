import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from r1jax import optimizer
from r1jax.batch import PackedBatch
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.execution import Execution
from r1jax.objectives.sft import make_nll
from r1jax.optimizer import make_schedule
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import make_mesh
from r1jax.training.state import TrainState, fresh_params, lay_out, start_state
from r1jax.training.step import make_eval_step, make_gradients, make_score_step, make_train_step

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, lr_scheduler_type="constant", weight_decay=0.1)
ONE = {"mesh_fsdp": 1}


@pytest.fixture(scope="module")
def one(laid_out):
    """Layout and loss on one device."""
    return laid_out(ONE, 0, OPTIMIZER)


@pytest.fixture(scope="module")
def first(decoder, one) -> TrainState:
    """The first state, on the host."""
    return jax.device_get(start_state(fresh_params(decoder, 0, one[0]), OPTIMIZER, one[0]))


@pytest.fixture(scope="module")
def batch(packed_steps) -> PackedBatch:
    """Two micro-batches of 8 rows."""
    return packed_steps(10, 2)[0]


@pytest.fixture(scope="module")
def gradients(one, first, batch):
    """(gradients, loss, sums) of the batch."""
    layout, loss = one
    return jax.jit(make_gradients(loss, layout))(jax.device_put(first.params, layout.shardings.params), batch)


def relative_error(tree, other) -> float:
    return max(
        float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


def test_accumulation_changes_nothing(one, first, batch, gradients):
    """Two micro-batches of 8 rows and one of 16: sums of weighted tokens either way."""
    layout, loss = one
    merged = jax.tree.map(lambda leaf: leaf.reshape(1, 16, -1), batch)
    again = jax.jit(make_gradients(loss, layout))(jax.device_put(first.params, layout.shardings.params), merged)
    assert batch.loss_mask[0].sum() != batch.loss_mask[1].sum()
    assert relative_error(again[:2], gradients[:2]) <= 1e-6
    assert {name: float(value) for name, value in again[2].items()} == {
        name: float(value) for name, value in gradients[2].items()
    }


def test_a_step_is_gradients_then_optimizer(one, first, batch, gradients):
    layout, loss = one
    step = make_train_step(loss, OPTIMIZER, make_schedule(OPTIMIZER, 10), layout)
    state = jax.device_put(first, layout.shardings)
    after, metrics = step(state, jax.device_put(batch, layout.batch))
    update = jax.jit(functools.partial(optimizer.update, OPTIMIZER, make_schedule(OPTIMIZER, 10)))
    params, moments, measured = update(gradients[0], first.optimizer, first.params)
    assert relative_error(after.params, params) <= 1e-6
    assert relative_error(after.optimizer["mu"], moments["mu"]) <= 1e-6
    assert int(after.step) == int(after.optimizer["count"]) == 1
    assert set(metrics) == {"loss", "grad_norm", "learning_rate", "correct_tokens", "loss_tokens"}
    expected = {"loss": gradients[1], **measured, **gradients[2]}
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)
    # Donated: the step needs no room for a second state.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_an_evaluation_batch_adds_up(one, first, batch, gradients):
    """Over both micro-batches, the same loss as training's and the same counts; the parameters stay."""
    layout, loss = one
    params = jax.device_put(first.params, layout.shardings.params)
    sums = make_eval_step(loss, layout)(params, jax.device_put(batch, layout.batch))
    np.testing.assert_allclose(sums["loss"], gradients[1], rtol=1e-6)
    assert float(sums["loss_tokens"]) == batch.loss_mask.sum()
    assert float(sums["correct_tokens"]) == float(gradients[2]["correct_tokens"])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_stage_3_gathers_a_layer_at_a_time(laid_out, batch, remat):
    """No array of the compiled program has the shape of a whole stacked matrix; slices of one layer there are.

    "dots" is what runs use without gradient_checkpointing. "none" would keep every layer's gathered weights.
    """
    layout, loss = laid_out({"mesh_fsdp": 8}, 3, OPTIMIZER, remat)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    step = jax.jit(make_gradients(loss, layout), in_shardings=(layout.shardings.params, layout.batch))
    text = step.lower(layout.abstract.params, shapes).compile().as_text()
    assert text is not None
    assert re.search(r"f32\[(1,)?32,48\]", text)
    assert not re.search(r"f32\[2,(32,48|48,32)\]", text)


def test_work_is_shared_by_all_devices(decoder):
    """At most 1.05 x total / 8 FLOPs a device for a whole step's gradients where the vocabulary dominates. XLA counts
    a loop's body once: one micro-batch and one chunk of the loss are no loops, and the layers' loop has as many turns
    on one device as on eight."""
    large = dataclasses.replace(decoder, vocab_size=4096)
    number, weight = (jax.ShapeDtypeStruct((1, 8, 128), dtype) for dtype in ("int32", "float32"))
    shapes = PackedBatch(tokens=number, positions=number, segment_ids=number, loss_mask=number, loss_weight=weight)

    def flops(shape: dict[str, int], chunk: int) -> float:
        devices = jax.devices()[: shape["mesh_fsdp"]]
        layout = lay_out(large, OPTIMIZER, make_mesh(MeshConfig(**shape), devices), 3)
        constrain = make_constrain(layout.mesh, layout.specs)
        loss = make_nll(large, Execution(constrain=constrain, mesh=layout.mesh, loss_chunk=chunk))
        step = jax.jit(make_gradients(loss, layout), in_shardings=(layout.shardings.params, layout.batch))
        analysis = step.lower(layout.abstract.params, shapes).compile().cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    assert flops({"mesh_fsdp": 8}, 128) <= 1.05 * flops(ONE, 1024) / 8


def test_random_draws_are_of_seed_step_and_micro_batch(decoder, one, first, batch):
    """The loss here is what it draws: the same step draws the same after a resume, another step, seed or micro-batch
    another number; without a seed the loss gets no key."""
    layout, _ = one

    def drawing(params, micro_batch, key=None):
        value = sum((jax.numpy.vdot(leaf, leaf) for leaf in jax.tree.leaves(params)), jax.numpy.zeros(()))
        drawn = 0.0 if key is None else jax.random.uniform(key)
        return value, {"drawn": jax.numpy.asarray(drawn), "squared": jax.numpy.asarray(drawn) ** 2}

    @functools.cache
    def step_of(seed):
        return make_train_step(drawing, OPTIMIZER, make_schedule(OPTIMIZER, 10), layout, seed=seed)

    def drawn(seed, at):
        start = dataclasses.replace(first, step=np.asarray(at, np.int32))
        metrics = step_of(seed)(jax.device_put(start, layout.shardings), jax.device_put(batch, layout.batch))[1]
        return float(metrics["drawn"]), float(metrics["squared"])

    assert drawn(1, 3) == drawn(1, 3)
    assert len({drawn(1, 3), drawn(1, 4), drawn(2, 3)}) == 3
    total, squares = drawn(1, 3)
    assert squares > 1.001 * total**2 / 2  # equal only if both micro-batches drew the same
    assert drawn(None, 3) == (0.0, 0.0)


def padded(batch: PackedBatch, count: int) -> PackedBatch:
    """The batch with micro-batches of padding behind it."""
    return jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros((count, *leaf.shape[1:]), leaf.dtype)]), batch)


def counting(plain):
    """The loss with the extremes of what it counts, and how often it was computed."""

    def loss(params, micro_batch):
        value, sums = plain(params, micro_batch)
        count, one = sums["loss_tokens"], jax.numpy.ones(())
        return value, sums | {"tokens_min": count, "tokens_max": count, "negative_max": -count, "computed": one}

    return loss


@pytest.mark.parametrize("count", [1, 6])
def test_micro_batches_of_padding_are_skipped(one, first, batch, gradients, count):
    """Any number of them gives the gradients, sums and extremes of the batch without; only two are computed."""
    layout, loss = one
    params = jax.device_put(first.params, layout.shardings.params)
    compute = jax.jit(make_gradients(counting(loss), layout, skip_empty=True))
    grads, value, sums = compute(params, padded(batch, count))
    assert relative_error((grads, value), gradients[:2]) <= 1e-6
    tokens = batch.loss_mask.sum(axis=(1, 2))
    assert len(tokens) == 2 and tokens[0] != tokens[1]
    assert float(sums["computed"]) == 2 and float(sums["loss_tokens"]) == tokens.sum()
    assert (float(sums["tokens_min"]), float(sums["tokens_max"])) == (tokens.min(), tokens.max())
    assert float(sums["negative_max"]) == -tokens.min()  # an extreme of negative numbers is not 0


def test_without_skipping_padding_is_computed(one, first, batch):
    layout, loss = one
    params = jax.device_put(first.params, layout.shardings.params)
    _, _, sums = jax.jit(make_gradients(counting(loss), layout))(params, padded(batch, 1))
    assert float(sums["computed"]) == 3 and float(sums["tokens_min"]) == 0


def test_a_step_of_nothing_but_padding_changes_nothing_but_the_decay(one, first, batch):
    layout, loss = one
    nothing = jax.tree.map(np.zeros_like, batch)
    grads, value, sums = jax.jit(make_gradients(loss, layout, skip_empty=True))(
        jax.device_put(first.params, layout.shardings.params), nothing
    )
    assert float(value) == float(sums["loss_tokens"]) == 0.0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_scores_are_those_of_each_micro_batch(laid_out, first, batch):
    """On two devices, at the places of the batch; micro-batches of padding are not computed and give 0."""
    layout, _ = laid_out({"mesh_fsdp": 2}, 3, OPTIMIZER)

    def score(params, micro_batch):
        scale = sum(jax.numpy.sum(leaf) for leaf in jax.tree.leaves(params))
        return 1.0 + scale * micro_batch.tokens.astype(jax.numpy.float32)

    params = jax.device_put(first.params, layout.shardings.params)
    given = jax.device_put(padded(batch, 2), layout.batch)
    found = make_score_step(score, layout)(params, given)
    assert found.sharding.is_equivalent_to(layout.batch, 3) and found.dtype == np.float32
    scale = sum(float(np.sum(leaf)) for leaf in jax.tree.leaves(first.params))
    np.testing.assert_allclose(found[:2], 1.0 + scale * batch.tokens, rtol=1e-4, atol=1e-4)
    assert not np.any(found[2:])
