"""Embedding and output tables for more tokens than the weights on disk were made for.

Each new row is the mean of the stored ones. A new token's logit is then the mean logit, which is at most the log of the
mean exponential: it takes no more than 1/V of the probability, and what the model says is hardly changed. Fresh
random rows promise nothing of that kind, and zero rows give logit 0 where all others may be far below.
(Hewitt 2021, "Initializing new word embeddings for pretrained language models".)
"""

import numpy as np

from r1jax.checkpoints.tensor_files import Tensors

_ROWS_AT_A_TIME = 4096


def read_grown(files: Tensors, tensor: str, rows: tuple[int, int], columns: tuple[int, int], out: np.ndarray) -> None:
    """Fills `out` [rows, columns] with that part of the grown table; the file's own rows come first."""
    num_stored = files.shape(tensor)[0]
    first, last = rows
    kept = max(0, min(last, num_stored) - first)
    for start in range(0, kept, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, kept)
        out[start:stop] = files.read(tensor, (slice(first + start, first + stop), slice(*columns)))
    if kept < last - first:
        out[kept:] = mean_row(files, tensor, columns)


def mean_row(files: Tensors, tensor: str, columns: tuple[int, int]) -> np.ndarray:
    """float64 [columns]: the mean over the stored rows, a part of them in memory at a time."""
    num_stored = files.shape(tensor)[0]
    total = np.zeros(columns[1] - columns[0])
    for start in range(0, num_stored, _ROWS_AT_A_TIME):
        part = files.read(tensor, (slice(start, min(start + _ROWS_AT_A_TIME, num_stored)), slice(*columns)))
        total += part.astype(np.float64).sum(axis=0)
    return total / num_stored
