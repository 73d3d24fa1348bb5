"""What is measured: model shapes and batches, each line a case that a worker builds from nothing."""

import dataclasses
from typing import Any

SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
}
SMALL_LLAMA = SMOLLM2_135M | {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN3_0_6B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model, one batch, one device; both sides start from random weights of these shapes."""

    name: str
    platform: str
    """'cpu' or 'gpu': where it is run unless it is asked for by name."""
    hf_config: dict[str, Any]
    """config.json of the model."""
    rows: int
    """Sequences of a step, one document each, none padded."""
    row_length: int
    """Tokens of each."""
    compute_dtype: str
    """'float32' or 'bfloat16'; weights and AdamW are float32 on both sides."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass, on both sides."""

    @property
    def num_tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.row_length


def _gpu(name: str, hf_config: dict[str, Any], rows: int, row_length: int, checkpointing: bool = False) -> Case:
    return Case(
        name=name,
        platform="gpu",
        hf_config=hf_config,
        rows=rows,
        row_length=row_length,
        compute_dtype="bfloat16",
        gradient_checkpointing=checkpointing,
    )


CASES = (
    Case(
        name="small-llama-4x256-float32",
        platform="cpu",
        hf_config=SMALL_LLAMA,
        rows=4,
        row_length=256,
        compute_dtype="float32",
    ),
    Case(
        name="smollm2-135m-4x512-float32",
        platform="cpu",
        hf_config=SMOLLM2_135M,
        rows=4,
        row_length=512,
        compute_dtype="float32",
    ),
    _gpu("smollm2-135m-16x1024-bfloat16", SMOLLM2_135M, 16, 1024),
    _gpu("qwen3-0.6b-8x1024-bfloat16", QWEN3_0_6B, 8, 1024),
    _gpu("qwen3-0.6b-4x4096-bfloat16-checkpointing", QWEN3_0_6B, 4, 4096, checkpointing=True),
)
