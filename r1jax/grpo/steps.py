"""The jitted programs of a run: the update, what scores a batch, and the forward pass that both share."""

from r1jax.config import RunConfig
from r1jax.experience.scoring import Scorers
from r1jax.models.support import Support
from r1jax.objectives.grpo import make_policy_loss
from r1jax.objectives.statistics import (
    Statistics,
    make_entropy_scorer,
    make_floors,
    make_scorer,
    make_statistics,
)
from r1jax.objectives.surrogate import make_surrogate
from r1jax.optimizer import make_schedule
from r1jax.training.execution import execution_of
from r1jax.training.source import Source
from r1jax.training.state import StateLayout
from r1jax.training.step import TrainStep, make_score_step, make_train_step


def make_steps(config: RunConfig, source: Source, layout: StateLayout, num_steps: int) -> tuple[TrainStep, Scorers]:
    """(the update, what scores a batch by given parameters), all jitted."""
    temperature = config.sampling.temperature
    statistics = make_policy_statistics(config, source, layout, temperature)
    with_slopes = make_policy_statistics(config, source, layout, temperature, entropy_gradient=True)
    loss = make_policy_loss(with_slopes if config.grpo.entropy.has_bonus else statistics, make_surrogate(config))
    schedule = make_schedule(config.optimizer, num_steps)
    step = make_train_step(loss, config.optimizer, schedule, layout, skip_empty=True)
    support = drawn_support(config)
    floors = make_floors(source.decoder, execution_of(config, source.decoder, layout), support, temperature=temperature)
    return step, Scorers(
        logprobs=make_score_step(make_scorer(statistics), layout),
        logprobs_and_entropies=make_score_step(make_entropy_scorer(statistics), layout),
        floors=None if support.is_whole else make_score_step(floors, layout),
    )


def drawn_support(config: RunConfig) -> Support:
    """What of the vocabulary completions are drawn from, where the loss can renormalise over it: a repetition penalty
    makes another distribution at each place, which it does not follow."""
    sampling = config.sampling
    if sampling.repetition_penalty != 1:
        return Support()
    return Support(top_k=sampling.top_k or 0, top_p=sampling.top_p, min_p=sampling.min_p or 0.0)


def scored_for(config: RunConfig) -> dict[str, tuple[str, bool]]:
    """Fields of a batch that are scored when its generation is made: the key that asks for each, whether it does."""
    return {
        "ref_logprobs": ("beta", bool(config.grpo.reference.beta)),
        "support_floor": ("top_p, top_k and min_p", not drawn_support(config).is_whole),
        "surrogate_weight": ("top_entropy_quantile", config.grpo.entropy.top_entropy_quantile < 1),
        "entropy_weight": ("entropy_coef and use_adaptive_entropy", config.grpo.entropy.has_bonus),
    }


def make_policy_statistics(
    config: RunConfig, source: Source, layout: StateLayout, temperature: float, *, entropy_gradient: bool = False
) -> Statistics:
    """The trainer's forward pass at a temperature."""
    how = execution_of(config, source.decoder, layout)
    return make_statistics(source.decoder, how, temperature=temperature, entropy_gradient=entropy_gradient)
