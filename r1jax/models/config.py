"""The decoder's shape: everything that the model code needs to know about a checkpoint, and nothing else."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies differ from theta ** (-2i / head_dim)."""

    kind: Literal["linear", "llama3"]
    """linear: positions divided by factor (Chen et al. 2023); llama3: only low frequencies stretched (Llama 3.1)."""
    factor: float
    """By how much the context is stretched."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position / low_freq_factor are divided by factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position / high_freq_factor are left as they are."""
    original_max_position: int = 0
    """llama3: the context length, in tokens, of the model before stretching."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One decoder for Qwen2, Qwen3 and Llama; hashable, so it is a static argument under jit."""

    vocab_size: int
    """V: rows of the embedding."""
    hidden_size: int
    """D: width of the residual stream."""
    intermediate_size: int
    """F: width of the gated MLP."""
    num_layers: int
    """L"""
    num_heads: int
    """N: query heads."""
    num_kv_heads: int
    """K: key/value heads; divides N."""
    head_dim: int
    """H: width of a head; not always hidden_size / num_heads."""
    norm_eps: float
    """Epsilon of every RMSNorm."""
    rope_theta: float
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """None: plain rotary embedding."""
    qkv_bias: bool = False
    """Bias on the q, k and v projections."""
    output_bias: bool = False
    """Bias on attention's output projection."""
    mlp_bias: bool = False
    """Bias on the three projections of the MLP."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k before the rotation (Qwen3)."""
    tied_embeddings: bool = False
    """The output projection is the embedding, transposed."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""
    max_position_embeddings: int = 0
    """Longest document the model was made for, in tokens; 0 when unknown."""
