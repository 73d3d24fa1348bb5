"""The jitted programs of a run: the update, what scores a batch, and the forward pass that both share."""

from r1jax.config import RunConfig
from r1jax.objectives.grpo import make_policy_loss
from r1jax.objectives.statistics import Statistics, make_scorer, make_statistics
from r1jax.objectives.surrogate import make_surrogate
from r1jax.optimizer import make_schedule
from r1jax.sharding.constraints import make_constrain
from r1jax.training.memory import remat_of
from r1jax.training.source import Source
from r1jax.training.state import StateLayout
from r1jax.training.step import ScoreStep, TrainStep, make_score_step, make_train_step


def make_steps(config: RunConfig, source: Source, layout: StateLayout, num_steps: int) -> tuple[TrainStep, ScoreStep]:
    """(the update, what scores a batch by given parameters), both jitted."""
    statistics = make_policy_statistics(config, source, layout, config.sampling.temperature)
    loss = make_policy_loss(statistics, make_surrogate(config))
    schedule = make_schedule(config.optimizer, num_steps)
    step = make_train_step(loss, config.optimizer, schedule, layout, skip_empty=True)
    return step, make_score_step(make_scorer(statistics), layout)


def make_policy_statistics(config: RunConfig, source: Source, layout: StateLayout, temperature: float) -> Statistics:
    """The trainer's forward pass at a temperature."""
    return make_statistics(
        source.decoder,
        temperature=temperature,
        dtype=config.model.compute_dtype,
        remat=remat_of(config),
        chunk=config.model.loss_chunk_size,
        constrain=make_constrain(layout.mesh, layout.specs),
        mesh=layout.mesh,
    )
