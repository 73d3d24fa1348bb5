"""GRPO's generation batch, by the numbers of open-r1's recipes."""

import pytest

from r1jax.config.batch import BatchConfig
from r1jax.config.errors import UserError
from r1jax.config.geometry import generation_batch_size
from r1jax.config.sampling import SamplingConfig

CODE = BatchConfig(per_device_train_batch_size=16, gradient_accumulation_steps=4)


def test_accumulation_decides_unless_steps_per_generation_is_given():
    assert generation_batch_size(CODE, SamplingConfig(num_generations=14), 7) == 448
    assert generation_batch_size(CODE, SamplingConfig(num_generations=16, steps_per_generation=1), 8) == 128
    assert generation_batch_size(CODE, SamplingConfig(num_generations=16, generation_batch_size=256), 8) == 256


def test_groups_that_do_not_fit_the_counted_devices_are_refused():
    with pytest.raises(UserError, match=r"^num_generations: need a divisor of the 512 completions .* got 14; "):
        generation_batch_size(CODE, SamplingConfig(num_generations=14), 8)
