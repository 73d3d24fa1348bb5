"""The policy: which weights and tokenizer, in which number formats, and what is recomputed."""

from dataclasses import dataclass, field
from typing import Literal

from r1jax.config.errors import at_least, require
from r1jax.config.lora import LoraConfig

BACKENDS = ("xla", "cudnn", "pallas", "splash")
"""Attentions over packed rows: `models/attention` has a module for each."""
ATTENTIONS = ("auto", *BACKENDS, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    model_name_or_path: str
    """Local HF model folder or hub id."""

    model_revision: str = "main"
    """Branch, tag or commit of a hub id; not read for a local folder."""

    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Number format of the exported model; null or auto: that of the source; bfloat16 also computes in bfloat16."""

    bf16: bool = False
    """Compute in bfloat16; master weights and logits stay float32."""

    fp16: bool = False
    """Refused when true: float16 needs loss scaling, which r1jax does not have."""

    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass (remat_policy); false keeps the results of all matrix products."""

    remat_policy: Literal["full", "attention"] = "full"
    """With gradient_checkpointing: full keeps each layer's input alone, attention also the attention output."""

    attn_implementation: str | None = None
    """Attention over packed rows: xla, cudnn, pallas or splash; null, auto and torch's names: the fastest there is."""

    chat_template: str | None = None
    """Jinja text, or a file of it, for the tokenizer's chat template; null: its own, or ChatML if it has none."""

    eos_token: str | None = None
    """Token text that ends a turn, trained and exported as EOS; null keeps the tokenizer's own."""

    loss_chunk_size: int | None = None
    """The vocabulary loss holds as many logits at one time as so many tokens have in all; null lets r1jax choose."""

    random_init: bool = False
    """Fresh weights from the model's config.json instead of its saved ones."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""

    def __post_init__(self) -> None:
        name = self.model_name_or_path
        require(bool(name.strip()), "model_name_or_path", "a local folder or a hub id", name, "name a model")
        asked = self.attn_implementation
        known = asked is None or asked in ATTENTIONS or "/" in asked  # a slash: a kernel of a hub, for torch
        require(known, "attn_implementation", f"null or one of {', '.join(ATTENTIONS)}", asked, "null chooses")
        require(not self.fp16, "fp16", "false", self.fp16, "use bf16")
        at_least("loss_chunk_size", self.loss_chunk_size, 1, "remove the key to let r1jax choose")

    @property
    def adapter(self) -> LoraConfig | None:
        """The adapter that is trained; None where all parameters are."""
        return self.lora if self.lora.use_peft else None

    @property
    def compute_dtype(self) -> Literal["float32", "bfloat16"]:
        """The number format of activations and matrix products."""
        return "bfloat16" if self.bf16 or self.torch_dtype == "bfloat16" else "float32"
