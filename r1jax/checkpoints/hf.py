"""A Hugging Face directory comes in: config.json as a dict, weights as sharded arrays.

Weights are streamed: for one leaf at a time, each distinct slice that this process's devices hold is read once, put on
those devices and forgotten. Host memory peaks at the largest such slice, never at the model.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from r1jax import progress
from r1jax.checkpoints.lazy import LazyArray
from r1jax.checkpoints.tensor_files import TensorFiles, Tensors, read_json, stored_dtype
from r1jax.checkpoints.vocabulary import read_grown
from r1jax.config.errors import need
from r1jax.models.config import DecoderConfig
from r1jax.models.families import TensorName, tensor_names
from r1jax.models.hf_tensors import hf_tensors, leaf_at
from r1jax.models.parameters import abstract_params

# Llama's first releases stored the rotary frequencies, which follow from config.json.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
# Rows of a tied lm_head compared with the embedding at a time.
_ROWS_COMPARED = 4096
_ONE_MODEL = "config.json and weights must be of one model"


def read_config(directory: Path) -> dict[str, Any]:
    """config.json with every key, its dtype being that of the weights.

    Some files name no dtype, or one the weights do not have; an export in "the source's dtype" follows this entry, and
    only the stored dtype gives the same bits back. Weights in several dtypes, or none, leave it as it is.
    """
    config = read_json(directory / "config.json")
    stored = stored_dtype(directory)
    return config if stored is None else with_dtype(config, stored)


def with_dtype(hf_config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with this dtype, under the spelling it uses (`dtype` since transformers 5, `torch_dtype` before)."""
    key = "dtype" if "dtype" in hf_config and "torch_dtype" not in hf_config else "torch_dtype"
    return {**hf_config, key: dtype}


def config_dtype(hf_config: dict[str, Any]) -> str | None:
    """The dtype that a config names under either spelling."""
    return hf_config.get("torch_dtype") or hf_config.get("dtype")


def check_weights(directory: Path, config: DecoderConfig) -> None:
    """Nothing; raises `UserError` as `load_params` would, from the files' headers."""
    with TensorFiles(directory) as files:
        check_tensors(files, config)


def check_tensors(files: Tensors, config: DecoderConfig) -> None:
    """Nothing; raises `UserError` as `load_from` would."""
    _refuse_other_tensors(files, config, abstract_params(config))


def load_params(
    directory: Path,
    config: DecoderConfig,
    shardings: PyTree,
    dtype: DTypeLike = jnp.float32,
    *,
    stored_vocab_size: int | None = None,
) -> PyTree[Float[Array, "..."]]:
    """The directory's weights as our parameter tree, each leaf under its sharding, cast to `dtype`.

    `shardings` is a tree like the parameters'. `stored_vocab_size` is the weights' own vocabulary where it is smaller
    than the config's: missing rows are made (`checkpoints/vocabulary.py`). Raises `UserError` naming the tensor when
    one is missing, misshapen or not part of the model; a tied model's lm_head is accepted when it is a copy.
    """
    with TensorFiles(directory) as files:
        return load_from(files, config, shardings, dtype, stored_vocab_size=stored_vocab_size)


def load_from(
    files: Tensors,
    config: DecoderConfig,
    shardings: PyTree,
    dtype: DTypeLike = jnp.float32,
    *,
    stored_vocab_size: int | None = None,
) -> PyTree[Float[Array, "..."]]:
    """`load_params` from files that are open already."""
    abstract = abstract_params(config)
    stored = config if stored_vocab_size is None else dataclasses.replace(config, vocab_size=stored_vocab_size)
    _refuse_other_tensors(files, stored, abstract_params(stored))
    largest = max(
        math.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    )
    # One buffer for every slice, so that host memory does not depend on when jax lets go of what it has copied.
    buffer = np.empty(largest, dtype)
    params: dict[str, Any] = {}
    for name in tensor_names(config):
        progress.report("loading weights")
        shape = leaf_at(abstract, name.path).shape
        parent = functools.reduce(lambda node, key: node.setdefault(key, {}), name.path[:-1], params)
        parent[name.path[-1]] = _load_leaf(files, name, shape, leaf_at(shardings, name.path), buffer)
    return params


def lazy_from(files: Tensors, config: DecoderConfig) -> PyTree[LazyArray]:
    """The tensors of open files as our parameter tree, float32, each leaf read when it is wanted; raises as `load_from`
    does."""
    check_tensors(files, config)
    abstract, params = abstract_params(config), dict[str, Any]()
    for name in tensor_names(config):
        shape = leaf_at(abstract, name.path).shape
        parent = functools.reduce(lambda node, key: node.setdefault(key, {}), name.path[:-1], params)
        parent[name.path[-1]] = LazyArray(
            shape, np.dtype(np.float32), functools.partial(_read_leaf, files, name, shape)
        )
    return params


def _read_leaf(files: Tensors, name: TensorName, shape: tuple[int, ...]) -> np.ndarray:
    return _read_slice(files, name, tuple((0, size) for size in shape), np.empty(math.prod(shape), np.float32))


def _load_leaf(
    files: Tensors, name: TensorName, shape: tuple[int, ...], sharding: jax.sharding.Sharding, buffer: np.ndarray
) -> jax.Array:
    """The leaf under its sharding; `buffer` is the host memory that its slices pass through."""
    devices_of: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    pieces: list[jax.Array] = []
    for bounds, devices in devices_of.items():
        piece = _read_slice(files, name, bounds, buffer)
        pieces += [_put(piece, device) for device in devices]
        # The next slice overwrites this one.
        jax.block_until_ready(pieces)
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _put(piece: np.ndarray, device: Any) -> jax.Array:
    """A copy of the slice on the device."""
    array = jax.device_put(piece, device)
    # A CPU device takes host memory that happens to be aligned for its own, even with may_alias=False [measured, jax
    # 0.10.2]: the next slice would overwrite the array, and it could not be donated.
    return jnp.copy(array) if device.platform == "cpu" else array


def _read_slice(
    files: Tensors, name: TensorName, bounds: tuple[tuple[int, int], ...], buffer: np.ndarray
) -> np.ndarray:
    """Our leaf's slice between these bounds, gathered over layers and transposed into our order; a view of `buffer`."""
    shape = [stop - start for start, stop in bounds]
    result = buffer[: math.prod(shape)].reshape(shape)
    if name.path[0] in ("embed", "lm_head"):
        rows, columns = bounds[::-1] if name.transpose else bounds
        read_grown(files, name.hf, rows, columns, result.T if name.transpose else result)
        return result
    own = [slice(*bound) for bound in (bounds[1:] if name.stacked else bounds)]
    index = tuple(own[::-1] if name.transpose else own)
    first, last = bounds[0] if name.stacked else (0, 1)
    for layer in range(first, last):
        tensor = files.read(name.hf.format(layer=layer), index)
        target = result[layer - first] if name.stacked else result
        target[...] = tensor.T if name.transpose else tensor
    return result


def _refuse_other_tensors(files: Tensors, config: DecoderConfig, abstract: PyTree) -> None:
    expected = {tensor.name: tensor.shape for tensor in hf_tensors(abstract, config)}
    found = files.names()
    if config.tied_embeddings and "lm_head.weight" in found:
        _refuse_untied(files)
        found.remove("lm_head.weight")
    missing = [tensor for tensor in expected if tensor not in found]
    extra = sorted(tensor for tensor in found if tensor not in expected and not tensor.endswith(_IGNORED_SUFFIX))
    for tensors, what in ((missing, "without"), (extra, "with the unknown")):
        if tensors:
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            got = f"{files.directory} {what} {tensors[0]}{more}"
            raise need("model_name_or_path", "the tensors that config.json implies", got, _ONE_MODEL)
    for tensor, shape in expected.items():
        files.dtype(tensor)
        if files.shape(tensor) != shape:
            rule = f"{tensor} of shape {list(shape)}, as config.json implies"
            got = f"{list(files.shape(tensor))} in {files.directory}"
            raise need("model_name_or_path", rule, got, _ONE_MODEL)


def _refuse_untied(files: Tensors) -> None:
    """Raises unless the stored lm_head is the embedding, bit by bit."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if embedding not in files.names():
        return
    equal = files.shape(head) == files.shape(embedding) and files.dtype(head) == files.dtype(embedding)
    for start in range(0, files.shape(head)[0], _ROWS_COMPARED) if equal else ():
        rows = (slice(start, min(start + _ROWS_COMPARED, files.shape(head)[0])), slice(0, files.shape(head)[1]))
        equal = equal and files.read(head, rows).tobytes() == files.read(embedding, rows).tobytes()
    if not equal:
        rule = "lm_head.weight equal to the embedding where tie_word_embeddings is true"
        advice = "set tie_word_embeddings: false in config.json"
        raise need("model_name_or_path", rule, f"another in {files.directory}", advice)
