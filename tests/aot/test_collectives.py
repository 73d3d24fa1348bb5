"""The reader of HLO, on small programs in the forms that the TPU compiler writes and on one that the CPU runs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r1jax.config.mesh import MeshConfig
from r1jax.sharding.mesh import make_mesh
from tests.aot.collectives import bytes_of, collectives

LOOPS = """
%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[8,8] {
  %all-reduce.9 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups=[1,8]<=[8]
  ROOT %dynamic-slice.1 = bf16[8,8]{1,0} dynamic-slice(%all-reduce.9, %a, %b), dynamic_slice_sizes={8,8}
}

%piece.1 (p: f32[8]) -> f32[64] {
  ROOT %all-gather.1 = f32[64]{0:T(128)S(1)} all-gather(%p), channel_id=6, replica_groups=[1,8]<=[8], chain_id="2"
}

%piece.2 (p: f32[8]) -> f32[64] {
  ROOT %all-gather.2 = f32[64]{0:T(128)} all-gather(%p), channel_id=6, replica_groups=[1,8]<=[8], chain_id="2"
}

%windowed_dot_general_body_rs.clone (p: (bf16[2,4])) -> (bf16[2,4]) {
  %collective-permute.1 = bf16[2,4]{1,0} collective-permute(%p), channel_id=7, source_target_pairs={{0,1},{1,7},{7,0}}
}

%ring_condition (p: (bf16[2,4])) -> pred[] {
  %constant.3 = u32[]{:T(128)} constant(8)
  ROOT %compare.2 = pred[] compare(%p, %constant.3), direction=LT
}

%layer (p: (f32[8])) -> (f32[8]) {
  %a = f32[64] fusion(%p), kind=kCustom, calls=%piece.1
  %b = f32[64] fusion(%p), kind=kCustom, calls=%piece.2
  %c = bf16[8,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %d = (bf16[2,4]) while(%p), condition=%ring_condition, body=%windowed_dot_general_body_rs.clone
}

%condition (p: (f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(4)
  ROOT %compare.1 = pred[] compare(%p, %constant.1), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (f32[8]) while(%p), condition=%condition, body=%layer
  ROOT %all-reduce.1 = (f32[], f32[8]{0}) all-reduce(%x, %y), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}
}
"""


def entry(line: str) -> str:
    return f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  ROOT %{line}, channel_id=1\n}}\n"


@pytest.fixture(scope="module")
def fsdp():
    return make_mesh(MeshConfig(mesh_fsdp=8))


@pytest.fixture(scope="module")
def cube():
    """Device 4 d + 2 f + t stands at (d, f, 0, t)."""
    return make_mesh(MeshConfig(mesh_data=2, mesh_fsdp=2, mesh_tensor=2))


def test_what_the_compiler_hides(fsdp):
    """A fused reduce-scatter, a collective in two pieces, a ring, and the turns of the loop around them."""
    found = {(one.kind, one.shapes): (one.times, one.depth, one.num_bytes) for one in collectives(LOOPS, fsdp)}
    assert found == {
        ("reduce-scatter", ("bf16[64,8]",)): (4, 1, 1024),
        ("all-gather", ("f32[64]",)): (4, 1, 256),
        ("reduce-scatter", ("bf16[8,2,4]",)): (4, 1, 128),
        ("all-reduce", ("f32[]", "f32[8]")): (1, 0, 36),
    }
    assert {one.axes for one in collectives(LOOPS, fsdp)} == {("fsdp",)}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("replica_groups={{0,4,2,6},{1,5,3,7}}", ("data", "fsdp")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp", "tensor")),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_1'}", ("fsdp",)),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", ("fsdp",)),
    ],
)
def test_groups_as_mesh_axes(cube, groups, axes):
    kind = "collective-permute" if groups.startswith("source") else "all-reduce"
    (one,) = collectives(entry(f"x = f32[8]{{0}} {kind}(%p), {groups}"), cube)
    assert one.axes == axes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x = f32[8] all-reduce(%p), replica_groups={{0,3},{1,2},{4,7},{5,6}}", "no mesh axes"),
        ("x = f32[8] all-reduce(%p), replica_groups=everyone", "a form that this reader does not know"),
        ("x = (f32[8], f32[8]) all-gather-start(%p), replica_groups={{0,1}}", "all-gather-start"),
    ],
)
def test_what_it_cannot_read_it_says(cube, line, message):
    with pytest.raises(ValueError, match=message):
        collectives(entry(line), cube)


def test_a_program_that_runs(fsdp):
    """A sharded vector is gathered whole: one all-gather of its bytes."""
    cut, whole = (NamedSharding(fsdp, spec) for spec in (P("fsdp"), P()))
    gather = jax.jit(lambda x: x, in_shardings=cut, out_shardings=whole)
    text = gather.lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile().as_text()
    assert text is not None
    (one,) = collectives(text, fsdp)
    assert (one.kind, one.axes, one.shapes, one.times) == ("all-gather", ("fsdp",), ("f32[64,16]",), 1)


def test_bytes():
    assert (bytes_of("bf16[4,3]"), bytes_of("f32[]"), bytes_of("pred[5]")) == (24, 4, 5)
