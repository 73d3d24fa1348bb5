"""How Orbax writes and reads `LazyArray`s: one after another, so that a state larger than the memory goes through.

What is written is what Orbax writes for numpy arrays, and is restored as any other checkpoint.
"""

import asyncio
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore  # Orbax's own dependency, which it names in what it returns

from r1jax.checkpoints.lazy import LazyArray, loaded

_PIECE_BYTES = 1 << 20
"""Of a stored chunk, read at a time. Many threads read, and each keeps the memory of its last piece."""

_CUT_BYTES = 1 << 30
"""Orbax stores a leaf whole, but for those above 2 GiB: these it cuts along the longest axis."""

_ROWS_BYTES = 64 << 20
"""Of a leaf that is cut by row, written at a time."""

_PLAIN = {"zarr_format": 2, "compressor": None, "filters": None, "order": "C"}
"""Of a stored leaf whose bytes are its values."""


class LazyHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's for numpy arrays, but that each leaf is loaded, written and forgotten before the next one is loaded."""

    def __init__(self) -> None:
        # Nobody else has the array that is written, and so nobody changes it.
        super().__init__(deepcopy_host_arrays=False)

    # Orbax's types of infos and args are what it says they are; beartype cannot see through its protocols.
    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        """No futures: all is written when it returns. The first process alone loads, as it alone writes."""
        args = args or [ocp.SaveArgs()] * len(values)
        if jax.process_index() == 0:
            for leaf, info, arg in zip(values, infos, args, strict=True):
                await self._write(leaf, info, arg)
        return []

    async def _write(self, leaf: LazyArray, info: Any, arg: Any) -> None:
        array = loaded(leaf)
        if _is_cut_by_row(array.shape, array.nbytes):
            arg = dataclasses.replace(arg, shard_axes=(0,))
        for future in await super().serialize([array], [info], [arg]):
            await asyncio.to_thread(future.result)

    # Orbax's own step of a write, and no public name. Where another release has it not, leaves come out the same, and
    # those that are cut by row take their size again of memory.
    async def _open_and_write(self, value: np.ndarray, tspec: Any, ts_context: Any) -> None:
        if not _is_cut_by_row(value.shape, value.nbytes):
            return await super()._open_and_write(value, tspec, ts_context)
        store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        step = max(_ROWS_BYTES // value[0].nbytes, 1)
        for start in range(0, len(value), step):
            rows = value[start : start + step]
            await store[start : start + len(rows)].write(rows)

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        """Leaves that read from the checkpoint when they are loaded, whatever type they were saved as."""
        del args
        stores = await asyncio.gather(*map(_open, infos))
        return [LazyArray(tuple(store.shape), store.dtype.numpy_dtype, partial(_read, store)) for store in stores]


def _is_cut_by_row(shape: tuple[int, ...], num_bytes: int) -> bool:
    """Whether a leaf is cut along its first axis, where Orbax would cut along another.

    Its chunks would not lie whole in memory, and be copied before they are written, all at once.
    """
    return num_bytes > _CUT_BYTES and shape[0] < max(shape)


async def _open(info: Any) -> Any:
    spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
    return await tensorstore.open(tensorstore.Spec(spec), open=True, context=info.ts_context)


def _read(store: Any) -> np.ndarray:
    """The array. tensorstore by itself holds all chunks of it at once, and the array besides."""
    layout = store.spec().to_json().get("metadata", {})
    as_we_write = all(layout.get(key, "absent") == value for key, value in _PLAIN.items())
    if store.size * store.dtype.numpy_dtype.itemsize <= _PIECE_BYTES or not as_we_write:
        return store.read().result()
    array = np.empty(store.shape, store.dtype.numpy_dtype)
    for index in np.ndindex(*(-(-size // chunk) for size, chunk in zip(array.shape, layout["chunks"], strict=True))):
        region = tuple(slice(at * chunk, (at + 1) * chunk) for at, chunk in zip(index, layout["chunks"], strict=True))
        key = layout["dimension_separator"].join(map(str, index))
        _fill(array[region], partial(_bytes, store.kvstore, key), 0, layout["chunks"])
    return array


def _bytes(kvstore: Any, key: str, start: int, stop: int) -> bytes:
    return kvstore.read(key, byte_range=slice(start, stop)).result().value


def _fill(target: np.ndarray, stored: Callable[[int, int], bytes], at: int, chunk: Sequence[int]) -> None:
    """Copies values into the array's part from a chunk of that shape, stored row by row from byte `at` on.

    At the array's end the chunk goes on and the part does not.
    """
    row_bytes = math.prod(chunk[1:]) * target.dtype.itemsize
    if row_bytes > _PIECE_BYTES and target.ndim > 1:
        for number, row in enumerate(target):
            _fill(row, stored, at + number * row_bytes, chunk[1:])
        return
    inside = tuple(slice(size) for size in target.shape[1:])
    step = max(_PIECE_BYTES // row_bytes, 1)
    for start in range(0, len(target), step):
        stop = min(start + step, len(target))
        rows = np.frombuffer(stored(at + start * row_bytes, at + stop * row_bytes), target.dtype)
        target[start:stop] = rows.reshape(-1, *chunk[1:])[:, *inside]
