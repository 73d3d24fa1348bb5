"""Measurements: one command each, results appended under bench/results."""
