"""Eight devices do what one does, at every ZeRO stage on every shape of mesh, and hold no more than the stage says.

Learning rate 3e-3, constant, because the loss has to fall by a tenth within ten steps, and Adam's usual epsilon. Adam
divides by the root of the second moment, so where a gradient is all rounding it turns the order of a sum over devices
into a whole step; gradients of this model (mean loss over some 300 tokens) stay clear of that, and parameters agree
far below the 1e-5 asked for (4e-7 when this was written). Everything is float32 with full matrix products.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.batch import PackedBatch
from r1jax.config.optimizer import OptimizerConfig
from r1jax.optimizer import make_schedule
from r1jax.training.state import StateLayout, TrainState, fresh_params, start_state
from r1jax.training.step import make_gradients, make_train_step

STEPS, MICRO_BATCHES = 10, 2
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, lr_scheduler_type="constant", weight_decay=0.1)
FSDP, DATA_FSDP, FSDP_TENSOR = {"mesh_fsdp": 8}, {"mesh_data": 2, "mesh_fsdp": 4}, {"mesh_fsdp": 4, "mesh_tensor": 2}

# Parameters of the model in conftest.py. What tensor parallelism splits: embedding and output projection 64 x 32, and
# per layer q and o 32 x 32, k and v 32 x 16, three MLP matrices 32 x 48 and the biases of q, k and v.
SPLIT = 2 * 64 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 32 + 2 * 16)
# What it does not: the norms of the stream, of q and of k.
UNSPLIT = 32 + 2 * (2 * 32 + 2 * 8)
# What a device holds of (SPLIT, UNSPLIT): where nothing is split by ZeRO, of parameters at stage 3, of all else split.
# With data groups, parameters are whole on each of them and moments are not.
HELD = [
    (FSDP, ((1, 1), (1 / 8, 1 / 8), (1 / 8, 1 / 8))),
    (DATA_FSDP, ((1, 1), (1 / 4, 1 / 4), (1 / 8, 1 / 8))),
    (FSDP_TENSOR, ((1 / 2, 1), (1 / 8, 1 / 4), (1 / 8, 1 / 4))),
]


def promised(split, stage: int) -> dict[str, float]:
    """Bytes a device by what they are for: 4 a parameter, 4 its gradient, 8 its two moments."""
    whole, split_parameters, split_state = split
    kinds = {
        "parameters": (4, split_parameters if stage >= 3 else whole),
        "gradients": (4, split_state if stage >= 2 else whole),
        "moments": (8, split_state if stage >= 1 else whole),
    }
    return {name: size * (of[0] * SPLIT + of[1] * UNSPLIT) for name, (size, of) in kinds.items()}


CASES = [(shape, stage, promised(split, stage)) for shape, split in HELD for stage in range(4)]


@dataclasses.dataclass(frozen=True)
class Run:
    """Ten steps of one layout."""

    gradients: Any
    """Of the first step, on the devices."""
    losses: list[float]
    params: Any
    """After the last step, on the host."""
    state: TrainState
    """After the last step, on the devices."""
    compiled_step: Any
    compiled_gradients: Any


def train(layout: StateLayout, loss, first: TrainState, batches: list[PackedBatch]) -> Run:
    """The run from the given first state (host arrays)."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batches[0])
    places = layout.shardings.params, layout.batch
    gradients = jax.jit(make_gradients(loss, layout), in_shardings=places)
    compiled_gradients = gradients.lower(layout.abstract.params, shapes).compile()
    step = make_train_step(loss, OPTIMIZER, make_schedule(OPTIMIZER, STEPS), layout)
    compiled_step = step.lower(layout.abstract, shapes).compile()

    state = jax.device_put(first, layout.shardings)
    placed = [jax.device_put(batch, layout.batch) for batch in batches]
    of_first_step = compiled_gradients(state.params, placed[0])[0]
    losses = []
    for batch in placed:
        state, metrics = compiled_step(state, batch)
        losses.append(float(metrics["loss"]))
    return Run(of_first_step, losses, jax.device_get(state.params), state, compiled_step, compiled_gradients)


@pytest.fixture(scope="module")
def batches(packed_steps):
    return packed_steps(STEPS, MICRO_BATCHES)


@pytest.fixture(scope="module")
def one_device(decoder, laid_out, batches) -> tuple[TrainState, Run]:
    """The first state, on the host, and the run that all others must equal."""
    layout, loss = laid_out({"mesh_fsdp": 1}, 0, OPTIMIZER)
    first = jax.device_get(start_state(fresh_params(decoder, 0, layout), OPTIMIZER, layout))
    return first, train(layout, loss, first, batches)


def named(tree: Any) -> dict[str, Any]:
    """Leaves by path; a PartitionSpec is a leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def worst(actual: Any, expected: Any) -> tuple[float, str]:
    """The largest relative error in norm of any tensor, and which."""
    others = named(expected)
    errors = [
        (float(np.linalg.norm(leaf - others[name]) / np.linalg.norm(others[name])), name)
        for name, leaf in named(actual).items()
    ]
    return max(errors)


def assert_laid_out(shardings: Any, specs: Any, shapes: Any, layout: StateLayout) -> int:
    """The number of leaves that are split; every leaf lies as its spec says, and whole only where that says so."""
    specs_by_name, shapes_by_name = named(specs), named(shapes)
    split = 0
    for name, sharding in named(shardings).items():
        spec, shape = specs_by_name[name], shapes_by_name[name].shape
        assert sharding.is_equivalent_to(NamedSharding(layout.mesh, spec), len(shape)), (name, sharding, spec)
        assert sharding.is_fully_replicated == (spec == PartitionSpec()), (name, sharding, spec)
        split += spec != PartitionSpec()
    assert len(specs_by_name) == len(named(shardings))
    return split


def state_specs(layout: StateLayout) -> TrainState:
    """The tables as one tree: those of the parameters and, for both moments, those of the moments."""
    moments = layout.specs.moments
    optimizer = {"mu": moments, "nu": moments, "count": PartitionSpec()}
    return TrainState(params=layout.specs.params, optimizer=optimizer, step=PartitionSpec())


def cut(shape: tuple[int, ...], spec: PartitionSpec, mesh) -> tuple[int, ...]:
    """The shape that a device holds of an array."""
    axes = [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    axes += [()] * (len(shape) - len(axes))
    counts = [int(np.prod([mesh.shape[axis] for axis in names])) for names in axes]
    return tuple(size // count for size, count in zip(shape, counts, strict=True))


def bytes_by_device(tree: Any) -> dict[Any, int]:
    """Bytes of live arrays on each device."""
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held


def test_the_reference_learns(one_device):
    losses = one_device[1].losses
    assert len(losses) == STEPS
    assert losses[-1] <= 0.9 * losses[0]


@pytest.mark.parametrize(
    ("shape", "stage", "promised"),
    [
        pytest.param(
            *case,
            id=f"{'-'.join(f'{k[5:]}{v}' for k, v in case[0].items())}-zero{case[1]}",
            # Each shape and each stage in the quick suite; all of them together at night.
            marks=() if number % 5 == 0 or number == 7 else pytest.mark.slow,
        )
        for number, case in enumerate(CASES)
    ],
)
def test_eight_devices_equal_one(decoder, laid_out, batches, one_device, shape, stage, promised):
    first, reference = one_device
    layout, loss = laid_out(shape, stage, OPTIMIZER)
    run = train(layout, loss, first, batches)

    np.testing.assert_allclose(run.losses, reference.losses, rtol=1e-5)
    assert worst(jax.device_get(run.gradients), jax.device_get(reference.gradients)) <= (1e-5, "")
    assert worst(run.params, reference.params) <= (1e-5, "")

    # What the compiler made of it: state in and out, gradients as they are accumulated.
    specs, abstract = state_specs(layout), layout.abstract
    (state_in, batch_in), _ = run.compiled_step.input_shardings
    num_leaves = len(jax.tree.leaves(abstract.params))
    num_split = {0: 0, 1: 2, 2: 2, 3: 3}[stage] * num_leaves
    for shardings in (state_in, run.compiled_step.output_shardings[0]):
        split = assert_laid_out(shardings, specs, abstract, layout)
        assert split == num_split or (stage < 3 and "mesh_tensor" in shape and split > num_split)
    assert all(leaf.is_equivalent_to(layout.batch, 3) for leaf in jax.tree.leaves(batch_in))
    gradients_out = run.compiled_gradients.output_shardings[0]
    split = assert_laid_out(gradients_out, layout.specs.gradients, abstract.params, layout)
    assert split == num_leaves or stage < 2

    # What is really there after ten steps.
    spec_of = named(specs)
    for name, leaf in named(run.state).items():
        for shard in leaf.addressable_shards:
            assert shard.data.shape == cut(leaf.shape, spec_of[name], layout.mesh), name
    moments = {name: run.state.optimizer[name] for name in ("mu", "nu")}
    live = {"parameters": run.state.params, "gradients": run.gradients, "moments": moments}
    for kind, tree in live.items():
        assert bytes_by_device(tree) == dict.fromkeys(jax.devices(), promised[kind]), kind
