"""Where a run starts: at its newest checkpoint, at the one named, or at the beginning."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from r1jax.checkpoints.orbax import FOLDER, Checkpoints, locate
from r1jax.config.errors import need
from r1jax.config.run import RunSettings
from r1jax.training.state import StateLayout, TrainState

logger = logging.getLogger(__name__)

# What a run that was killed before its first checkpoint leaves behind.
_UNFINISHED = {"config.yaml", "metrics.jsonl", "runs", "wandb", FOLDER, ".export-incomplete"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """A checkpoint to go on from."""

    checkpoints: Checkpoints
    """The folder that holds it; read only unless it is the run's own."""
    step: int
    """Updates done."""
    metadata: dict[str, Any]
    """What was saved with it."""


def find_start(settings: RunSettings, own: Checkpoints) -> Start | None:
    """The checkpoint that `resume_from_checkpoint` asks for; None to start afresh.

    Raises `UserError` when one is asked for and absent, or when starting afresh would mix with another run's files.
    """
    wish = settings.resume_from_checkpoint
    if isinstance(wish, str):
        found = locate(Path(wish))
        if found is None:
            raise need("resume_from_checkpoint", "a run or one of its checkpoints", wish, "check the path")
        folder, step = found
        source = own if folder == own.directory else Checkpoints(folder, read_only=True)
        step = source.latest_step() if step is None else step
    else:
        source, step = own, own.latest_step()
    if wish is False:
        _refuse_mixing(settings, bool(own.all_steps()))
        own.discard_after(-1)
        return None
    if step is None:
        if wish is True:
            advice = "remove the key to start afresh"
            raise need("resume_from_checkpoint", f"a checkpoint in {own.directory}", "none", advice)
        _refuse_mixing(settings, False)
        return None
    logger.info("resuming from step %d of %s", step, source.directory)
    return Start(checkpoints=source, step=step, metadata=source.metadata(step))


def _refuse_mixing(settings: RunSettings, has_checkpoints: bool) -> None:
    if settings.overwrite_output_dir:
        return
    folder = Path(settings.output_dir)
    others = (
        sorted(child.name for child in folder.iterdir() if child.name not in _UNFINISHED) if folder.is_dir() else []
    )
    if others or has_checkpoints:
        got = "one with checkpoints" if has_checkpoints else f"one with {others[0]}"
        advice = "choose another, or set overwrite_output_dir: true"
        raise need("output_dir", f"a new or empty folder ({settings.output_dir})", got, advice)


def restore(start: Start, own: Checkpoints, layout: StateLayout, plan: str) -> TrainState:
    """The state at a checkpoint, laid out for this run's mesh; later checkpoints of the run's own folder are deleted.

    Raises `UserError` when it was saved without its optimizer or its rows came in another order (`plan`).
    """
    if start.metadata.get("plan", plan) != plan:
        rule = "the data, max_length, packing, seed and batch size that the checkpoint was trained with"
        raise need("resume_from_checkpoint", rule, "others", "restore these keys, or choose another output_dir")
    if start.metadata.get("save_only_model"):
        advice = "set save_only_model: false in runs that are to be resumed, or resume_from_checkpoint: false"
        raise need("resume_from_checkpoint", "a checkpoint with optimizer state", "one without", advice)
    saved, _ = start.checkpoints.restore(start.step, layout.abstract.as_dict())
    if start.checkpoints.directory == own.directory:
        own.discard_after(start.step)
    return TrainState(**saved)
