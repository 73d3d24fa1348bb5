from typing import Any

import jax
import jax.numpy as jnp
import pytest

from r1jax.batch import Layout
from r1jax.models.config import DecoderConfig
from r1jax.models.flops import (
    forward_flops_per_token,
    matmul_parameters,
    mean_visible_keys,
    peak_flops,
    train_flops_per_token,
)
from r1jax.models.parameters import abstract_params
from r1jax.models.rope import rotation
from r1jax.models.transformer import layer

CONFIG = DecoderConfig(
    vocab_size=100,
    hidden_size=10,
    intermediate_size=20,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=5,
    norm_eps=1e-6,
    rope_theta=1e4,
)


def test_counts_worked_by_hand():
    # A layer: q 10x20, k and v 10x10 each, o 20x10 = 600; MLP 3 x 10x20 = 600. Three layers and 10x100 of vocabulary.
    assert matmul_parameters(CONFIG) == 3 * 1200 + 1000
    # Attention: 4 x 3 layers x 4 heads x 5 = 240 a visible key.
    assert forward_flops_per_token(CONFIG, 0.0) == 9200
    assert forward_flops_per_token(CONFIG, 7.5) == 9200 + 1800
    assert train_flops_per_token(CONFIG, 7.5) == 33000


def test_visible_keys_worked_by_hand():
    assert mean_visible_keys([4]) == 2.5  # 1, 2, 3, 4
    assert mean_visible_keys([1, 3]) == 1.75  # 1; 1, 2, 3
    assert mean_visible_keys([]) == 0


def counted_flops(lowered: Any) -> float:
    """What XLA counts in a program before optimising it."""
    return lowered.cost_analysis()["flops"]


def test_a_layer_costs_what_xla_counts():
    # One query block, which scores the whole square: every token meets all 64 keys.
    length, rows = 64, 2
    config = DecoderConfig(
        vocab_size=1,
        hidden_size=128,
        intermediate_size=320,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        norm_eps=1e-6,
        rope_theta=1e4,
    )
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), abstract_params(config))
    x = jax.ShapeDtypeStruct((rows, length, 128), jnp.float32)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def run(params: dict, x: jax.Array, layout: Layout) -> jax.Array:
        return jnp.sum(layer(params, x, layout, rotation(config, layout.positions), config)[0])

    shapes = params["layers"], x, Layout(segment_ids=ids, positions=ids)
    vocabulary = 2 * config.hidden_size * config.vocab_size  # outside the layer
    forward = rows * length * (forward_flops_per_token(config, length) - vocabulary)
    counted = counted_flops(jax.jit(run).lower(*shapes))
    # XLA counts norms, rotations and softmax too.
    assert forward < counted < 1.05 * forward
    train = rows * length * (train_flops_per_token(config, length) - 3 * vocabulary)
    scores_again = rows * length * 4 * config.num_heads * config.head_dim * length  # attend rematerialises its blocks
    gradient = counted_flops(jax.jit(jax.value_and_grad(run, argnums=(0, 1))).lower(*shapes))
    assert train < gradient < 1.05 * (train + scores_again)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA L40S", None),
    ],
)
def test_peak_of_a_device_kind(kind: str, peak: float | None):
    assert peak_flops(kind) == peak
