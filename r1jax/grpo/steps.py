"""The jitted programs of a run: the update, and what scores a batch."""

from r1jax.config import RunConfig
from r1jax.experience.scoring import Scorers
from r1jax.models.config import DecoderConfig
from r1jax.models.execution import Execution
from r1jax.models.support import Support
from r1jax.objectives.grpo import make_policy_loss
from r1jax.objectives.statistics import make_entropy_scorer, make_floors, make_scorer, make_statistics
from r1jax.objectives.surrogate import make_surrogate
from r1jax.optimizer import make_schedule
from r1jax.training.state import StateLayout
from r1jax.training.step import TrainStep, make_score_step, make_train_step


def make_steps(
    config: RunConfig, decoder: DecoderConfig, layout: StateLayout, how: Execution, num_steps: int
) -> tuple[TrainStep, Scorers]:
    """(the update, what scores a batch by given parameters), all jitted."""
    temperature, has_bonus = config.sampling.temperature, config.grpo.entropy.has_bonus
    statistics = make_statistics(decoder, how, temperature=temperature)
    with_slopes = make_statistics(decoder, how, temperature=temperature, entropy_gradient=True)
    loss = make_policy_loss(with_slopes if has_bonus else statistics, make_surrogate(config))
    schedule = make_schedule(config.optimizer, num_steps)
    step = make_train_step(loss, config.optimizer, schedule, layout, skip_empty=True)
    support = drawn_support(config)
    floors = make_floors(decoder, how, support, temperature=temperature)
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
