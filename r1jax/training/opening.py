"""The start of a run's output_dir, alike for every task: what is there, where to go on, and who writes from now on."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from r1jax.checkpoints.orbax import FOLDER, Checkpoints
from r1jax.config import RunConfig
from r1jax.training.carried import carry_over, check_rate
from r1jax.training.deepspeed import DEEPSPEED
from r1jax.training.order import DataOrder
from r1jax.training.publish import Publisher
from r1jax.training.recorder import Report
from r1jax.training.resume import Start, find_start, goes_on
from r1jax.training.saving import Keeper, StepPlan, best_so_far, open_recorder, write_config
from r1jax.training.source import Source, model_files
from r1jax.training.state import StateLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
    """An output_dir that a run may use; nothing of it is written yet."""

    config: RunConfig
    """The recipe, with what the run keeps of the DeepSpeed run that it goes on from."""
    checkpoints: Checkpoints
    publisher: Publisher
    start: Start | None
    """The checkpoint to go on from; None to start afresh."""

    @property
    def handed_on(self) -> dict[str, Any]:
        """What of the start's metadata every later checkpoint says too."""
        metadata = self.start.metadata if self.start is not None else {}
        return {DEEPSPEED: metadata[DEEPSPEED]} if DEEPSPEED in metadata else {}


@contextlib.contextmanager
def opened(config: RunConfig, source: Source) -> Iterator[Opening]:
    """The run's output_dir as it is found; raises `UserError` where it cannot be used as the recipe asks."""
    directory = Path(config.run.output_dir) / FOLDER
    checkpoints = Checkpoints(directory, config.checkpoint.save_total_limit, model_files=model_files(source))
    publisher = Publisher(config)
    with contextlib.closing(checkpoints):
        if not goes_on(config.run, checkpoints):
            publisher.refuse_taken_branch()
        start = find_start(config.run, checkpoints, source.decoder)
        config = carry_over(config, start.metadata if start is not None else {})
        yield Opening(config=config, checkpoints=checkpoints, publisher=publisher, start=start)


def begin_writing(
    config: RunConfig,
    source: Source,
    layout: StateLayout,
    opening: Opening,
    *,
    plan: StepPlan,
    order: DataOrder,
    report: Report,
    adapter: Mapping[str, Any] | None = None,
) -> Keeper:
    """What keeps the run's results from now on; config.yaml is written and metrics are cut back to the start.

    report: how a task's sums become metrics. adapter: what checkpoints say of one. The keeper's recorder is the
    caller's to close.
    """
    metadata = opening.start.metadata if opening.start is not None else {}
    check_rate(config.optimizer, metadata, plan.num_steps)
    write_config(config)
    opening.publisher.start()
    return Keeper(
        config=config,
        source=source,
        layout=layout,
        checkpoints=opening.checkpoints,
        recorder=open_recorder(config, plan, report, metadata),
        order=order,
        best=best_so_far(config, opening.start, opening.checkpoints),
        publisher=opening.publisher,
        num_steps=plan.num_steps,
        num_steps_per_epoch=plan.num_steps_per_epoch,
        handed_on={**(adapter or {}), **opening.handed_on},
    )
