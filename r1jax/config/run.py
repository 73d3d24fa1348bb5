"""What kind of run this is, where it writes and how it starts."""

import re
from dataclasses import dataclass
from typing import Literal

from r1jax.config.errors import require

LogLevel = Literal["passive", "detail", "debug", "info", "warning", "error", "critical"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    task: Literal["sft", "grpo"] = "sft"
    """What is trained; not given: grpo when a key that only GRPO has is set, else sft."""

    output_dir: str = "trainer_output"
    """Folder for the resolved config, metrics, checkpoints and the exported model."""

    overwrite_output_dir: bool = False
    """Write into an output_dir that holds other files; checkpoints in it are resumed either way."""

    resume_from_checkpoint: bool | str | None = None
    """null: last checkpoint in output_dir if any; true: there must be one; false: start afresh; text: that folder."""

    seed: int = 42
    """Seed of data order, fresh weights and sampling; 0 <= x < 2**32."""

    deterministic: bool = False
    """Bit-identical reruns on GPU, at the cost of slower kernels."""

    profile_steps: int | str | None = None
    """Steps traced by JAX's profiler into output_dir/profile, as first-last (10-12) or one number; null means none."""

    hub_timeout: float = 1800.0
    """Seconds that one push to the hub may take; then it counts as failed."""

    ddp_timeout: float = 1800.0
    """Seconds without any progress after which a process shows its stacks and ends with exit code 124."""

    log_level: LogLevel = "passive"
    """Least severe message that is shown; passive means info."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", "0 <= x < 2**32", self.seed, "choose a number in that range")
        require(bool(self.output_dir.strip()), "output_dir", "a folder name", self.output_dir, "name a folder")
        self.profiled_steps()
        require(self.hub_timeout > 0, "hub_timeout", "x > 0", self.hub_timeout, "give a number of seconds")
        require(self.ddp_timeout > 0, "ddp_timeout", "x > 0", self.ddp_timeout, "give a number of seconds")
        if isinstance(self.resume_from_checkpoint, str):
            named = bool(self.resume_from_checkpoint.strip())
            advice = "name a checkpoint folder, or remove the key to resume by itself"
            require(named, "resume_from_checkpoint", "true, false or a folder", self.resume_from_checkpoint, advice)

    def profiled_steps(self) -> tuple[int, int] | None:
        """(first, last) step of profile_steps, counted as metrics count them: the first update is step 1."""
        if self.profile_steps is None:
            return None
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(self.profile_steps).strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        ordered = 1 <= first <= last
        require(ordered, "profile_steps", "a step, or first-last", self.profile_steps, "write 10-12 for three steps")
        return first, last
