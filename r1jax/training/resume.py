"""Where a run starts: at its newest checkpoint, at the one named, or at the beginning."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from r1jax.checkpoints.orbax import FOLDER, Checkpoints, locate
from r1jax.config.errors import need, renamed
from r1jax.config.run import RunSettings
from r1jax.models.config import DecoderConfig
from r1jax.training.agreement import first_says
from r1jax.training.deepspeed import DeepSpeedCheckpoint, names_deepspeed
from r1jax.training.order import DataOrder
from r1jax.training.publish import STAGING
from r1jax.training.state import StateLayout, TrainState

logger = logging.getLogger(__name__)

# What a run that was killed before its first checkpoint leaves behind.
_UNFINISHED = {
    *("config.yaml", "metrics.jsonl", "metrics.jsonl.tmp", "runs", "wandb", "wandb_run_id"),
    *(FOLDER, ".export-incomplete", STAGING, "completions", "journal"),
}


@runtime_checkable
class Restorable(Protocol):
    """A folder with states to go on from, whoever wrote them."""

    @property
    def directory(self) -> Path: ...
    def metadata(self, step: int) -> dict[str, Any]: ...
    def check_leaves(self, step: int, abstract_state: Any) -> None: ...
    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """A checkpoint to go on from."""

    checkpoints: Restorable
    """The folder that holds it; read only unless it is the run's own."""
    step: int
    """Updates done."""
    metadata: dict[str, Any]
    """What was saved with it."""


def find_start(settings: RunSettings, own: Checkpoints, decoder: DecoderConfig) -> Start | None:
    """The checkpoint that `resume_from_checkpoint` asks for; None to start afresh.

    decoder: of the run's model, which a DeepSpeed checkpoint must be one of.

    Damaged checkpoints are passed over for the one before, unless one is asked for by its step. Raises `UserError`,
    before anything is deleted, when the one asked for is absent or damaged, when checkpoints are there and none is
    whole, or when starting afresh would mix with another run's files.
    """
    wish = settings.resume_from_checkpoint
    source, step, damaged = own, None, []
    if wish is False:
        _refuse_mixing(settings, bool(own.all_steps()))
        own.discard_after(-1)
        return None
    if isinstance(wish, str):
        found = locate(Path(wish))
        if found is None:
            return _start_of_deepspeed(Path(wish), decoder)
        folder, step = found
        source = own if folder == own.directory else Checkpoints(folder, read_only=True)
    if step is None:
        step, damaged = source.newest_whole()
        step = _agreed(step)
    if step is None:
        if source.all_steps():
            got = "; ".join(damaged) or "none"
            advice = (
                "bring one back from a copy, or start afresh: resume_from_checkpoint false, overwrite_output_dir true"
            )
            raise need("resume_from_checkpoint", f"a whole checkpoint in {source.directory}", got, advice)
        if wish is True:
            advice = "remove the key to start afresh"
            raise need("resume_from_checkpoint", f"a checkpoint in {own.directory}", "none", advice)
        _refuse_mixing(settings, False)
        return None
    start = Start(checkpoints=source, step=step, metadata=source.metadata(step))
    if damaged and jax.process_index() == 0:
        # Without the folder, so that a log file's width holds it.
        logger.warning("%s; resuming from step %d", "; ".join(damaged), step)
    elif not damaged:
        logger.info("resuming from step %d of %s", step, source.directory)
    return start


def _start_of_deepspeed(path: Path, decoder: DecoderConfig) -> Start:
    with renamed("checkpoint", "resume_from_checkpoint"):
        is_deepspeed = names_deepspeed(path)
    if not is_deepspeed:
        rule = "a run, one of its checkpoints or a DeepSpeed checkpoint"
        raise need("resume_from_checkpoint", rule, str(path), "check the path")
    checkpoint = DeepSpeedCheckpoint(path, decoder)
    logger.info("resuming from step %d of DeepSpeed's %s", checkpoint.step, checkpoint.directory)
    return Start(checkpoints=checkpoint, step=checkpoint.step, metadata=checkpoint.metadata(checkpoint.step))


def check_start(start: Start, layout: StateLayout, order: DataOrder, beside: Mapping[str, Any] | None = None) -> None:
    """Nothing; raises `UserError` where a run with this layout and order of data cannot go on from the checkpoint.

    beside: what the trees that the run wants beside the state are like.
    """
    order.check(start.metadata)
    if start.metadata.get("save_only_model"):
        advice = "set save_only_model: false in runs that are to be resumed, or resume_from_checkpoint: false"
        raise need("resume_from_checkpoint", "a checkpoint with optimizer state", "one without", advice)
    start.checkpoints.check_leaves(start.step, {**layout.abstract.as_dict(), **(beside or {})})


def goes_on(settings: RunSettings, own: Checkpoints) -> bool:
    """Whether the run continues an earlier one, as far as can be told before `find_start` changes anything."""
    wish = settings.resume_from_checkpoint
    return wish is not False and (isinstance(wish, str) or bool(own.all_steps()))


def _agreed(step: int | None) -> int | None:
    """What the first process chose: should folders look different to others, they must not part."""
    chosen = first_says(-1 if step is None else step)
    return None if chosen < 0 else chosen


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


def restore(start: Start, own: Checkpoints, layout: StateLayout, order: DataOrder) -> TrainState:
    """The state at a checkpoint, laid out for this run's mesh; later checkpoints of the run's own folder are deleted.

    Raises `UserError` when it was saved without its optimizer or its steps had other rows (`order`).
    """
    return restore_beside(start, own, layout, order, {})[0]


def restore_beside(
    start: Start, own: Checkpoints, layout: StateLayout, order: DataOrder, beside: Mapping[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """(the state as `restore` gives it, the trees that the checkpoint holds beside it); beside: what these are like."""
    check_start(start, layout, order, beside)
    logger.info("restoring step %d", start.step)
    saved, _ = start.checkpoints.restore(start.step, {**layout.abstract.as_dict(), **beside})
    jax.block_until_ready(saved)
    logger.info("restored")
    if start.checkpoints.directory == own.directory:
        own.discard_after(start.step)
    return TrainState(**{name: saved.pop(name) for name in layout.abstract.as_dict()}), saved
