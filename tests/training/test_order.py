"""A checkpoint of 8 devices, and what runs on other numbers of them may go on from it."""

import re
from typing import Any

import pytest

from r1jax.config import resolve
from r1jax.config.errors import UserError
from r1jax.training.order import DataOrder, data_order

SFT = {"model_name_or_path": "m", "dataset_name": "d", "gradient_accumulation_steps": 2}
GRPO = {**SFT, "task": "grpo", "num_generations": 4, "loss_type": "dapo"}


def order(shards: int, base: dict[str, Any] = SFT, *, data: str = "data", **keys: Any) -> DataOrder:
    """That of a run with these keys, one row per device where they do not say otherwise."""
    config = resolve({"per_device_train_batch_size": 1, **base, **keys}).config
    batch, sampling = config.batch, config.sampling
    micro_batch = batch.per_device_train_batch_size * shards
    step = micro_batch * batch.gradient_accumulation_steps
    slices = sampling.steps_per_generation or batch.gradient_accumulation_steps
    generation = (sampling.generation_batch_size or micro_batch * slices) if config.run.task == "grpo" else None
    return data_order(config, shards, lambda rows: f"{data}, {step} in {rows}, {generation}", generation)


def refusal(run: DataOrder, metadata: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        run.check(metadata)
    return str(caught.value)


def set_to(line: str) -> dict[str, int]:
    """The keys that an error line says to set."""
    return {key: int(value) for key, value in re.findall(r"(\w+): (\d+)", line.partition("; set ")[2])}


@pytest.mark.parametrize(("shards", "local", "steps"), [(8, 1, 2), (4, 2, 2), (4, 1, 4), (1, 1, 16), (16, 1, 1)])
def test_a_step_of_as_many_rows_may_be_split_otherwise(shards: int, local: int, steps: int) -> None:
    moved = order(shards, per_device_train_batch_size=local, gradient_accumulation_steps=steps)
    moved.check(order(8).about())
    assert moved.about()["plan"] == order(8).about()["plan"]


@pytest.mark.parametrize(
    ("base", "then", "shards", "keys", "wanted"),
    [
        (SFT, {}, 4, {}, {"gradient_accumulation_steps": 4}),
        (SFT, {}, 1, {}, {"gradient_accumulation_steps": 16}),
        (SFT, {}, 4, {"per_device_train_batch_size": 3}, {"per_device_train_batch_size": 2}),
        (SFT, {}, 16, {"per_device_train_batch_size": 4},
         {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}),
        (SFT, {"neftune_noise_alpha": 5.0}, 4, {"gradient_accumulation_steps": 4},
         {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        (GRPO, {}, 2, {}, {"gradient_accumulation_steps": 8}),
        (GRPO, {"steps_per_generation": 4}, 4, {},
         {"gradient_accumulation_steps": 4, "steps_per_generation": 8}),
        (GRPO, {"steps_per_generation": 4}, 4, {"gradient_accumulation_steps": 4},
         {"steps_per_generation": 8}),
        (GRPO, {"generation_batch_size": 32}, 4, {"generation_batch_size": 16},
         {"gradient_accumulation_steps": 4, "generation_batch_size": 32}),
        (GRPO, {"loss_type": "bnpo"}, 4, {"gradient_accumulation_steps": 4},
         {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_the_values_that_would(
    base: dict[str, Any], then: dict[str, Any], shards: int, keys: dict[str, Any], wanted: dict[str, int]
) -> None:
    metadata = order(8, base, **then).about()
    line = refusal(order(shards, base, **{**then, **keys}), metadata)
    assert line.startswith("per_device_train_batch_size: need ") and set_to(line) == wanted
    order(shards, base, **{**then, **keys, **wanted}).check(metadata)


def test_the_lines() -> None:
    assert refusal(order(4), order(8).about()) == (
        "per_device_train_batch_size: need 16 rows a step as in the checkpoint (1 per device x 8 data shards x 2), "
        "got 8 (1 x 4 x 2); set gradient_accumulation_steps: 4"
    )
    several = {**GRPO, "steps_per_generation": 4}
    assert refusal(order(4, several), order(8, several).about()) == (
        "per_device_train_batch_size: need 16 completions a step and 32 a generation as in the checkpoint "
        "(1 per device x 8 data shards x 2), got 8 and 16 a generation (1 x 4 x 2); "
        "set gradient_accumulation_steps: 4, steps_per_generation: 8"
    )
    held = {**GRPO, "loss_type": "bnpo"}
    assert refusal(order(4, held), order(8, held).about()) == (
        "per_device_train_batch_size: need micro-batches of 8 completions as in the checkpoint (1 per device x 8 data "
        "shards), as loss_type: bnpo averages over each, got 4 (1 x 4); set per_device_train_batch_size: 2"
    )
    assert refusal(order(3), order(8).about()).endswith(
        "; use a number of data shards (mesh_data x mesh_fsdp) that divides 16"
    )
    assert refusal(order(16, held, gradient_accumulation_steps=1), order(8, held).about()).endswith("that divides 8")


def test_other_data_are_refused() -> None:
    line = refusal(order(8, data="others"), order(8).about())
    assert line.startswith("resume_from_checkpoint: need the data, lengths, packing, seed and batch size that ")


@pytest.mark.parametrize("base", [SFT, GRPO])
def test_a_checkpoint_whose_fingerprint_names_micro_batches(base: dict[str, Any]) -> None:
    """As versions wrote it that held these fast: 16 rows a step in micro-batches of 8, and nothing about the split."""
    metadata = {"plan": order(8, base).fingerprint_at(8)}
    for shards, steps in ((8, 2), (4, 4), (1, 16)):
        order(shards, base, gradient_accumulation_steps=steps).check(metadata)
    assert refusal(order(4, base), metadata).startswith("resume_from_checkpoint: need the data")
    order(1, SFT).check({})  # a model that convert has made a checkpoint of


def test_what_holds_micro_batches_holds_those_of_an_older_checkpoint_too() -> None:
    held = {**GRPO, "loss_type": "bnpo"}
    metadata = {"plan": order(8, held).fingerprint_at(8)}
    order(4, held, per_device_train_batch_size=2).check(metadata)
    assert refusal(order(4, held, gradient_accumulation_steps=4), metadata).startswith("resume_from_checkpoint: need")
