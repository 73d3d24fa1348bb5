"""Prompts go in, sampled completions with their log-probabilities come out."""
