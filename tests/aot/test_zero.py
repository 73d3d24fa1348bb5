"""What the TPU compiler makes of each ZeRO stage: which collectives over which axis, and memory on each device.

Only arrays of the size of a matrix are looked at (BIG); norm scales and sums of scalars are left out. Gradients are
summed in bfloat16, the compute dtype; the output kernel's float32 sum over chunks of tokens stays float32.
"""

import dataclasses
import functools

import jax
import pytest
from jax.sharding import PartitionSpec

from r1jax.sharding.constraints import make_constrain
from tests.aot.collectives import Collective, bytes_of, collectives
from tests.aot.steps import DECODER, MICRO_BATCHES, Compiled, compile_step, layout_of

pytestmark = pytest.mark.aot

D, F, V, L = DECODER.hidden_size, DECODER.intermediate_size, DECODER.vocab_size, DECODER.num_layers
LAYER = 2 * D * 512 + 2 * D * 256 + 3 * D * F
"""Parameters of a layer's seven matrices: q and o, k and v, the MLP."""
PARAMETERS = L * (LAYER + 2 * D) + V * D + D
BIG = 2**16
FSDP_8, FSDP_32 = ({"mesh_fsdp": 8}, 8), ({"mesh_fsdp": 32}, 32)
DATA_FSDP, FSDP_TENSOR = ({"mesh_data": 4, "mesh_fsdp": 8}, 32), ({"mesh_fsdp": 4, "mesh_tensor": 2}, 8)
MESHES = pytest.mark.parametrize("mesh", [FSDP_8, FSDP_32], ids=["8", "32"])
FSDP_ONLY = ("fsdp",)
TURNS = MICRO_BATCHES * L


@pytest.fixture(scope="module", autouse=True)
def no_compilation_cache():
    """What was compiled for absent devices cannot be read back from the cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@functools.cache
def _compiled(keys: tuple[tuple[str, int], ...], num_devices: int, stage: int) -> Compiled:
    return compile_step(layout_of(dict(keys), stage, num_devices))


def compiled(mesh: tuple[dict[str, int], int], stage: int) -> Compiled:
    """The step on this mesh; each is compiled once."""
    return _compiled(tuple(mesh[0].items()), mesh[1], stage)


def big(step: Compiled, kind: str) -> list[Collective]:
    """The collectives of this kind, without the arrays smaller than BIG."""
    found = []
    for one in collectives(step.text, step.mesh):
        shapes = tuple(shape for shape in one.shapes if bytes_of(shape) >= BIG)
        if shapes and one.kind == kind:
            found.append(dataclasses.replace(one, shapes=shapes))
    return found


def in_layers(found: list[Collective]) -> list[Collective]:
    """Those in the loop over layers, which stands in the loop over micro-batches."""
    return [one for one in found if one.depth == 2]


def outside(found: list[Collective]) -> list[Collective]:
    return [one for one in found if one.depth < 2]


def total(found: list[Collective]) -> int:
    assert all(one.axes == FSDP_ONLY for one in found)
    return sum(one.total_bytes for one in found)


def assert_parameters_are_gathered_after_the_update(step: Compiled) -> None:
    """Once, in float32, every matrix."""
    gathers = big(step, "all-gather")
    assert {(one.depth, one.times) for one in gathers} == {(0, 1)}
    assert total(gathers) == 4 * (L * LAYER + V * D)


def assert_layer_gradients_are_reduce_scattered(step: Compiled) -> None:
    """Those of every layer, each micro-batch; no gradient is summed whole anywhere."""
    found = in_layers(big(step, "reduce-scatter"))
    assert {one.times for one in found} == {TURNS}
    assert total(found) == 2 * TURNS * LAYER
    assert big(step, "all-reduce") == []


def assert_embedding_gradients_are_reduce_scattered(step: Compiled) -> None:
    """That of the lookup in bfloat16, that of the output kernel in float32."""
    found = outside(big(step, "reduce-scatter"))
    assert {one.times for one in found} == {MICRO_BATCHES}
    assert total(found) == (2 + 4) * MICRO_BATCHES * V * D


@MESHES
def test_stage_0_sums_whole_gradients_and_gathers_nothing(mesh):
    step = compiled(mesh, 0)
    assert big(step, "all-gather") == big(step, "reduce-scatter") == []
    summed = big(step, "all-reduce")
    assert {one.times for one in in_layers(summed)} == {TURNS}
    assert total(in_layers(summed)) == 2 * TURNS * LAYER
    assert total(outside(summed)) >= 2 * MICRO_BATCHES * V * D


@MESHES
def test_stage_1_sums_whole_gradients_and_gathers_parameters_after_the_update(mesh):
    step = compiled(mesh, 1)
    assert in_layers(big(step, "reduce-scatter")) == []
    assert total(in_layers(big(step, "all-reduce"))) == 2 * TURNS * LAYER
    assert_parameters_are_gathered_after_the_update(step)


@MESHES
def test_stage_2_reduce_scatters_gradients_and_gathers_parameters_after_the_update(mesh):
    step = compiled(mesh, 2)
    assert_layer_gradients_are_reduce_scattered(step)
    assert_embedding_gradients_are_reduce_scattered(step)
    assert_parameters_are_gathered_after_the_update(step)


@MESHES
def test_stage_3_gathers_a_layer_at_a_time(mesh):
    """Forward and again backward, in the compute dtype; the tied embedding once a step for both its uses."""
    step = compiled(mesh, 3)
    assert_layer_gradients_are_reduce_scattered(step)
    assert_embedding_gradients_are_reduce_scattered(step)
    gathers = big(step, "all-gather")
    assert {one.times for one in in_layers(gathers)} == {TURNS}
    assert total(in_layers(gathers)) == 2 * 2 * TURNS * LAYER
    assert {shape for one in outside(gathers) for shape in one.shapes} == {f"bf16[{V},{D}]"}
    assert not any(shape.startswith(("f32", f"bf16[{L},")) for one in gathers for shape in one.shapes)


def test_stage_3_gathers_over_fsdp_and_scatters_over_data_too():
    step = compiled(DATA_FSDP, 3)
    gathers, scatters = big(step, "all-gather"), big(step, "reduce-scatter")
    assert {one.axes for one in in_layers(gathers)} == {FSDP_ONLY}
    assert sum(one.total_bytes for one in in_layers(gathers)) == 2 * 2 * TURNS * LAYER
    assert {one.axes for one in scatters} == {("data", "fsdp")}
    assert sum(one.total_bytes for one in in_layers(scatters)) == 2 * TURNS * LAYER
    assert big(step, "all-reduce") == []
    # After the update each data group's quarter of a device's own parameters comes back, and never more.
    after = [one for one in gathers if one.depth == 0 and one.axes == ("data",)]
    assert sum(one.total_bytes for one in after) == 4 * (L * LAYER + V * D) // 8


def test_tensor_parallel_matrices_are_gathered_over_fsdp_only():
    """A device gathers its half of each matrix; the stream is summed over tensor. Gradients are scattered where the
    first dimension is fsdp's: not those of o and down (docs/zero.md)."""
    step = compiled(FSDP_TENSOR, 3)
    gathers = in_layers(big(step, "all-gather"))
    assert total(gathers) == 2 * 2 * TURNS * LAYER // 2
    scattered = in_layers(big(step, "reduce-scatter"))
    assert total(scattered) >= 2 * TURNS * (LAYER - D * D - F * D) // 2
    summed = in_layers(big(step, "all-reduce"))
    assert ("tensor",) in {one.axes for one in summed}
    assert {one.axes for one in summed + scattered} <= {("tensor",), FSDP_ONLY}


@MESHES
@pytest.mark.parametrize("stage", range(4))
def test_state_on_each_device(mesh, stage):
    """4 bytes a parameter and 8 for its moments, by what the stage splits; within 1 % for padding and the batch."""
    shards = mesh[1]
    promised = {0: 12, 1: 4 + 8 / shards, 2: 4 + 8 / shards, 3: 12 / shards}[stage] * PARAMETERS
    assert promised <= compiled(mesh, stage).argument_bytes <= 1.01 * promised


@MESHES
def test_accumulated_gradients_are_whole_at_stage_0_only(mesh):
    """Two micro-batches are summed in float32, 4 bytes a parameter."""
    temporary = [compiled(mesh, stage).temporary_bytes for stage in range(4)]
    assert temporary[0] > 4 * PARAMETERS
    assert max(temporary[2:]) < 4 * PARAMETERS


def test_control_a_table_that_leaves_gradients_whole_is_found_out():
    """Stage 2 with stage 0's entry for gradients: the checks of stage 2 fail."""
    layout = layout_of(FSDP_8[0], 2, FSDP_8[1])
    assert PartitionSpec() != layout.specs.gradients["layers"]["mlp"]["up"]["kernel"]
    wrong = dataclasses.replace(layout, specs=dataclasses.replace(layout.specs, gradients=layout.specs.compute))
    step = compile_step(wrong)
    with pytest.raises(AssertionError):
        assert_layer_gradients_are_reduce_scattered(step)
    assert in_layers(big(step, "reduce-scatter")) == []


def test_control_a_lookup_that_is_not_pinned_gathers_every_device_s_tokens():
    """Why `constrain` has the kind "lookup": without it the stream's gradient is gathered whole onto each device."""
    layout = layout_of(FSDP_8[0], 3, FSDP_8[1])
    constrain = make_constrain(layout.mesh, layout.specs)
    step = compile_step(layout, lambda kind, tree: tree if kind == "lookup" else constrain(kind, tree))
    with pytest.raises(AssertionError):
        assert_embedding_gradients_are_reduce_scattered(step)
    rows, length = step.batch.tokens.shape[1:]
    gathered = {shape for one in big(step, "all-gather") for shape in one.shapes}
    assert f"bf16[{rows},{length},{D}]" in gathered
