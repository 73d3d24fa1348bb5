"""What a checkpoint says of its run beside the tensors, also as JSON: a run that goes on elsewhere keeps it for the way
back."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

MODEL_STATES, SCHEDULER_FILE = "model_states", "scheduler.pt"
"""Where a checkpoint has its schedule: the engine's own, under lr_scheduler, or the Trainer's, in a file of its own."""


class ParameterGroup(NamedTuple):
    """A group of the optimizer."""

    settings: dict[str, Any]
    """lr (of the next step), betas, eps, weight_decay and whatever else was saved; empty in elastic checkpoints."""
    names: tuple[str, ...]
    """Its parameters in the order of the flattening."""


class Scheduler(NamedTuple):
    """A learning-rate scheduler's state."""

    origin: str
    """MODEL_STATES where the engine keeps it, SCHEDULER_FILE where the Trainer does."""
    state: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Saved:
    """The run at the time of the checkpoint."""

    folder: Path
    stage: int
    """ZeRO's stage in the run that saved it."""
    world_size: int
    universal: bool
    dtype: str
    """The model's, as numpy names it; masters and moments are float32 in any case."""
    frozen: tuple[str, ...]
    """Parameters without moments, kept in the model's dtype."""
    tied: dict[str, str]
    """The holder's name for each other name of a shared parameter."""
    groups: tuple[ParameterGroup, ...]
    step: int
    """Adam's."""
    global_steps: int
    skipped_steps: int
    """Steps without an update, for overflow under fp16."""
    global_samples: int | None = None
    """Rows trained on; None where the checkpoint does not say it."""
    scheduler: Scheduler | None
    trainer_state: dict[str, Any] | None
    """trainer_state.json's content: global_step, epoch, ..."""
    ds_config: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads: plain values, tuples among them as lists once they are text."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Saved)}
        groups = [{"settings": dict(group.settings), "names": list(group.names)} for group in self.groups]
        scheduler = None if self.scheduler is None else self.scheduler._asdict()
        return values | {"folder": str(self.folder), "groups": groups, "scheduler": scheduler}


def from_json(values: Mapping[str, Any]) -> Saved:
    """What was made by `as_json`; earlier versions of it had no global_samples."""
    groups = tuple(ParameterGroup(dict(group["settings"]), tuple(group["names"])) for group in values["groups"])
    scheduler = None if values["scheduler"] is None else Scheduler(**values["scheduler"])
    others = {"folder": Path(values["folder"]), "frozen": tuple(values["frozen"])}
    return Saved(**{**values, **others, "groups": groups, "scheduler": scheduler})
