import numpy as np
import pytest

from r1jax import config
from r1jax.config.errors import UserError
from r1jax.experience.plan import make_generation_plan

BASE = {
    "task": "grpo", "model_name_or_path": "m", "dataset_name": "d", "num_generations": 4,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 10,
}  # fmt: skip


def make(num_prompts: int = 30, shards: int = 1, **keys):
    return make_generation_plan(config.resolve(BASE | keys).config, num_prompts, shards)


def test_a_generation_by_hand():
    """8 completions x 2 micro-batches = 16 of 4 prompts; one step uses them all, once."""
    plan = make()
    assert (plan.prompts_per_generation, plan.num_completions, plan.steps_per_generation) == (4, 16, 1)
    assert (plan.generations_per_epoch, plan.num_steps_per_epoch, plan.updates_again) == (7, 7, False)
    generation, chosen, micro_batches = plan.step(3)
    assert generation == 3 and sorted(chosen) == list(range(16)) and micro_batches.tolist() == [0] * 8 + [1] * 8


def test_every_prompt_of_an_epoch_once_and_another_order_in_the_next():
    plan = make()
    epochs = [np.concatenate([plan.prompts(7 * epoch + g) for g in range(7)]) for epoch in range(2)]
    assert all(len(set(epoch)) == 28 for epoch in epochs) and epochs[0].tolist() != epochs[1].tolist()
    assert make(shuffle_dataset=False).prompts(8).tolist() == [4, 5, 6, 7]


def test_several_steps_and_passes_on_a_generation():
    """4 slices, 2 in a step, gone through 3 times: 6 steps; slices come back in the same order, as in TRL."""
    plan = make(steps_per_generation=4, num_iterations=3)
    assert (plan.num_completions, plan.steps_per_generation, plan.updates_again) == (32, 6, True)
    chosen = [plan.step(step)[1].tolist() for step in range(6)]
    assert sorted(chosen[0] + chosen[1]) == list(range(32))
    assert chosen[0] == chosen[2] == chosen[4] and chosen[1] == chosen[3] == chosen[5]
    assert [plan.step(step)[0] for step in (5, 6)] == [0, 1]
    assert sorted(plan.step(6)[1]) != sorted(chosen[0])


def test_the_same_completions_for_one_device_and_for_eight():
    one, eight = make(per_device_train_batch_size=8), make(per_device_train_batch_size=1, shards=8)
    for step in range(3):
        assert one.step(step)[1].tolist() == eight.step(step)[1].tolist()
    assert one.fingerprint_at(1) == eight.fingerprint_at(1)


@pytest.mark.parametrize("keys", [{}, {"num_iterations": 2}, {"generation_batch_size": 24, "num_iterations": 2}])
def test_the_same_completions_in_any_micro_batches(keys):
    """16 completions a step as 8 x 2, 4 x 4 and 2 x 8, also where a step takes the end of a pass and the
    beginning of the next; only the number of a completion's micro-batch differs."""
    plans = [
        make(per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, **keys) for size in (8, 4, 2)
    ]
    assert len({plan.fingerprint_at(1) for plan in plans}) == len({plan.steps_per_generation for plan in plans}) == 1
    for step in range(8):
        assert len({(plan.step(step)[0], tuple(plan.step(step)[1])) for plan in plans}) == 1
        assert len({tuple(plan.step(step)[2]) for plan in plans}) == 3


def test_fingerprints_that_name_micro_batches_are_those_of_older_checkpoints():
    """The value that was written when fingerprints held micro-batches fast."""
    assert make().fingerprint_at(8) == "1cbed1ddb7204d04d27ea0f244839da7"
    assert make().fingerprint_at(1) != make().fingerprint_at(8)


def test_an_epoch_in_steps():
    assert make(max_steps=-1, num_train_epochs=1.5).num_steps == 11
    assert make(max_steps=-1, num_train_epochs=1, num_iterations=2).num_steps == 14


def test_the_fingerprint_is_of_the_order_and_not_of_the_length():
    assert make().fingerprint_at(1) == make(max_steps=99).fingerprint_at(1)
    assert (
        len(
            {
                make(**keys).fingerprint_at(1)
                for keys in ({}, {"seed": 1}, {"num_generations": 8}, {"shuffle_dataset": False})
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("num_prompts", "keys", "message"),
    [
        (3, {}, "dataset_name: need at least 4 prompts, those of one generation batch, got 3"),
        (
            30,
            {"steps_per_generation": 3},
            r"steps_per_generation: need a multiple of gradient_accumulation_steps \(2\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(num_prompts, keys, message):
    with pytest.raises(UserError, match=message):
        make(num_prompts, **keys)
