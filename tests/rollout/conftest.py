"""Tiny decoders of each family whose samples differ and meet stop ids, and the trainer's log-probabilities of them."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Layout
from r1jax.models.config import DecoderConfig, RopeScaling
from r1jax.models.transformer import forward, output_kernel
from r1jax.objectives.cross_entropy import token_logprobs

QWEN3 = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    rope_theta=1e4,
    qk_norm=True,
    tied_embeddings=True,
    # Logits with a spread of about 1: sampled completions differ, and a stop id is met now and then.
    initializer_range=0.2,
    max_position_embeddings=64,
)
SCALING = RopeScaling(kind="llama3", factor=8.0, original_max_position=16)
CONFIGS = {
    "qwen2": dataclasses.replace(QWEN3, qk_norm=False, qkv_bias=True),
    "qwen3": QWEN3,
    "llama": dataclasses.replace(QWEN3, qk_norm=False, tied_embeddings=False, rope_scaling=SCALING),
}


@pytest.fixture(scope="session")
def configs() -> dict[str, DecoderConfig]:
    """A decoder of each family by its model_type."""
    return CONFIGS


@pytest.fixture(scope="session")
def trainer_logprobs() -> Callable[..., list[np.ndarray]]:
    """(params, config, sequences, temperature) -> log-probabilities of each one's tokens, 0 for the first of them.

    By the training forward over packed rows of 64 tokens."""

    @partial(jax.jit, static_argnames=("config", "temperature"))
    def of_rows(params, tokens, layout, config, temperature):
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        hidden = forward(params, tokens, layout, config)
        found, _ = token_logprobs(hidden, output_kernel(params), targets, 64, temperature=temperature)
        return jnp.pad(found[:, :-1], ((0, 0), (1, 0)))

    def compute(params, config, sequences, temperature=1.0):
        rows, places = [[]], []
        for sequence in sequences:
            if sum(map(len, rows[-1])) + len(sequence) > 64:
                rows.append([])
            places.append((len(rows) - 1, sum(map(len, rows[-1]))))
            rows[-1].append(sequence)
        tokens, segments, positions = np.zeros((3, len(rows), 64), np.int32)
        for index, (sequence, (row, start)) in enumerate(zip(sequences, places, strict=True)):
            span = slice(start, start + len(sequence))
            tokens[row, span], segments[row, span] = sequence, index + 1
            positions[row, span] = np.arange(len(sequence))
        found = np.array(
            of_rows(params, tokens, Layout(segment_ids=segments, positions=positions), config, temperature)
        )
        for row, start in places:
            found[row, start] = 0  # predicted from the document before it
        return [found[row, at : at + len(s)] for s, (row, at) in zip(sequences, places, strict=True)]

    return compute
