"""Models in and out: hub and local HF directories, HF export, Orbax checkpoints of a run."""
