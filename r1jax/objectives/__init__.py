"""What is minimised: losses over `PackedBatch` and the weights that make them sums."""
