"""AdamW and the learning-rate schedule."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from r1jax.config.errors import at_least, need, require, shown

# HF's names; all of them are AdamW. The 8-bit ones are chosen for their small optimizer state, so they map to our
# memory-lean AdamW, the others to the one with float32 moments.
LEAN_OPTIMIZERS = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")

# DeepSpeed's own, for runs that go on from one of its checkpoints.
DEEPSPEED_SCHEDULES = ("WarmupLR", "WarmupDecayLR")

SCHEDULE_KEYS = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "constant": (),
    "constant_with_warmup": (),
    "WarmupLR": ("warmup_min_lr",),
    "WarmupDecayLR": ("warmup_min_lr", "total_num_steps"),
}


def _no_kwargs() -> Mapping[str, float]:
    return {}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw",
    ] = "adamw_torch"
    """HF's optimizer name; 8-bit names mean AdamW with a memory-lean state."""

    learning_rate: float = 2e-5
    """Highest learning rate; default 2e-5 for sft, 1e-6 for grpo."""

    weight_decay: float = 0.0
    """Decoupled weight decay; never applied to biases and norm scales."""

    adam_beta1: float = 0.9
    """Decay of the gradient's running mean."""

    adam_beta2: float = 0.999
    """Decay of the squared gradient's running mean."""

    adam_epsilon: float = 1e-8
    """Added to the denominator of Adam's update."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 means no clipping."""

    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_min_lr",
        "constant",
        "constant_with_warmup",
        "WarmupLR",
        "WarmupDecayLR",
    ] = "linear"
    """Shape of the learning rate after warm-up; the last two are DeepSpeed's, one step behind, with linear warm-up."""

    lr_scheduler_kwargs: Mapping[str, float] = field(default_factory=_no_kwargs)
    """The schedule's own numbers: min_lr or min_lr_rate (of learning_rate), num_cycles (0.5 = down once);
    DeepSpeed's warmup_min_lr and total_num_steps."""

    warmup_ratio: float = 0.0
    """Part of the run over which the learning rate rises from 0; 0 <= x < 1."""

    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0; when positive, warmup_ratio is not read."""

    def __post_init__(self) -> None:
        at_least("learning_rate", self.learning_rate, 0, "a usual value is 1e-5")
        at_least("weight_decay", self.weight_decay, 0, "0 means none")
        at_least("max_grad_norm", self.max_grad_norm, 0, "0 means no clipping")
        at_least("warmup_steps", self.warmup_steps, 0, "0 means none")
        for name, beta in (("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)):
            require(0 <= beta < 1, name, "0 <= x < 1", beta, "usual values are 0.9 and 0.999")
        require(self.adam_epsilon > 0, "adam_epsilon", "x > 0", self.adam_epsilon, "a usual value is 1e-8")
        ratio, advice = self.warmup_ratio, "for a number of steps use warmup_steps"
        require(0 <= ratio < 1, "warmup_ratio", "0 <= x < 1", ratio, advice)
        self._check_schedule()

    def _check_schedule(self) -> None:
        schedule, given = self.lr_scheduler_type, self.lr_scheduler_kwargs
        taken = SCHEDULE_KEYS[schedule]
        name = "lr_scheduler_kwargs"
        for key in given:
            rule = f"only {', '.join(taken)} with lr_scheduler_type {schedule}" if taken else f"nothing with {schedule}"
            require(key in taken, name, rule, key, f"remove {shown(key)} or choose another lr_scheduler_type")
        for key, value in given.items():
            at_least(f"{name}.{key}", value, 0, "use a number that is not negative")
        low = given.get("warmup_min_lr", 0.0)
        require(low <= self.learning_rate, f"{name}.warmup_min_lr", "x <= learning_rate", low, "lower it")
        if schedule != "cosine_with_min_lr":
            return
        if ("min_lr" in given) == ("min_lr_rate" in given):
            got = "both" if "min_lr" in given else "neither"
            raise need(name, "exactly one of min_lr and min_lr_rate with cosine_with_min_lr", got, "keep one of them")
        rate = given.get("min_lr_rate", 0.0)
        require(rate <= 1, f"{name}.min_lr_rate", "0 <= x <= 1", rate, "it is a fraction of learning_rate")
        low = given.get("min_lr", 0.0)
        require(low <= self.learning_rate, f"{name}.min_lr", "x <= learning_rate", low, "lower it")

    @property
    def kind(self) -> Literal["adamw", "adamw_lean"]:
        """Which of our two optimizers `optim` means."""
        return "adamw_lean" if self.optim in LEAN_OPTIMIZERS else "adamw"
