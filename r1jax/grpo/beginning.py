"""What a GRPO run begins with: its state, what goes beside it, and what an earlier process of the run has left."""

import dataclasses
from typing import Any

from r1jax.config import RunConfig
from r1jax.experience import carried_storage, storage
from r1jax.experience.selection import Carried
from r1jax.experience.task import Task
from r1jax.rollout.journal import Journal, Label
from r1jax.training.bonus import EntropyBonus
from r1jax.training.deepspeed import STATE_ONLY
from r1jax.training.opening import Opening
from r1jax.training.order import DataOrder
from r1jax.training.reference import Reference
from r1jax.training.resume import restore_beside
from r1jax.training.source import Source, first_params
from r1jax.training.state import StateLayout, TrainState, start_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What an earlier process of the run has left of its experience."""

    batches: dict[int, Any]
    """By the step that uses them."""
    carried: Carried
    """What its generations have handed on."""
    ahead: Label | None
    """The weights that the next generation was being drawn with."""
    journal: Journal | None
    """Of samples; None where they can be drawn again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """What goes through a run beside its state, and into its checkpoints."""

    reference: Reference | None
    """None without a KL term."""
    bonus: EntropyBonus | None
    """None without an entropy bonus."""

    @property
    def parts(self) -> list[Reference | EntropyBonus]:
        """Those that there are."""
        return [part for part in (self.reference, self.bonus) if part is not None]

    def trees(self) -> dict[str, Any]:
        """What a checkpoint holds of them."""
        return {name: tree for part in self.parts for name, tree in part.trees().items()}


def begin(
    config: RunConfig,
    source: Source,
    layout: StateLayout,
    task: Task,
    order: DataOrder,
    opening: Opening,
    frozen: Any = None,
) -> tuple[TrainState, Beside, tuple[dict[int, Any], Carried]]:
    """(the state, what goes beside it, what a checkpoint has kept: batches for its next steps, and what its generations
    have handed on).

    frozen: with LoRA what of the model is not trained.
    """
    start, reference, params = opening.start, None, None
    if start is None or config.grpo.reference.beta:
        params = first_params(config, source, layout)
    if config.grpo.reference.beta:
        reference = Reference(params, config.grpo.reference, layout, config.model.compute_dtype, frozen)
    bonus = EntropyBonus(config.grpo.entropy, layout) if config.grpo.entropy.has_bonus else None
    beside, fresh = Beside(reference=reference, bonus=bonus), Carried(rates=task.pass_rates)
    if start is None:
        state = start_state(params, config.optimizer, layout)
        return dataclasses.replace(state, frozen=frozen), beside, ({}, fresh)
    del params
    # A checkpoint of another program's knows nothing of what goes beside: that begins here.
    held = [] if start.metadata.get(STATE_ONLY) else beside.parts
    wanted = {
        **{name: tree for part in held for name, tree in part.abstract().items()},
        **storage.abstract(start.metadata, layout.batch),
        **carried_storage.abstract(start.metadata, layout.batch),
    }
    state, trees = restore_beside(start, opening.checkpoints, layout, order, wanted)
    for part in held:
        part.take(trees)
    size = config.grpo.selection.replay_buffer_size
    carried = carried_storage.restored(trees, start.metadata, fresh, task.reward_names, size)
    state = dataclasses.replace(state, frozen=frozen)
    return state, beside, (storage.restored(trees, start.metadata, task.geometry, layout.batch), carried)
