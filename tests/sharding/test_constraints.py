from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r1jax.config.mesh import MeshConfig
from r1jax.sharding.constraints import gathered, make_constrain
from r1jax.sharding.mesh import make_mesh
from r1jax.sharding.rules import Specs


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(mesh_fsdp=4, mesh_tensor=2))


def test_gathered_is_the_identity_with_two_layouts(mesh):
    """The value lies as `whole`, its gradient as `gradient`; the numbers are those without it."""
    cut, whole = NamedSharding(mesh, P("fsdp", "tensor")), NamedSharding(mesh, P(None, "tensor"))
    x = jnp.arange(64.0).reshape(8, 8)

    def loss(x):
        y: Any = gathered(x, whole, cut)
        return jnp.sum(y**3), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(jax.device_put(x, cut))
    assert y.sharding.is_equivalent_to(whole, 2) and gradient.sharding.is_equivalent_to(cut, 2)
    assert y.tolist() == x.tolist() and gradient.tolist() == (3 * x**2).tolist()


def test_each_kind_is_laid_out_by_its_table(mesh):
    """A layer is cut as the stacked leaf without its first dimension, ends by name, activations by rows."""
    tree = {"embed": {"embedding": P("tensor")}, "layers": {"up": {"kernel": P(None, None, "tensor")}}}
    cut = {"embed": {"embedding": P("tensor", "fsdp")}, "layers": {"up": {"kernel": P(None, "fsdp", "tensor")}}}
    constrain = make_constrain(mesh, Specs(params=cut, gradients=cut, moments=cut, compute=tree))
    arguments = {
        "layer": {"up": {"kernel": jnp.ones((8, 8))}},
        "ends": {"embed": {"embedding": jnp.ones((8, 8))}},
        "lookup": jnp.ones((8, 8)),
        "activations": jnp.ones((4, 3, 2)),
    }

    def loss(arguments):
        laid_out = {kind: constrain(kind, leaves) for kind, leaves in arguments.items()}
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(laid_out)), laid_out

    gradients, laid_out = jax.jit(jax.grad(loss, has_aux=True))(arguments)
    same = {"lookup": P("tensor"), "activations": P(("fsdp", "data"))}
    expected = {"layer": P(None, "tensor"), "ends": P("tensor"), **same}
    of_gradients = {"layer": P("fsdp", "tensor"), "ends": P("tensor", "fsdp"), **same}
    for results, specs in ((laid_out, expected), (gradients, of_gradients)):
        for kind, spec in specs.items():
            (leaf,) = jax.tree.leaves(results[kind])
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), (kind, leaf.sharding)
