"""What a source holds, whatever its format."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from r1jax.checkpoints.model_card import Card
from r1jax.config.lora import LoraConfig
from r1jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model, and the training that it is in where the source tells."""

    state: Mapping[str, Any]
    """{params} and, of a training, {optimizer, step}; leaves are read when they are wanted, where that can be. Of an
    adapter: the parameters with it beside their kernels, or itself alone for --to peft."""
    config: DecoderConfig
    hf_config: dict[str, Any]
    files: Path | None
    """Where the tokenizer and generation_config.json are, if anywhere."""
    origin: str
    """What it is, for the last line."""
    card: Card
    dtype: str | None = None
    """Of the weights where the command names none; None means the source model's."""
    lora: LoraConfig | None = None
    """Of a checkpoint's adapter."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """What a checkpoint says of its run."""
    left_behind: tuple[str, ...] = ()
    """What of a DeepSpeed checkpoint is not read."""

    @property
    def params(self) -> Any:
        """The state's parameters."""
        return self.state["params"]


def on_cpu() -> jax.sharding.Sharding:
    """Where arrays go that are converted whole."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
