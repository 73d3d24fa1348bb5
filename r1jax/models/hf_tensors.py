"""A parameter tree as Hugging Face's tensors: their names, shapes and layout, and each one gathered from its shards, or
cut from an array of this host."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from r1jax.models.config import DecoderConfig
from r1jax.models.families import TensorName, tensor_names
from r1jax.models.lora import SCALE, Adapted, adapted


class HfTensor(NamedTuple):
    """One tensor as Hugging Face has it, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    leaf: Any
    """Our leaf, an array or what else has its shape; a kernel with an adapter beside it is one leaf."""
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
        yield from tensors_of(name, _whole_leaf(params, name.path))


def _whole_leaf(params: PyTree, path: tuple[str, ...]) -> Any:
    """The leaf there, with the adapter that is beside it."""
    node = leaf_at(params, path[:-1])
    return adapted(node) if path[-1] == "kernel" and SCALE in node else node[path[-1]]


SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""numpy's names of the dtypes that weights are written in, and safetensors'."""


def file_header(tensors: Iterable[HfTensor], dtype: str, metadata: dict[str, str]) -> bytes:
    """A safetensors file but for the tensors' bytes, which follow it in their order.

    It has 8 bytes of length, then names, dtypes, shapes and places as JSON.
    """
    # transformers reads a file only when it says which framework's layout it has.
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for tensor in tensors:
        stop = start + math.prod(tensor.shape) * np.dtype(dtype).itemsize
        facts = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        table[tensor.name] = facts
        start = stop
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def gather(tensor: HfTensor, dtype: str) -> jax.Array:
    """The tensor, whole on each device: one tensor at a time, an adapter merged in, already in the dtype. Every process
    must call it."""
    sharding = tensor.leaf.sharding
    as_it_is = tensor.layer is None and not tensor.transpose and tensor.leaf.dtype == dtype
    if as_it_is and sharding.is_fully_replicated:
        return tensor.leaf
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    pick = _picker(sharding, tensor.layer is not None, tensor.transpose, dtype)
    return pick(tensor.leaf, np.int32(tensor.layer or 0))


def cut(tensor: HfTensor, array: np.ndarray) -> np.ndarray:
    """The tensor as a view of its leaf's array, in that array's dtype."""
    own = array if tensor.layer is None else array[tensor.layer]
    return own.T if tensor.transpose else own


@functools.cache
def _picker(
    sharding: jax.sharding.Sharding, stacked: bool, transpose: bool, dtype: str
) -> Callable[[Any, np.int32], jax.Array]:
    def pick(leaf: Any, layer: jax.Array) -> jax.Array:
        own = leaf
        if stacked:
            own = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), leaf)
        own = own.merged() if isinstance(own, Adapted) else own
        return (own.T if transpose else own).astype(dtype)

    return jax.jit(pick, out_shardings=sharding)
