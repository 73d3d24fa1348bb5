"""A parameter tree as Hugging Face's tensors: their names, shapes and layout, and each one gathered from its shards."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from r1jax.models.config import DecoderConfig
from r1jax.models.families import TensorName, tensor_names


class HfTensor(NamedTuple):
    """One tensor as Hugging Face has it, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    leaf: Any
    """Our leaf, an array or what `jax.eval_shape` gives for one."""
    layer: int | None
    """Its place in a stacked leaf; None when the leaf is the tensor."""
    transpose: bool


def leaf_at(tree: PyTree, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict under these keys."""
    for key in path:
        tree = tree[key]
    return tree


def tensors_of(name: TensorName, leaf: Any) -> Iterator[HfTensor]:
    """The HF tensors that a leaf holds."""
    own = leaf.shape[1:] if name.stacked else leaf.shape
    shape = own[::-1] if name.transpose else own
    for layer in range(leaf.shape[0]) if name.stacked else (None,):
        hf = name.hf if layer is None else name.hf.format(layer=layer)
        yield HfTensor(hf, tuple(shape), leaf, layer, name.transpose)


def hf_tensors(params: PyTree, config: DecoderConfig) -> Iterator[HfTensor]:
    """Every tensor of the model, in the model's order; a tied model has no lm_head."""
    for name in tensor_names(config):
        yield from tensors_of(name, leaf_at(params, name.path))


def gather(tensor: HfTensor, dtype: str) -> jax.Array:
    """The tensor, whole on each device: one tensor at a time, already in the dtype. Every process must call it."""
    sharding = tensor.leaf.sharding
    as_it_is = tensor.layer is None and not tensor.transpose and tensor.leaf.dtype == dtype
    if as_it_is and sharding.is_fully_replicated:
        return tensor.leaf
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    pick = _picker(sharding, tensor.layer is not None, tensor.transpose, dtype)
    return pick(tensor.leaf, np.int32(tensor.layer or 0))


@functools.cache
def _picker(
    sharding: jax.sharding.Sharding, stacked: bool, transpose: bool, dtype: str
) -> Callable[[jax.Array, np.int32], jax.Array]:
    def pick(leaf: jax.Array, layer: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False) if stacked else leaf
        return (own.T if transpose else own).astype(dtype)

    return jax.jit(pick, out_shardings=sharding)
