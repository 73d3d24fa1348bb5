import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config.optimizer import OptimizerConfig
from r1jax.config.reference import ReferenceConfig
from r1jax.training.reference import Reference
from r1jax.training.state import StateLayout, fresh_params

MOVING = ReferenceConfig(beta=0.1, sync_ref_model=True, ref_model_mixup_alpha=0.25, ref_model_sync_steps=3)


@pytest.fixture(scope="module")
def layout(laid_out) -> StateLayout:
    """Two devices, everything sharded."""
    return laid_out({"mesh_fsdp": 2}, 3, OptimizerConfig())[0]


@pytest.fixture(scope="module")
def start(decoder, layout):
    return fresh_params(decoder, 0, layout)


@pytest.fixture(scope="module")
def policy(decoder, layout):
    return fresh_params(decoder, 1, layout)


def values(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_without_sync_it_is_the_starting_model_in_the_compute_dtype(layout, start, policy):
    reference = Reference(start, ReferenceConfig(beta=0.1), layout, "bfloat16")
    for done in range(1, 2000, 100):
        reference.follow(done, policy)
    for leaf, first in zip(jax.tree.leaves(reference.params), jax.tree.leaves(start), strict=True):
        assert leaf.dtype == jnp.bfloat16 and leaf.sharding.is_equivalent_to(first.sharding, leaf.ndim)
        np.testing.assert_array_equal(leaf, first.astype(jnp.bfloat16))
    assert reference.trees() == {} and reference.abstract() == {}


def test_it_survives_that_the_policy_is_donated(decoder, layout):
    """The first update destroys the arrays that the reference was made from."""
    params = fresh_params(decoder, 0, layout)
    before = values(params)
    reference = Reference(params, ReferenceConfig(beta=0.1), layout, "float32")
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    assert all(np.array_equal(a, b) for a, b in zip(values(reference.params), before, strict=True))


def test_it_follows_every_few_updates(layout, start, policy):
    """After updates 3 and 6: a quarter of the policy each time; not before the first update."""
    reference = Reference(start, MOVING, layout, "bfloat16")
    for done in range(7):
        reference.follow(done, policy)
    for leaf, first, new in zip(jax.tree.leaves(reference.params), values(start), values(policy), strict=True):
        assert leaf.dtype == jnp.float32  # small moves must not be lost to rounding
        np.testing.assert_allclose(leaf, (1 - 0.75**2) * new + 0.75**2 * first, atol=1e-6)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(policy))


def test_a_checkpoint_takes_it_along(layout, start, policy):
    reference, other = (Reference(tree, MOVING, layout, "float32") for tree in (start, policy))
    reference.follow(3, policy)
    shapes = jax.tree.leaves(reference.abstract())
    assert [(leaf.shape, leaf.dtype) for leaf in shapes] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(reference.params)
    ]
    assert all(leaf.sharding.mesh == layout.mesh for leaf in shapes)
    other.take(reference.trees())
    assert all(np.array_equal(a, b) for a, b in zip(values(other.params), values(reference.params), strict=True))
    other.take({})
    assert all(np.array_equal(a, b) for a, b in zip(values(other.params), values(reference.params), strict=True))
