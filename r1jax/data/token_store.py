"""Tokenised rows on disk, named by a hash of everything they depend on; written once, then mapped into memory."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from r1jax.data import array_folder, encoding, formats, messages, pretokenised, rendering, templates, turns
from r1jax.data.encoding import EncodedRows, RowEncoder
from r1jax.data.stream_mixture import SplitRows

SCHEMA = 2
DTYPES = {"tokens": np.int32, "loss_mask": np.bool_, "lengths": np.int32, "loss_tokens": np.int32, "fates": np.uint8}
"""The arrays of a folder: those of EncodedRows over all chunks, and how many tokens of each row are trained on."""
_MADE_BY = (encoding, formats, messages, pretokenised, rendering, templates, turns)
"""The code that decides which tokens a row has: a change of it makes other rows."""


def cache_folder(rows: SplitRows, encoder: RowEncoder) -> Path:
    """Where these rows lie when this encoder has tokenised them; raises UserError if nothing can be written there."""
    return array_folder.cache_folder("tokenised") / cache_key(rows, encoder)


def cache_key(rows: SplitRows, encoder: RowEncoder) -> str:
    """32 hex digits of the rows, the tokenizer, the encoder's settings, the code that encodes and its libraries."""
    tokenizer = encoder.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast), "masks are made from offsets, which only these give"
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls of the tokenizer change these two; the encoder sets them itself.
    parts: list[Any] = [SCHEMA, {name: part for name, part in backend.items() if name not in ("truncation", "padding")}]
    parts += [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map]
    parts += [repr(getattr(encoder, f.name)) for f in dataclasses.fields(encoder) if f.name != "tokenizer"]
    parts += [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    parts += [Path(str(module.__file__)).read_text() for module in _MADE_BY]
    if isinstance(rows, datasets.Dataset):
        parts += [len(rows), rows._fingerprint]  # of their source files and of what was done to them since
    else:
        parts += [rows.fingerprint]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def read(folder: Path) -> dict[str, np.ndarray] | None:
    """The folder's arrays by the names of DTYPES, read-only; None when there are none, or damaged ones."""
    return array_folder.read(folder, DTYPES)


def find_or_write(folder: Path, make: Callable[[], Iterable[EncodedRows]]) -> dict[str, np.ndarray]:
    """The folder's arrays by the names of DTYPES, read-only; what `make` gives is written where there are none."""
    return array_folder.find_or_write(folder, DTYPES, lambda: map(_arrays, make()))


def _arrays(chunk: EncodedRows) -> dict[str, np.ndarray]:
    starts = np.cumsum(chunk.lengths) - chunk.lengths
    trained = np.add.reduceat(chunk.loss_mask, starts, dtype=np.int32) if len(starts) else starts
    return {field.name: getattr(chunk, field.name) for field in dataclasses.fields(chunk)} | {"loss_tokens": trained}
