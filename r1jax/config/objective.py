"""What is minimised, in both tasks, and on which tokens."""

from dataclasses import dataclass
from typing import Literal, get_args

from r1jax.config.errors import at_least, require

SftLoss = Literal["nll", "chunked_nll", "dft"]
GrpoLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
LossType = Literal[SftLoss, GrpoLoss]
SFT_LOSSES: tuple[str, ...] = get_args(SftLoss)
GRPO_LOSSES: tuple[str, ...] = get_args(GrpoLoss)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    loss_type: LossType = "nll"
    """sft: nll (chunked_nll is the same: always in chunks) or dft (nll times p); grpo: the surrogate and its mean."""

    neftune_noise_alpha: float | None = None
    """sft: scale of uniform noise on the embeddings while training (NEFTune); null means none."""

    completion_only_loss: bool | None = None
    """sft: train on completions only; null: true for prompt/completion rows, false for others."""

    assistant_only_loss: bool = False
    """sft: train on what the assistant says in conversations; with completion_only_loss, on both masks' common part."""

    def __post_init__(self) -> None:
        at_least("neftune_noise_alpha", self.neftune_noise_alpha, 0, "5 is usual; remove the key for no noise")

    def check(self, task: str) -> None:
        """Raises `UserError` for a loss of the other task."""
        losses = SFT_LOSSES if task == "sft" else GRPO_LOSSES
        known = self.loss_type in losses
        require(
            known, "loss_type", f"one of {', '.join(losses)} for task {task}", self.loss_type, "choose one, or set task"
        )
