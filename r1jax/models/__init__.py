"""The decoder and its families: pure functions over a parameter pytree; knows nothing of training."""
