"""How GRPO's generation batch divides into prompts and micro-batches (TRL's geometry)."""

from r1jax.config.batch import BatchConfig
from r1jax.config.errors import require
from r1jax.config.sampling import SamplingConfig


def check_generation_batch(batch: BatchConfig, sampling: SamplingConfig, data_shards: int | None) -> None:
    """Nothing, or the UserError when whole groups or whole micro-batches do not fit.

    `data_shards` is None while the number of devices is unknown: then only what holds for every number is checked, and
    `generation_batch_size` checks the rest once devices are counted.
    """
    if data_shards is not None:
        generation_batch_size(batch, sampling, data_shards)
        return
    given, group, local = sampling.generation_batch_size, sampling.num_generations, batch.per_device_train_batch_size
    if given is None:
        return
    _check_groups("generation_batch_size", given, group)
    rule = f"a multiple of per_device_train_batch_size ({local})"
    require(given % local == 0, "generation_batch_size", rule, given, "change one of the two")


def generation_batch_size(batch: BatchConfig, sampling: SamplingConfig, data_shards: int) -> int:
    """Completions generated at a time over all shards: B x W x S, or as given; a multiple of num_generations."""
    group, local = sampling.num_generations, batch.per_device_train_batch_size
    given = sampling.generation_batch_size
    if given is not None:
        _check_groups("generation_batch_size", given, group)
        rule = f"a multiple of per_device_train_batch_size x data shards ({local} x {data_shards})"
        require(given % (local * data_shards) == 0, "generation_batch_size", rule, given, "change one of them")
        return given
    slices = sampling.steps_per_generation or batch.gradient_accumulation_steps
    total = local * data_shards * slices
    rule = f"a divisor of the {total} completions of a generation batch ({local} per device x {data_shards} x {slices})"
    factor = "gradient_accumulation_steps" if sampling.steps_per_generation is None else "steps_per_generation"
    advice = f"change it, per_device_train_batch_size or {factor}"
    require(total % group == 0, "num_generations", rule, group, advice)
    return total


def _check_groups(field: str, size: int, group: int) -> None:
    rule = f"a multiple of num_generations ({group})"
    require(size % group == 0, field, rule, size, "a group of completions is never split over two batches")
