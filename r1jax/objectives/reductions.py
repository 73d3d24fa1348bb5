"""Loss reductions, set on the host over a whole optimizer step so that device code only ever sums.

Each function maps the numbers of trained tokens of the step's sequences to the weight of one token of each sequence.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Integer

Weigh = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(tokens trained on of each sequence [S], its micro-batch [S]) -> weight of each such token [S]."""


def weigh_by(loss_type: str, max_completion_length: int) -> Weigh:
    """How GRPO's `loss_type` weighs a token."""

    def weigh(loss_tokens: Float[np.ndarray, " S"], micro_batches: Integer[np.ndarray, " S"]) -> np.ndarray:
        match loss_type:
            case "grpo" | "sapo":
                return sequence_mean(loss_tokens)
            case "bnpo":
                return micro_batch_mean(loss_tokens, micro_batches)
            case "dr_grpo":
                return constant_length(loss_tokens, max_completion_length)
            case "luspo":
                return sequence_sum(loss_tokens)
            case _:
                assert loss_type in ("dapo", "cispo", "vespo"), loss_type
                return token_mean(loss_tokens)

    return weigh


def token_mean(loss_tokens: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """1 / N for every token, N being the trained tokens of the whole step: the mean over tokens, not over sequences.

    The loss of SFT, and of `loss_type: dapo` (Yu et al. 2025, eq. 8), cispo and vespo. TRL before 1.16 divides by the
    tokens of the generation batch, of which a step may be a part.

    Gradient accumulation therefore gives sum / sum, never a mean of means.
    """
    return np.full(loss_tokens.shape, 1.0 / max(loss_tokens.sum(), 1.0))


def token_sum(loss_tokens: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """1 for every token: for evaluation, which divides by the count over all its batches."""
    return np.ones(loss_tokens.shape)


def sequence_mean(loss_tokens: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """`loss_type: grpo`: the mean over sequences of their means over tokens (DeepSeekMath, Shao et al. 2024, eq. 3).

    A sequence with nothing to train on, such as a masked one, still counts as a sequence.
    """
    return 1.0 / (np.maximum(loss_tokens, 1.0) * max(len(loss_tokens), 1))


def sequence_sum(loss_tokens: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """`loss_type: luspo`: the mean over sequences of their sums, so that with a ratio of whole sequences each counts
    by its length (LUSPO, 2026, arXiv:2602.05261): what is long is not punished for it."""
    return np.full(loss_tokens.shape, 1.0 / max(len(loss_tokens), 1))


def micro_batch_mean(
    loss_tokens: Float[np.ndarray, " S"], micro_batches: Integer[np.ndarray, " S"]
) -> Float[np.ndarray, " S"]:
    """`loss_type: bnpo`: the mean over micro-batches of their means over tokens, as TRL has it.

    micro_batches: the number, from 0, of the one that a sequence belongs to. TRL's mean is over one device's part of a
    micro-batch; here it is over all devices' parts, so that the loss does not depend on how many they are.
    """
    totals = np.bincount(micro_batches, weights=loss_tokens)
    return 1.0 / (np.maximum(totals, 1.0)[micro_batches] * max(len(totals), 1))


def constant_length(loss_tokens: Float[np.ndarray, " S"], max_completion_length: int) -> Float[np.ndarray, " S"]:
    """`loss_type: dr_grpo`: sums over tokens over the same number for every sequence (Dr. GRPO, Liu et al. 2025)."""
    return np.full(loss_tokens.shape, 1.0 / (max(len(loss_tokens), 1) * max_completion_length))
