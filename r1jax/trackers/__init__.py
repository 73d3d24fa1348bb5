"""Where a run's numbers go: metrics.jsonl always, TensorBoard by default, Weights & Biases as an extra."""

from r1jax.trackers.open import Trackers, open_trackers

__all__ = ["Trackers", "open_trackers"]
