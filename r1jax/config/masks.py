"""Which tokens of a row are trained on, where it is not all of them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    completion_only_loss: bool | None = None
    """Train on completions only; null: true for prompt/completion rows, false for others."""

    assistant_only_loss: bool = False
    """Train on what the assistant says in conversations; with completion_only_loss, on both masks' common part."""
