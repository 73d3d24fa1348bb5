"""What is measured: real model shapes with random weights, packed rows, and how each side may be set."""

import dataclasses
from typing import Any, Literal

import numpy as np

from bench.cases import QWEN3_0_6B, SMOLLM2_135M
from r1jax.models.config import DecoderConfig
from r1jax.models.families import decoder_config
from r1jax.models.flops import forward_flops_per_token, mean_visible_keys, train_flops_per_token

QWEN2_5_1_5B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
}
QWEN2_5_7B = QWEN2_5_1_5B | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
TINY = SMOLLM2_135M | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
GPU, SMOKE = "gpu", "smoke"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How r1jax runs a case: what a user could set."""

    remat: Literal["dots", "attention", "full"] = "dots"
    """dots: gradient_checkpointing off; attention and full: on, with that remat_policy."""
    attention: Literal["auto", "xla", "cudnn", "pallas"] = "auto"
    loss_chunk: int | None = None
    optim: str = "adamw_torch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement on one device."""

    name: str
    kind: Literal["sft", "grpo", "decode"]
    group: str
    hf_config: dict[str, Any]
    rows: int
    """Rows of an update; decode: completions drawn side by side."""
    row_length: int
    """Tokens of a row, all of them used; decode: of a completion."""
    documents: int = 1
    """Documents of a row, each about half as long as the one before it; decode: prompts."""
    prompt_length: int = 0
    """decode: tokens of each prompt."""
    settings: tuple[Setting, ...] = (Setting(),)
    """Tried in this order while there is time; the fastest counts."""
    dtype: str = "bfloat16"

    @property
    def decoder(self) -> DecoderConfig:
        """The model."""
        return decoder_config(self.hf_config)

    @property
    def num_tokens(self) -> int:
        """Tokens of a step, or that a batch draws."""
        return self.rows * self.row_length

    @property
    def num_rounds(self) -> int:
        """Rounds that are timed."""
        return 1 if self.group == SMOKE else 5

    @property
    def lengths(self) -> list[int]:
        """Tokens of the documents of each row: halves, the last one what is left."""
        left, lengths = self.row_length, []
        for _ in range(self.documents - 1):
            lengths.append((left + 1) // 2)
            left -= lengths[-1]
        return [*lengths, left]

    @property
    def flops_per_token(self) -> float:
        """Of the mathematics, see r1jax/models/flops.py: causal, and nothing counted twice for being recomputed."""
        if self.kind == "decode":
            return forward_flops_per_token(self.decoder, self.prompt_length + (self.row_length + 1) / 2)
        return train_flops_per_token(self.decoder, mean_visible_keys(self.lengths))

    @property
    def bytes_per_token_drawn(self) -> float:
        """decode: bytes that must be read for one token of one completion: the weights once for all completions, a
        prompt's keys and values once for all of its completions, each completion's own."""
        config, width = self.decoder, 2 if self.dtype == "bfloat16" else 4
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        layer = config.hidden_size * (2 * query + 2 * key + 3 * config.intermediate_size)
        # The output projection; looking tokens up reads a row each.
        weights = config.num_layers * layer + config.vocab_size * config.hidden_size
        per_key = 2 * config.num_layers * key
        own, shared = (self.row_length + 1) / 2, self.prompt_length * self.documents / self.rows
        return width * (weights / self.rows + per_key * (own + shared))


KEEP, LESS, LEAST = Setting(), Setting(remat="attention"), Setting(remat="full")
LEAN = Setting(remat="attention", optim="adamw_8bit")


def _update(model: str, hf_config: dict[str, Any], kind: Any, length: int, rows: int, documents: int = 1, **keys: Any):
    name = f"{model} {kind} {rows}x{length // 1024}k" + (f" of {documents} documents" if documents > 1 else "")
    return Case(
        name=name, kind=kind, group=GPU, hf_config=hf_config, rows=rows, row_length=length, documents=documents, **keys
    )


def _decode(model: str, hf_config: dict[str, Any], rows: int, prompts: int) -> Case:
    return Case(
        name=f"{model} decode {rows}x1024", kind="decode", group=GPU, hf_config=hf_config, rows=rows, row_length=1024,
        documents=prompts, prompt_length=256, settings=(Setting(), Setting(attention="xla")),
    )  # fmt: skip


_SMALL = {"qwen3-0.6b": QWEN3_0_6B, "qwen2.5-1.5b": QWEN2_5_1_5B}
CASES: tuple[Case, ...] = (
    # What README quotes comes first: a machine may be lent for minutes.
    _update("qwen2.5-1.5b", QWEN2_5_1_5B, "sft", 8192, 1, settings=(KEEP, LESS)),
    _update("qwen3-0.6b", QWEN3_0_6B, "sft", 8192, 1, settings=(KEEP, LESS)),
    _decode("qwen2.5-1.5b", QWEN2_5_1_5B, 256, 32),
    _update("qwen2.5-1.5b", QWEN2_5_1_5B, "sft", 32768, 1, settings=(LESS, LEAST)),
    _update("qwen2.5-7b", QWEN2_5_7B, "sft", 4096, 1, settings=(LEAN, LESS)),
    *(
        _update(name, config, kind, length, max(1, 8192 // length), documents, settings=(KEEP, LESS))
        for length, documents in ((8192, 8), (4096, 1), (16384, 1), (16384, 16))
        for kind in ("grpo", "sft")
        for name, config in _SMALL.items()
    ),
    _update("qwen3-0.6b", QWEN3_0_6B, "sft", 32768, 1, settings=(LESS, LEAST)),
    _update("qwen2.5-7b", QWEN2_5_7B, "sft", 8192, 1, 8, settings=(LEAN, LESS)),
    _decode("qwen3-0.6b", QWEN3_0_6B, 256, 32),
    _decode("qwen2.5-7b", QWEN2_5_7B, 64, 8),
    *(
        Case(
            name=f"smoke {kind}", kind=kind, group=SMOKE, hf_config=TINY, rows=1, row_length=64, documents=3,
            settings=(KEEP, LESS),
        )
        for kind in ("sft", "grpo")
    ),
    Case(
        name="smoke decode", kind="decode", group=SMOKE, hf_config=TINY, rows=4, row_length=16, documents=2,
        prompt_length=8,
    ),
)  # fmt: skip


def case_named(name: str) -> Case:
    """The case; raises KeyError."""
    return {case.name: case for case in CASES}[name]


def packed(case: Case) -> dict[str, np.ndarray]:
    """tokens, positions, segment_ids [rows, row_length] int32 of random ids, the same for both sides."""
    rng, shape = np.random.default_rng(0), (case.rows, case.row_length)
    ids = np.concatenate([np.full(n, number) for number, n in enumerate(case.lengths, 1)])
    positions = np.concatenate([np.arange(n) for n in case.lengths])
    return {
        "tokens": rng.integers(0, case.decoder.vocab_size, shape, dtype=np.int32),
        "positions": np.broadcast_to(positions, shape).astype(np.int32),
        "segment_ids": np.broadcast_to(ids, shape).astype(np.int32),
    }
