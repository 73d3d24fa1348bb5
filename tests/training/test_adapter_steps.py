"""Updates of an adapter: the weights beside it keep their bits, eight devices do what one does, and the state is small.

Loss, optimizer and tolerances are those of test_mesh.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from r1jax.config.lora import LoraConfig
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models import lora as adapters
from r1jax.models.execution import Execution
from r1jax.models.parameters import abstract_params, init_params
from r1jax.objectives.sft import make_nll
from r1jax.optimizer import make_schedule
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import make_mesh
from r1jax.training.state import StateLayout, TrainState, fresh_adapter, lay_out, start_state
from r1jax.training.step import make_eval_step, make_gradients, make_train_step

STEPS = 3
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.1)
LORA = LoraConfig(use_peft=True, lora_r=8, lora_target_modules=("all-linear",), lora_dropout=0.0)
# Of the model in conftest.py, two layers: q, k, v, o, gate, up, down as in + out of each, times the rank.
NUM_TRAINED = 2 * 8 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48))
ONE = {"mesh_fsdp": 1}
SHAPES = {
    "data2-fsdp4-zero2": ({"mesh_data": 2, "mesh_fsdp": 4}, 2),
    "fsdp4-tensor2-zero3": ({"mesh_fsdp": 4, "mesh_tensor": 2}, 3),
}


@dataclasses.dataclass(frozen=True)
class Case:
    layout: StateLayout
    loss: Any
    state: TrainState


@pytest.fixture(scope="module")
def make(decoder) -> Any:
    """(mesh keys, ZeRO stage, ...) -> the first state on that mesh, of the same numbers, and the loss."""

    def made(shape: dict[str, int], stage: int, lora: LoraConfig = LORA, dtype: str = "float32") -> Case:
        mesh = make_mesh(MeshConfig(**shape), jax.devices()[: int(np.prod(list(shape.values())))])
        layout = lay_out(decoder, OPTIMIZER, mesh, stage, lora, dtype)
        how = Execution(dtype=dtype, constrain=make_constrain(mesh, layout.specs), mesh=mesh, loss_chunk=20)
        loss = make_nll(decoder, how, adapter_dropout=lora.lora_dropout)
        base = jax.tree.map(lambda leaf: leaf.astype(dtype), init_params(decoder, jax.random.key(0)))
        frozen = adapters.with_scale(base, lora, lambda depth: adapters.scales(lora, depth))
        state = start_state(fresh_adapter(decoder, lora, 1, layout), OPTIMIZER, layout)
        return Case(layout, loss, dataclasses.replace(state, frozen=jax.device_put(frozen, layout.frozen_shardings)))

    return made


@pytest.fixture(scope="module")
def batches(packed_steps) -> list[Any]:
    return packed_steps(STEPS, 2)


def train(case: Case, batches: list[Any], seed: int | None = None) -> tuple[TrainState, list[float]]:
    step = make_train_step(case.loss, OPTIMIZER, make_schedule(OPTIMIZER, STEPS), case.layout, seed=seed)
    # The first state is donated, and may be trained from again.
    state = dataclasses.replace(jax.tree.map(jnp.copy, case.state), frozen=case.state.frozen)
    losses = []
    for batch in batches:
        state, metrics = step(state, jax.device_put(batch, case.layout.batch))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def one_device(make, batches) -> tuple[Any, list[float]]:
    """(the adapter after the last step, on the host; losses)."""
    state, losses = train(make(ONE, 0), batches)
    return jax.device_get(state.params), losses


def test_it_learns_and_the_weights_beside_it_keep_their_bits(make, batches, one_device) -> None:
    case = make(ONE, 0)
    before = jax.device_get(case.state.frozen)
    state, losses = train(case, batches)
    assert losses[-1] < 0.97 * losses[0]
    assert losses == one_device[1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen), before)
    for leaf in jax.tree.leaves(state.frozen):
        assert not leaf.is_deleted()  # it is an argument of its own, and not donated
    start = jax.device_get(case.state.params)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(start), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_eight_devices_equal_one(name: str, make, batches, one_device, decoder) -> None:
    shape, stage = SHAPES[name]
    case = make(shape, stage)
    state, losses = train(case, batches)
    np.testing.assert_allclose(losses, one_device[1], rtol=1e-5)
    for found, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(one_device[0]), strict=True):
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    # Frozen weights lie as the stage has parameters; what is trained likewise.
    whole = [
        leaf.sharding.is_fully_replicated
        for leaf in jax.tree.leaves(adapters.part_of(state.frozen, abstract_params(decoder)))
    ]
    assert not any(whole) if stage == 3 else any(whole)
    for tree, specs in (
        (state.params, case.layout.trained.params),
        (state.optimizer["mu"], case.layout.trained.moments),
    ):
        for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
            assert leaf.sharding.is_equivalent_to(jax.NamedSharding(case.layout.mesh, spec), leaf.ndim)


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def test_tensor_parallelism_splits_the_factors_where_it_splits_the_kernel(make) -> None:
    specs = make({"mesh_fsdp": 4, "mesh_tensor": 2}, 0).layout.specs.compute["layers"]
    attention, mlp = specs["attention"], specs["mlp"]
    for node in (attention["q"], attention["k"], mlp["gate"]):
        assert (node["lora_a"], node["lora_b"]) == (PartitionSpec(), PartitionSpec(None, None, "tensor"))
    for node in (attention["o"], mlp["down"]):
        assert (node["lora_a"], node["lora_b"]) == (PartitionSpec(None, "tensor"), PartitionSpec())


def test_the_state_is_the_adapters(make, decoder) -> None:
    state = make(ONE, 0).state
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in state.as_dict().items()}
    assert sizes == {"params": NUM_TRAINED, "optimizer": 2 * NUM_TRAINED + 1, "step": 1}
    assert adapters.num_parameters(decoder, LORA) == NUM_TRAINED
    assert set(state.as_dict()) == {"params", "optimizer", "step"}


def test_in_bfloat16_the_weights_beside_it_take_two_bytes_and_it_takes_four(make, batches, decoder) -> None:
    case = make(ONE, 0, dtype="bfloat16")
    base = adapters.part_of(case.state.frozen, abstract_params(decoder))
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    state, losses = train(case, batches)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert losses[-1] < losses[0]


def test_no_gradient_of_a_frozen_matrix_is_computed(make, batches, decoder) -> None:
    """The program holds what the mathematics needs: a third of full training's products is gone."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), batches[0])
    few = LoraConfig(use_peft=True, lora_r=1, lora_target_modules=("v_proj",), lora_dropout=0.0)
    case = make(ONE, 0, few)
    full = lay_out(decoder, OPTIMIZER, case.layout.mesh, 0)
    whole_loss = make_nll(decoder, Execution(constrain=make_constrain(full.mesh, full.specs), mesh=full.mesh))
    constrain = make_constrain(full.mesh, case.layout.specs)
    loss = make_nll(decoder, Execution(constrain=constrain, mesh=full.mesh))

    def flops(layout: StateLayout, loss: Any) -> float:
        gradients = make_gradients(loss, layout)
        program = jax.jit(lambda params, batch, frozen: gradients(params, batch, None, frozen))
        analysis = program.lower(layout.abstract.params, shapes, layout.frozen).compile().cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    # Per token, a scan's body counted once: dW of a layer's seven kernels and of the output projection.
    saved = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 64 * 32)
    factors = 6 * (32 + 16)
    tokens = shapes.tokens.size
    assert flops(full, whole_loss) - flops(case.layout, loss) == pytest.approx((saved - factors) * tokens, rel=0.1)


def test_dropout_follows_seed_and_step_and_evaluation_has_none(make, batches) -> None:
    case = make(ONE, 0, dataclasses.replace(LORA, lora_dropout=0.3))
    one, again, other = (train(case, batches, seed)[1] for seed in (1, 1, 2))
    assert one == again
    # B is 0 at first, so the first loss has nothing to drop.
    assert one[0] == other[0] and one[1:] != other[1:]
    state, _ = train(case, batches, 1)
    evaluate = make_eval_step(case.loss, case.layout)
    plain = make_eval_step(make(ONE, 0).loss, case.layout)
    batch = jax.device_put(batches[0], case.layout.batch)
    assert float(evaluate(state.model, batch)["loss"]) == float(plain(state.model, batch)["loss"])
