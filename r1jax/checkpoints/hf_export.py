"""A model leaves as a Hugging Face directory: config, weights, tokenizer, generation config, model card.

Weights go out tensor by tensor: each is gathered from its shards, cast on the devices, and written; the model is whole
on no device and no host. All files are complete on disk before the first one is replaced.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from r1jax.checkpoints.generation import generation_config as with_stop_ids
from r1jax.checkpoints.hf import config_dtype, with_dtype
from r1jax.checkpoints.model_card import Card, card_text
from r1jax.checkpoints.staging import staged, write_json, write_tensors, write_text
from r1jax.checkpoints.tensor_files import INDEX_FILE, SINGLE_FILE
from r1jax.config.errors import need, shown
from r1jax.models.config import DecoderConfig
from r1jax.models.hf_tensors import HfTensor, hf_tensors

EXPORT_DTYPES = ("float32", "bfloat16", "float16")


def export(
    directory: Path,
    params: PyTree,
    *,
    config: DecoderConfig,
    hf_config: dict[str, Any],
    tokenizer: Any | None = None,
    generation_config: dict[str, Any] | None = None,
    dtype: str | None = None,
    card: Card | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> str:
    """The dtype written; the directory then holds a model that transformers loads, beside whatever else it held.

    `hf_config` keeps all its keys but the dtype; `generation_config` is the source's, completed here with the stop ids
    ({}: the source had none; None without a tokenizer: no such file). `dtype` None or "auto" is the one in hf_config.
    `params` may be LazyArrays: each is loaded once, in process 0, and its tensors are cut from it and cast on the host.
    Every process of a run must call it; process 0 writes, the others return when it is done. An earlier export stays
    loadable until the new one is complete; config.json goes last, so a folder whose files are being moved is no model.
    """
    dtype = export_dtype(dtype, hf_config)
    shards = _plan(params, config, np.dtype(dtype), max_shard_bytes)
    with staged(directory, "config.json") as (staging, writes):
        if writes:
            write_json(staging / "config.json", with_dtype(hf_config, dtype))
            write_text(staging / "README.md", card_text(card or {}))
            if generation_config is not None or tokenizer is not None:
                settings = with_stop_ids(generation_config or {}, hf_config, tokenizer)
                write_json(staging / "generation_config.json", settings)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
        _write_weights(staging, shards, dtype, writes)
    return dtype


def export_dtype(dtype: str | None, hf_config: dict[str, Any]) -> str:
    """The dtype that an export asked for as `dtype` (None and "auto": the source's) has."""
    chosen = dtype if dtype not in (None, "auto") else config_dtype(hf_config) or "float32"
    if chosen not in EXPORT_DTYPES:
        raise need("torch_dtype", f"one of auto, {', '.join(EXPORT_DTYPES)}", shown(chosen), "choose one of these")
    return chosen


def _plan(params: PyTree, config: DecoderConfig, dtype: np.dtype, max_shard_bytes: int) -> list[list[HfTensor]]:
    """The tensors of each file, in the model's order, a file holding at most so many bytes (or one tensor)."""
    shards: list[list[HfTensor]] = [[]]
    room = max_shard_bytes
    for tensor in hf_tensors(params, config):
        num_bytes = _num_bytes(tensor, dtype)
        if num_bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= num_bytes
    return shards


def _num_bytes(tensor: HfTensor, dtype: np.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize


def _write_weights(staging: Path, shards: list[list[HfTensor]], dtype: str, writes: bool) -> None:
    """Gathers in every process; writes in one."""
    stem, count = Path(SINGLE_FILE).stem, len(shards)
    names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    files = dict(zip(names if count > 1 else [SINGLE_FILE], shards, strict=True))
    write_tensors({staging / file: shard for file, shard in files.items()}, dtype, writes=writes)
    if writes and count > 1:
        weight_map = {tensor.name: file for file, shard in files.items() for tensor in shard}
        total = sum(_num_bytes(tensor, np.dtype(dtype)) for shard in shards for tensor in shard)
        write_json(staging / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
