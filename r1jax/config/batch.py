"""How many sequences make a step, and how many steps make the run."""

from dataclasses import dataclass

from r1jax.config.errors import at_least, require


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    per_device_train_batch_size: int = 8
    """Sequences (rows when packing) in a micro-batch per data-parallel shard (mesh_data x mesh_fsdp shards)."""

    per_device_eval_batch_size: int = 8
    """Sequences in an evaluation batch per data-parallel shard."""

    gradient_accumulation_steps: int = 1
    """Micro-batches in one optimizer step."""

    num_train_epochs: float = 3.0
    """Passes over the data, fractions allowed; not read when max_steps is positive."""

    max_steps: int = -1
    """Optimizer steps of the run; -1 means num_train_epochs decides."""

    def __post_init__(self) -> None:
        at_least("per_device_train_batch_size", self.per_device_train_batch_size, 1, "use at least one sequence")
        at_least("per_device_eval_batch_size", self.per_device_eval_batch_size, 1, "use at least one sequence")
        at_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1, "1 means no accumulation")
        steps = self.max_steps
        require(steps == -1 or steps >= 1, "max_steps", "-1 or x >= 1", steps, "-1 lets num_train_epochs decide")
        lasting = self.num_train_epochs > 0 or steps >= 1
        require(lasting, "num_train_epochs", "x > 0 when max_steps is -1", self.num_train_epochs, "set one of the two")
