"""Loss reductions, set on the host over a whole optimizer step so that device code only ever sums.

Each function maps the numbers of trained tokens of the step's sequences to the weight of one token of each sequence.
"""

import numpy as np
from jaxtyping import Float


def nll_mean(loss_tokens: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """1 / N for every token, N being the trained tokens of the whole step: the mean over tokens, not over sequences.

    Gradient accumulation therefore gives sum / sum, never a mean of means.
    """
    return np.full(loss_tokens.shape, 1.0 / max(loss_tokens.sum(), 1.0))


def token_sum(loss_tokens: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """1 for every token: for evaluation, which divides by the count over all its batches."""
    return np.ones(loss_tokens.shape)
