import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config.errors import UserError
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.parameters import abstract_params, init_params
from r1jax.training.state import TrainState, fresh_params, start_state

OPTIMIZER = OptimizerConfig()


def assert_as_announced(state: TrainState, abstract: TrainState) -> None:
    for leaf, announced in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (announced.shape, announced.dtype)
        assert leaf.sharding == announced.sharding


def test_state_is_born_in_its_layout(decoder, laid_out):
    """The numbers are those of one device whatever the mesh; moments and counts are zero; nothing is copied."""
    layout, _ = laid_out({"mesh_data": 2, "mesh_fsdp": 2, "mesh_tensor": 2}, 3, OPTIMIZER)
    params = fresh_params(decoder, 7, layout)
    # The same key on the default device; a sum over a key's bits is exact, so is this.
    alone = jax.jit(lambda key: init_params(decoder, key))(jax.random.key(7))
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(leaf, other)
    state = start_state(params, OPTIMIZER, layout)
    assert_as_announced(state, layout.abstract)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((state.optimizer, state.step)))
    for leaf, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_layout_of_the_lean_optimizer(decoder, laid_out):
    layout, _ = laid_out({"mesh_fsdp": 8}, 1, OptimizerConfig(optim="adamw_8bit"))
    assert set(layout.abstract.optimizer) == {"mu", "nu_row", "nu_col", "nu", "count"}
    mu = layout.abstract.optimizer["mu"]["lm_head"]["kernel"]
    assert mu.dtype == jnp.bfloat16 and mu.sharding.shard_shape(mu.shape) == (32, 8)


def test_a_checkpoint_holds_everything_by_name(decoder, laid_out):
    layout, _ = laid_out({"mesh_fsdp": 8}, 0, OPTIMIZER)
    tree = layout.abstract.as_dict()
    assert set(tree) == {"params", "optimizer", "step"}
    assert jax.tree.structure(tree["params"]) == jax.tree.structure(abstract_params(decoder))
    assert len(jax.tree.leaves(tree)) == len(jax.tree.leaves(layout.abstract))


def test_a_mesh_that_cuts_heads_is_refused(laid_out):
    with pytest.raises(UserError, match=r"^mesh_tensor: need a divisor of the model's 4 query heads, got 8; lower it"):
        laid_out({"mesh_tensor": 8, "mesh_fsdp": 1}, 3, OPTIMIZER)
