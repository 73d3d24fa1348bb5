"""Orders that follow from seed and generation alone, so that a run that goes on anywhere draws the same."""

import numpy as np

# Added to a run's seed, which is below 2**32: each use has numbers of its own, apart from those of plan.py.
FRESH, CURRICULUM, REPLAY = (2**63 + kind * 2**32 for kind in (1, 2, 3))

_MANTISSA = 2.0**-53


def even_order(count: int, seed: int, generation: int, use: int) -> np.ndarray:
    """int64: a permutation of range(count)."""
    return np.argsort(_draws(count, seed, generation, use), kind="stable")


def weighted_order(weights: np.ndarray, seed: int, generation: int, use: int) -> np.ndarray:
    """int64: range(len(weights)) as drawing one after the other without replacement would have it, each time with
    probability in proportion to the weights (above 0) of those that are left.

    By the rank of log(weight) plus Gumbel noise (Kool, van Hoof and Welling, "Stochastic beams and where to find
    them", 2019), so that the first k are a sample of k.
    """
    uniform = ((_draws(len(weights), seed, generation, use) >> np.uint64(11)).astype(np.float64) + 0.5) * _MANTISSA
    return np.argsort(-(np.log(weights) - np.log(-np.log(uniform))), kind="stable")


def _draws(count: int, seed: int, generation: int, use: int) -> np.ndarray:
    # Raw numbers, as numpy may change what its generators make of them.
    # As uint64: a list with a number this large and a small one would become float64, which has no room for a seed.
    return np.random.Philox(key=np.asarray([seed + use, generation], np.uint64)).random_raw(count)
