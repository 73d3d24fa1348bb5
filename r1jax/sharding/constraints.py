"""Where the running model is pinned to the mesh: the `constrain(kind, tree)` that the decoder is given."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.sharding.mesh import BATCH_AXES
from r1jax.sharding.rules import Specs

Tree = Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: jax.Array, whole: NamedSharding, gradient: NamedSharding) -> jax.Array:
    """x laid out as `whole`; its gradient is laid out as `gradient`, which makes the compiler reduce-scatter it.

    Without this the gradient would take the layout of x here, be summed onto every device and only then cut.
    """
    del gradient
    return jax.lax.with_sharding_constraint(x, whole)


def _gathered_forward(x: jax.Array, whole: NamedSharding, gradient: NamedSharding) -> tuple[jax.Array, None]:
    return gathered(x, whole, gradient), None


def _gathered_backward(
    whole: NamedSharding, gradient: NamedSharding, residuals: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    del whole, residuals
    return (jax.lax.with_sharding_constraint(cotangent, gradient),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def _without_layers(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*spec[1:])


def make_constrain(mesh: Mesh, specs: Specs) -> Callable[[str, Tree], Tree]:
    """constrain(kind, tree) for `models.transformer`: rows of activations over the batch axes, and parameters gathered
    from their ZeRO shards just where they are used, a layer at a time."""
    activations = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context", None))
    lookup = NamedSharding(mesh, specs.compute["embed"]["embedding"])

    def gather(tree: Tree, compute: Tree, gradients: Tree, cut: Callable[[PartitionSpec], PartitionSpec]) -> Tree:
        def one(leaf: jax.Array, whole: PartitionSpec, gradient: PartitionSpec) -> jax.Array:
            return gathered(leaf, NamedSharding(mesh, cut(whole)), NamedSharding(mesh, cut(gradient)))

        return jax.tree.map(one, tree, compute, gradients)

    def constrain(kind: str, tree: Tree) -> Tree:
        if kind == "activations":
            return jax.lax.with_sharding_constraint(tree, activations)
        if kind == "layer":
            return gather(tree, specs.compute["layers"], specs.gradients["layers"], _without_layers)
        if kind == "lookup":
            # Its gradient is a scatter-add. Pinned whole, each device adds up its own tokens, and the sum over devices
            # is reduce-scattered as it reaches "ends". Else each device would gather all tokens of all devices.
            return gathered(tree, lookup, lookup)
        assert kind == "ends", kind
        ends = {name: specs.compute[name] for name in tree}
        return gather(tree, ends, {name: specs.gradients[name] for name in tree}, lambda spec: spec)

    return constrain
