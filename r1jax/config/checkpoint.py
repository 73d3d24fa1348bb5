"""When the run is saved, what is kept, and what of it is published on the hub."""

import re
from dataclasses import dataclass, field
from typing import Literal

from r1jax.config.errors import at_least, require
from r1jax.config.intervals import check_interval


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When checkpoints are written; the end of the run always exports the model."""

    save_steps: int | float = 500
    """Steps between checkpoints, or a fraction of the run (0.05 = 20 checkpoints)."""

    save_total_limit: int | None = None
    """Newest checkpoints that are kept, the best one counted among them; null keeps all."""

    save_only_model: bool = False
    """Leave the optimizer state out of checkpoints; such a checkpoint cannot be resumed exactly."""

    load_best_model_at_end: bool = False
    """Export the checkpoint with the best metric_for_best_model instead of the last state."""

    push_to_hub: bool = False
    """Upload the model to hub_model_id, when hub_strategy says; failures are reported, the run goes on."""

    hub_model_id: str | None = None
    """Repository, as org/name or name (of the token's owner); null means the name of output_dir."""

    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = "every_save"
    """end: finished model; every_save: each save's too; the others: also the last, or each, resumable checkpoint."""

    hub_private_repo: bool | None = None
    """Whether a new repository is private; null: the owner's default, but private without push_to_hub."""

    hub_token: str | None = field(default=None, metadata={"secret": True})
    """Access token with write permission; null: HF_TOKEN or the login. Never shown nor written."""

    hub_always_push: bool = False
    """Queue a save's push behind one that is not through, instead of leaving it out."""

    hub_model_revision: str = "main"
    """Branch that is pushed to."""

    push_to_hub_revision: bool = False
    """Upload the finished model to the branch hub_model_revision, which must not hold a model yet."""

    overwrite_hub_revision: bool = False
    """Let push_to_hub_revision replace the model of the branch."""

    callbacks: tuple[Literal["push_to_hub_revision"], ...] = ()
    """push_to_hub_revision: each save's model goes to a branch of its own, hub_model_revision-step-000000100."""

    def __post_init__(self) -> None:
        check_interval("save_steps", self.save_steps)
        at_least("save_total_limit", self.save_total_limit, 1, "remove the key to keep all, or use save_strategy: 'no'")
        named = self.hub_model_id is None or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", self.hub_model_id)
        advice = "write letters, digits, '-', '_', '.'"
        require(bool(named), "hub_model_id", "a repository like org/name or name", self.hub_model_id, advice)
        branch = re.fullmatch(r"[\w][\w./-]*", self.hub_model_revision) and ".." not in self.hub_model_revision
        require(
            bool(branch), "hub_model_revision", "the name of a branch", self.hub_model_revision, "name one like main"
        )

    @property
    def publishes(self) -> bool:
        """Whether anything is to be uploaded."""
        return self.push_to_hub or self.push_to_hub_revision or bool(self.callbacks)
