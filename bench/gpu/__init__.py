"""The benchmark for a machine with one GPU: `python -m bench.gpu`."""
