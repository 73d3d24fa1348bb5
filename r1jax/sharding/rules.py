"""ZeRO and tensor parallelism as tables of PartitionSpecs, chosen per (path, shape); model code knows of neither.

| stage | parameters     | gradients            | optimizer moments    |
|-------|----------------|----------------------|----------------------|
| 0     | whole          | whole                | whole                |
| 1     | whole          | whole                | fsdp, context, data  |
| 2     | whole          | fsdp, context, data  | fsdp, context, data  |
| 3     | fsdp, context  | fsdp, context, data  | fsdp, context, data  |

(Rajbhandari et al. 2020.) fsdp is the major axis, so that at stage 3 a device's moments belong to its own parameters.
Tensor parallelism (Shoeybi et al. 2019) comes first at every stage: heads, MLP width and vocabulary over `tensor`.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.config.errors import need

Tree = Any
PARAMETER_AXES = ("fsdp", "context")
STATE_AXES = ("fsdp", "context", "data")

# The dimension, from the right, that `tensor` splits.
TENSOR_DIMS = {
    "q/kernel": -1, "q/bias": -1, "k/kernel": -1, "k/bias": -1, "v/kernel": -1, "v/bias": -1, "o/kernel": -2,
    "gate/kernel": -1, "gate/bias": -1, "up/kernel": -1, "up/bias": -1, "down/kernel": -2,
    "embed/embedding": -2, "lm_head/kernel": -1,
    # An adapter's factors follow the side of the kernel that is split; the rank never is.
    "q/lora_b": -1, "k/lora_b": -1, "v/lora_b": -1, "gate/lora_b": -1, "up/lora_b": -1,
    "o/lora_a": -2, "down/lora_a": -2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Specs:
    """One tree of PartitionSpecs a purpose, each in the shape of the parameter tree."""

    params: Tree
    """Master parameters between steps."""
    gradients: Tree
    """Gradients as they are summed over micro-batches."""
    moments: Tree
    """Optimizer moments that have a parameter's shape."""
    compute: Tree
    """Parameters while a layer runs: only tensor parallelism is left."""


def _spec(axes: list[tuple[str, ...]]) -> PartitionSpec:
    """Axes per dimension as a PartitionSpec in its shortest form."""
    entries: list[Any] = [None if not names else names[0] if len(names) == 1 else names for names in axes]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(key.key for key in path[-2:])


def _tensor_axes(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh, kv_heads: int) -> list[tuple[str, ...]]:
    size = mesh.shape["tensor"]
    axes: list[tuple[str, ...]] = [()] * len(shape)
    name = _name(path)
    dim = TENSOR_DIMS.get(name)
    if size == 1 or dim is None or shape[dim] % size:
        return axes
    if name[0] in "kv" and kv_heads % size:
        return axes  # a kv head is never cut: each device keeps them all
    axes[dim] = ("tensor",)
    return axes


def _with_state_axes(
    axes: list[tuple[str, ...]], stacked: bool, shape: tuple[int, ...], mesh: Mesh, added: tuple[str, ...]
) -> list[tuple[str, ...]]:
    """`added` on one dimension: a free one rather than one that `tensor` splits, and then the largest.

    The layer dimension is left alone, because the scan over layers slices it. Always chosen for all of STATE_AXES, so
    that parameters and moments are cut along the same dimension. A leaf that nothing divides stays whole.
    """
    used = tuple(name for name in added if mesh.shape[name] > 1)
    full = math.prod(mesh.shape[name] for name in STATE_AXES)

    def left(dim: int) -> int:
        return shape[dim] // math.prod(mesh.shape[name] for name in axes[dim])

    fitting = [dim for dim in range(1 if stacked else 0, len(shape)) if left(dim) % full == 0]
    if not used or not fitting:
        return axes
    best = max(fitting, key=lambda dim: (not axes[dim], shape[dim]))
    return [(*names, *used) if dim == best else names for dim, names in enumerate(axes)]


def make_specs(abstract_params: Tree, mesh: Mesh, zero_stage: int, *, num_heads: int, num_kv_heads: int) -> Specs:
    """The tables for a parameter tree on a mesh; raises `UserError` when `mesh_tensor` would cut a query head, or the
    vocabulary into unequal parts, which the loss cannot work on."""
    size = mesh.shape["tensor"]
    vocab_size = abstract_params["embed"]["embedding"].shape[0]
    for count, what in ((num_heads, "query heads"), (vocab_size, "token ids")):
        if count % size:
            raise need("mesh_tensor", f"a divisor of the model's {count} {what}", str(size), "lower it")

    def table(added: tuple[str, ...]) -> Tree:
        def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
            axes = _tensor_axes(path, leaf.shape, mesh, num_kv_heads)
            return _spec(_with_state_axes(axes, path[0].key == "layers", leaf.shape, mesh, added))

        return jax.tree_util.tree_map_with_path(spec, abstract_params)

    return Specs(
        params=table(PARAMETER_AXES if zero_stage == 3 else ()),
        gradients=table(STATE_AXES if zero_stage >= 2 else ()),
        moments=table(STATE_AXES if zero_stage >= 1 else ()),
        compute=table(()),
    )


def shardings(mesh: Mesh, specs: Tree) -> Tree:
    """PartitionSpecs as NamedShardings of the mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def optimizer_specs(abstract_optimizer: dict[str, Any], abstract_params: Tree, moments: Tree) -> dict[str, Any]:
    """Specs of an optimizer state: moments of a parameter's shape follow `moments`; counts and factors are whole."""

    def specs_of(value: Any) -> Any:
        if jax.tree.structure(value) != jax.tree.structure(abstract_params):
            return jax.tree.map(lambda _: PartitionSpec(), value)
        same_shape = jax.tree.map(lambda leaf, param: leaf.shape == param.shape, value, abstract_params)
        return jax.tree.map(lambda same, spec: spec if same else PartitionSpec(), same_shape, moments)

    return {name: specs_of(value) for name, value in abstract_optimizer.items()}
