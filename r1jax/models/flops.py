"""Floating point operations of the model, for MFU: what the mathematics needs, not what the program happens to do.

MFU = tokens/s x `train_flops_per_token` / (devices x `peak_flops`). A product [m, k] @ [k, n] counts 2mkn; norms,
softmax, activations and the embedding's lookup count nothing; work done twice (rematerialised layers, the masked half
of a score block) counts once, so that a slower setting never looks like a better use of the hardware.
"""

import re
from collections.abc import Iterable

from r1jax.config.lora import LoraConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.lora import num_parameters

# Dense bf16 with fp32 accumulation, per device as jax counts devices, from the makers' public datasheets: NVIDIA's
# (H100, H200, A100, L4; half the figure "with sparsity") and Google's pages on each Cloud TPU version. The first name
# found as whole words in `device_kind` holds, so a variant comes before the plain name.
_PEAK_BF16 = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("L4", 121e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
)


def matmul_parameters(config: DecoderConfig) -> int:
    """Parameters that every token is multiplied with: all kernels and the output projection, tied or not."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (query + 2 * key) + query * config.hidden_size
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (attention + mlp) + config.hidden_size * config.vocab_size


def mean_visible_keys(lengths: Iterable[int]) -> float:
    """Keys that a token of these documents sees on average: (n + 1) / 2 within a document of n tokens.

    This is the causal halving: token i of a document sees i keys, its own among them. 0 for no tokens.
    """
    counts = list(lengths)
    total = sum(counts)
    return sum(n * (n + 1) / 2 for n in counts) / total if total else 0.0


def forward_flops_per_token(config: DecoderConfig, mean_visible: float) -> float:
    """2 x `matmul_parameters` + 4 x L x N x H x mean_visible.

    The second term is attention: a query head spends 2H on the score of a key it sees and 2H on adding its value.
    """
    per_key = 4 * config.num_layers * config.num_heads * config.head_dim
    return 2.0 * matmul_parameters(config) + per_key * mean_visible


def train_flops_per_token(config: DecoderConfig, mean_visible: float, lora: LoraConfig | None = None) -> float:
    """6 x `matmul_parameters` + 12 x L x N x H x mean_visible: backward is two products for each of forward's.

    `mean_visible` comes from `mean_visible_keys`, so it is halved for causality already; recomputation by
    gradient_checkpointing is not counted. With an adapter the kernels are frozen and have no gradient, which leaves 4 x
    `matmul_parameters` and adds 6 x the adapter's; that the first layer needs none of its input is not taken off.
    """
    whole = 3.0 * forward_flops_per_token(config, mean_visible)
    return whole if lora is None else whole - 2.0 * matmul_parameters(config) + 6.0 * num_parameters(config, lora)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s that a device of this kind (`jax.Device.device_kind`) can do; None when we do not know.

    None also for CPUs: MFU is then not reported.
    """
    found = (peak for name, peak in _PEAK_BF16 if re.search(rf"\b{name}\b", device_kind, re.IGNORECASE))
    return next(found, None)
