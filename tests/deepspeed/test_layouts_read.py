"""The rarer layouts of ZeRO's files, read to the last bit: torch made the files, and padding in them is no number."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r1jax.config.errors import UserError
from r1jax.deepspeed.checkpoint import ZeroCheckpoint, open_checkpoint
from r1jax.deepspeed.zero_layout import KINDS
from tests.deepspeed.sources import HEAD, SHAPES, array
from tests.deepspeed.torch_made import GROUPS, STEP, Layout, padded, save_model, save_ranks, trained

LAYOUTS = [Layout(stage=stage, world_size=world_size) for stage in (1, 2, 3) for world_size in (1, 2, 3)]
EMBEDDING = "model.embed_tokens.weight"


def check_trained(opened: ZeroCheckpoint, layout: Layout) -> None:
    """Every trained parameter's three kinds, whole and in parts that begin anywhere."""
    names = [name for group in layout.groups for name in group]
    assert [name for name in opened.parameters if name not in opened.frozen] == names
    for name, kind in itertools.product(names, KINDS):
        expected = array(name, kind, layout.shapes[name])
        np.testing.assert_array_equal(opened.read(name, kind).view("u4"), expected.view("u4"), strict=True)
        middle = expected.size // 2
        np.testing.assert_array_equal(
            opened.read_slice(name, kind, middle, expected.size), expected.reshape(-1)[middle:]
        )
    assert (opened.stage, opened.world_size, opened.step) == (layout.stage, layout.world_size, STEP)


@pytest.mark.parametrize("layout", LAYOUTS, ids=[f"z{layout.stage}-ws{layout.world_size}" for layout in LAYOUTS])
def test_the_plain_layout_of_the_same_making_is_read(tmp_path: Path, layout: Layout):
    for rank in range(layout.world_size if layout.stage == 3 else 1):
        save_model(tmp_path, layout, trained(layout), rank=rank)
    save_ranks(tmp_path, layout)
    opened = open_checkpoint(tmp_path)
    check_trained(opened, layout)
    assert [group.names for group in opened.groups] == list(GROUPS) and opened.frozen == ()


def frozen_parts(layout: Layout, name: str) -> list[torch.Tensor]:
    """A frozen parameter in the model's dtype as each model_states has it, and as it is read."""
    whole = torch.from_numpy(array(name, "fp32", SHAPES[name])).bfloat16()
    shards = padded(whole.float().reshape(-1), layout.world_size).bfloat16().tensor_split(layout.world_size)
    return [shard.clone() for shard in shards] if layout.stage == 3 else [whole]


@pytest.mark.parametrize("layout", LAYOUTS, ids=[f"z{layout.stage}-ws{layout.world_size}" for layout in LAYOUTS])
def test_frozen_parameters_are_read_from_where_their_stage_has_them(tmp_path: Path, layout: Layout):
    """Stage 1 has them in the module alone, among the buffers; 2 whole beside it; 3 a shard in each rank's file."""
    frozen = (EMBEDDING, "model.norm.weight")
    groups = [[name for name in group if name not in frozen] for group in GROUPS]
    layout = Layout(stage=layout.stage, world_size=layout.world_size, groups=groups)
    parts = {name: frozen_parts(layout, name) for name in frozen}
    buffer = {"model.rotary.inv_freq": torch.ones(3)}
    for rank in range(layout.world_size if layout.stage == 3 else 1):
        own: dict[str, Any] = {name: parts[name][rank] for name in frozen}
        whole = own if layout.stage < 3 else {name: torch.empty(0, dtype=torch.bfloat16) for name in frozen}
        shapes = {name: torch.Size(SHAPES[name]) for name in frozen}
        kept = {} if layout.stage == 1 else {"frozen_param_shapes": shapes, "frozen_param_fragments": own}
        # The head is the frozen embedding.
        module = whole | trained(layout) | buffer | {HEAD: whole[EMBEDDING]}
        shared = {HEAD: EMBEDDING} if rank == 0 else {}
        save_model(tmp_path, layout, module, rank=rank, buffer_names=list(buffer), shared_params=shared, **kept)
    save_ranks(tmp_path, layout)
    opened = open_checkpoint(tmp_path)
    check_trained(opened, layout)
    assert opened.frozen == frozen and opened.tied == {HEAD: EMBEDDING} and opened.dtype == "bfloat16"
    for name in (*frozen, HEAD):
        expected = torch.from_numpy(array(opened.tied.get(name, name), "fp32", SHAPES[opened.tied.get(name, name)]))
        np.testing.assert_array_equal(opened.read(name, "fp32"), expected.bfloat16().float().numpy(), strict=True)
        with pytest.raises(KeyError, match="is frozen"):
            opened.read(name, "exp_avg")
    assert opened.not_carried == ("buffer 'model.rotary.inv_freq'",)


def test_a_frozen_parameter_in_too_few_elements_is_refused(tmp_path: Path):
    layout = Layout(stage=3, world_size=2, groups=[[name for name in GROUPS[0] if name != EMBEDDING], GROUPS[1]])
    for rank, part in enumerate(frozen_parts(layout, EMBEDDING)):
        kept = {EMBEDDING: part[: 28 - 2 * rank].clone()}
        shapes = {EMBEDDING: torch.Size(SHAPES[EMBEDDING])}
        save_model(
            tmp_path, layout, trained(layout), rank=rank, frozen_param_shapes=shapes, frozen_param_fragments=kept
        )
    save_ranks(tmp_path, layout)
    with pytest.raises(UserError, match=f"the frozen parameter '{EMBEDDING}' in fewer elements than its shape has"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("align", [4, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_padding_between_parameters_is_left_out(tmp_path: Path, world_size: int, align: int):
    """`parameter_alignment`: what is 16 bytes of float32 and of bfloat16."""
    layout = Layout(stage=2, world_size=world_size, align=align)
    # Of 55, 25 and 35 elements.
    assert layout.gaps(GROUPS[0]) == {4: [1, 3, 0], 8: [1, 7, 0]}[align]
    save_model(tmp_path, layout, trained(layout))
    save_ranks(tmp_path, layout)
    check_trained(open_checkpoint(tmp_path), layout)


def test_ranks_that_pad_otherwise_are_refused(tmp_path: Path):
    layout = Layout(stage=2, world_size=2, align=8)
    save_model(tmp_path, layout, trained(layout))
    save_ranks(tmp_path, layout)
    other = Layout(stage=2, world_size=2, align=4)
    save_ranks(tmp_path / "other", other)
    path = tmp_path / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    with pytest.raises(UserError, match=f" in {path}, got other paddings than in rank 0's"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_order_is_that_of_param_shapes(tmp_path: Path, world_size: int):
    """round_robin_gradients deals parameters out to the ranks; param_slice_mappings then has the order of before."""
    before = list(SHAPES)
    dealt = [name for first in range(world_size) for name in before[first::world_size]]
    assert dealt != before
    layout = Layout(stage=2, world_size=world_size, groups=[dealt])
    save_model(tmp_path, layout, trained(layout))
    ends = itertools.accumulate(int(np.prod(SHAPES[name])) for name in before)
    save_ranks(tmp_path, layout, param_slice_mappings=[dict(zip(before, ends, strict=True))])
    check_trained(open_checkpoint(tmp_path), layout)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_elastic_files_have_states_without_padding_and_settings(tmp_path: Path, stage: int, world_size: int):
    layout = Layout(stage=stage, world_size=world_size)
    save_model(tmp_path, layout, trained(layout))
    save_ranks(tmp_path, layout, elastic=True)
    opened = open_checkpoint(tmp_path)
    check_trained(opened, layout)
    assert [group.names for group in opened.groups] == list(GROUPS)
    assert [group.settings for group in opened.groups] == [{}, {}]


@pytest.mark.parametrize("world_size", [1, 3])
def test_files_that_do_not_name_their_stage_are_stage_1(tmp_path: Path, world_size: int):
    """Those of DeepSpeed's optimizer for bfloat16 with gradients in float32."""
    layout = Layout(stage=1, world_size=world_size)
    save_model(tmp_path, layout, trained(layout))
    save_ranks(tmp_path, layout, lacks=("zero_stage", "loss_scaler", "overflow", "param_alignment_paddings"))
    check_trained(open_checkpoint(tmp_path), layout)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sub_groups_are_joined_to_their_groups(tmp_path: Path, world_size: int):
    """Stage 3; one group in three buffers, the other in two; tied, of which rank 0 alone knows."""
    groups = [GROUPS[0][:1], GROUPS[0][1:2], GROUPS[0][2:], GROUPS[1][:2], GROUPS[1][2:]]
    layout = Layout(stage=3, world_size=world_size, groups=groups, param_groups=[[0, 1, 2], [3, 4]])
    for rank in range(world_size):
        module = trained(layout) | {HEAD: torch.empty(0, dtype=torch.bfloat16)}
        save_model(tmp_path, layout, module, rank=rank, shared_params={HEAD: EMBEDDING} if rank == 0 else {})
    save_ranks(tmp_path, layout)
    opened = open_checkpoint(tmp_path)
    check_trained(opened, layout)
    assert [group.names for group in opened.groups] == list(GROUPS)
    assert [group.settings["lr"] for group in opened.groups] == [0.0, 0.1]
    np.testing.assert_array_equal(opened.read(HEAD, "exp_avg"), array(EMBEDDING, "exp_avg", SHAPES[EMBEDDING]))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_parameter_of_no_elements_is_read(tmp_path: Path, stage: int):
    shapes = SHAPES | {"empty": (0, 3)}
    layout = Layout(
        stage=stage, world_size=2, groups=[(*GROUPS[0][:2], "empty", *GROUPS[0][2:]), GROUPS[1]], shapes=shapes
    )
    for rank in range(2 if stage == 3 else 1):
        save_model(tmp_path, layout, trained(layout), rank=rank)
    save_ranks(tmp_path, layout)
    check_trained(open_checkpoint(tmp_path), layout)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_shape_that_no_array_has_is_refused(tmp_path: Path, stage: int):
    """A shape of no elements fits any buffer."""
    layout = Layout(
        stage=stage, world_size=1, shapes=SHAPES | {"empty": (0,)}, groups=[GROUPS[0], ("empty", *GROUPS[1])]
    )
    shapes = [{name: layout.shapes[name] for name in group} for group in layout.groups]
    shapes[1]["empty"] = (0, 1 << 62)
    save_model(tmp_path, layout, trained(layout), param_shapes=shapes)
    save_ranks(tmp_path, layout)
    with pytest.raises(UserError, match="a shape with something else than counts"):
        open_checkpoint(tmp_path)
    shapes[1]["empty"] = (0, 1 << 40, 1 << 40)
    save_model(tmp_path, layout, trained(layout), param_shapes=shapes)
    with pytest.raises(UserError, match="a shape of more elements than there can be"):
        open_checkpoint(tmp_path)
