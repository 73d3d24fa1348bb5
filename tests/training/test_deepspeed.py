"""A run goes on from a DeepSpeed checkpoint: state, settings, schedule and losses are those that the engine had."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from r1jax.batch import PackedBatch
from r1jax.checkpoints.orbax import FOLDER, Checkpoints
from r1jax.config import RunConfig, resolve
from r1jax.config.errors import UserError
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.data.batches import build_batch
from r1jax.data.packing import make_plan
from r1jax.data.tokenized import TokenizedRows
from r1jax.deepspeed.saved import ParameterGroup, Saved, Scheduler, from_json
from r1jax.models.execution import Execution
from r1jax.models.families import decoder_config
from r1jax.models.hf_tensors import hf_tensors
from r1jax.objectives.reductions import token_mean
from r1jax.objectives.sft import make_nll
from r1jax.optimizer import make_schedule
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import make_mesh
from r1jax.training.carried import carry_over, check_rate, settings_of
from r1jax.training.deepspeed import DEEPSPEED, PLACES
from r1jax.training.order import data_order
from r1jax.training.resume import Start, find_start, restore
from r1jax.training.state import StateLayout, lay_out
from r1jax.training.step import make_train_step

FLOAT32 = ("llama_z1_ws2_fp32", "qwen2_odd_z2_ws3_fp32", "qwen2_odd_z3_ws4_fp32", "qwen2_z3_ws2_fp32")
BFLOAT16 = ("qwen2_tied_z3_ws2_bf16", "qwen2_z2_ws2_bf16")
ROWS, LENGTH = 12, 16
ORDER = data_order(resolve({"model_name_or_path": "m", "dataset_name": "d"}).config, 1, lambda rows: "plan")


class Fixture:
    """A checkpoint of the real engine's, what it held, and the engine's next losses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference: dict[str, Any] = json.loads((folder / "reference.json").read_text())
        self.decoder = decoder_config(self.reference["hf_config"])
        self.arrays = load_file(folder / "reference.safetensors")

    def batch(self, step: int) -> PackedBatch:
        """The rows that the engine took at that step, whole ones."""
        generator = torch.Generator().manual_seed(1000 + step % 2)
        tokens = torch.randint(3, self.decoder.vocab_size, (ROWS, LENGTH), generator=generator).numpy()
        lengths = np.full(ROWS, LENGTH, np.int32)
        rows = TokenizedRows(
            tokens=tokens.astype(np.int32).reshape(-1),
            loss_mask=np.tile(np.arange(LENGTH) > 0, ROWS),
            lengths=lengths,
            loss_tokens=lengths - 1,
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            num_dropped=0,
            num_truncated=0,
            num_unaligned=0,
        )
        plan = make_plan(
            lengths, packing=False, max_length=LENGTH, rows_per_micro_batch=ROWS, max_micro_batches=1, seed=0
        )
        return build_batch(rows, plan.step(0), ROWS, token_mean, range(ROWS))


def recipe(folder: Path, checkpoint: Path, **keys: Any) -> RunConfig:
    """A run that goes on from the checkpoint, with settings of its own that must not count."""
    given = {
        "model_name_or_path": "m",
        "dataset_name": "d",
        "output_dir": str(folder),
        "learning_rate": 3e-4,
        "adam_beta2": 0.99,
        "resume_from_checkpoint": str(checkpoint),
    }
    return resolve(given | keys).config


def start_of(config: RunConfig, decoder: Any) -> tuple[Start, RunConfig]:
    own = Checkpoints(Path(config.run.output_dir) / FOLDER)
    with contextlib.closing(own):
        start = find_start(config.run, own, decoder)
    assert start is not None
    return start, carry_over(config, start.metadata)


def layout_of(config: RunConfig, decoder: Any, mesh: dict[str, int], stage: int) -> StateLayout:
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    return lay_out(decoder, config.optimizer, make_mesh(MeshConfig(**mesh), devices), stage)


@pytest.fixture
def fixture(assets: Path, request: pytest.FixtureRequest) -> Fixture:
    return Fixture(assets / "fixtures" / "deepspeed" / request.param)


@pytest.mark.parametrize("fixture", FLOAT32 + BFLOAT16, indirect=True)
def test_the_state_is_the_engines_bit_for_bit(fixture: Fixture, tmp_path: Path):
    """Weights and both moments, each under the sharding of two devices at stage 3."""
    start, config = start_of(recipe(tmp_path, fixture.folder), fixture.decoder)
    layout = layout_of(config, fixture.decoder, {"mesh_fsdp": 2}, 3)
    with contextlib.closing(Checkpoints(tmp_path / FOLDER)) as own:
        state = restore(start, own, layout, ORDER)
    assert (int(state.step), int(state.optimizer["count"])) == (3, 3)
    tree: Any = {"params": state.params, "optimizer": state.optimizer}
    for kind, path in PLACES.items():
        part = tree[path[0]] if len(path) == 1 else tree[path[0]][path[1]]
        for tensor in hf_tensors(part, fixture.decoder):
            values = np.asarray(tensor.leaf if tensor.layer is None else tensor.leaf[tensor.layer])
            values = values.T if tensor.transpose else values
            np.testing.assert_array_equal(values, fixture.arrays[f"{kind}/{tensor.name}"], err_msg=tensor.name)
    assert jax.tree.map(lambda leaf: leaf.sharding, state.params) == layout.shardings.params


@pytest.mark.parametrize("fixture", FLOAT32, indirect=True)
def test_the_next_losses_are_the_engines(fixture: Fixture, tmp_path: Path):
    """Three more updates in float32, on the engine's rows: within 1e-5 of its losses, as its rates are."""
    start, config = start_of(recipe(tmp_path, fixture.folder), fixture.decoder)
    layout = layout_of(config, fixture.decoder, {"mesh_data": 1}, 0)
    with contextlib.closing(Checkpoints(tmp_path / FOLDER)) as own:
        state = restore(start, own, layout, ORDER)
    how = Execution(constrain=make_constrain(layout.mesh, layout.specs), mesh=layout.mesh)
    loss = make_nll(fixture.decoder, how)
    step = make_train_step(loss, config.optimizer, make_schedule(config.optimizer, 20), layout)
    for wanted in fixture.reference["next_losses"]:
        batch = jax.device_put(fixture.batch(wanted["step"]), layout.batch)
        rate = float(make_schedule(config.optimizer, 20)(state.optimizer["count"] + 1))
        state, metrics = step(state, batch)
        assert abs(float(metrics["loss"]) - wanted["loss"]) < 1e-5
        assert abs(float(metrics["grad_norm"]) - wanted["grad_norm"]) < 1e-4
        np.testing.assert_allclose(rate, wanted["lr_after"][0], rtol=1e-6)


@pytest.mark.parametrize("fixture", FLOAT32[:1], indirect=True)
def test_the_runs_settings_give_way_and_the_log_says_so(
    fixture: Fixture, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        start, config = start_of(recipe(tmp_path, fixture.folder), fixture.decoder)
        check_rate(config.optimizer, start.metadata, 20)
    optim = config.optimizer
    assert (optim.adam_beta1, optim.adam_beta2, optim.adam_epsilon, optim.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert (optim.learning_rate, optim.lr_scheduler_type, optim.warmup_steps) == (0.01, "WarmupDecayLR", 2)
    assert optim.lr_scheduler_kwargs == {"warmup_min_lr": 0.002, "total_num_steps": 20}
    named = {record.getMessage().partition(":")[0] for record in caplog.records}
    assert {"learning_rate", "adam_beta2", "weight_decay", "lr_scheduler_type"} <= named
    assert "adam_beta1" not in named  # the recipe's is the same
    assert not any("at the next step" in record.getMessage() for record in caplog.records)
    assert start.metadata[DEEPSPEED]["world_size"] == 2


def test_the_trainers_schedule_is_the_recipes_at_the_trainers_rate(
    assets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """transformers saves where its schedule is, not which: the rate of the next step tells one from another."""
    folder = assets / "fixtures" / "deepspeed" / "hf_trainer_qwen2_z2_ws2_bf16"
    decoder = decoder_config(json.loads((folder / "checkpoint-3" / "config.json").read_text()))
    keys = {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    start, config = start_of(recipe(tmp_path, folder, **keys), decoder)
    assert config.optimizer.learning_rate == 0.01
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        check_rate(config.optimizer, start.metadata, 6)
        assert not caplog.records
        check_rate(config.optimizer, start.metadata, 60)
    (record,) = caplog.records
    assert "0.00853553 in the DeepSpeed run" in record.getMessage()


@pytest.mark.parametrize("fixture", FLOAT32[:1], indirect=True)
@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"optim": "adamw_8bit"}, r"^optim: need AdamW with float32 moments .* set optim: adamw_torch"),
        ({"use_peft": True}, r"^use_peft: need false .* got true; "),
    ],
)
def test_a_state_of_another_kind_is_refused(fixture: Fixture, tmp_path: Path, keys: dict[str, Any], line: str):
    start, config = start_of(recipe(tmp_path, fixture.folder, **keys), fixture.decoder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    layout = lay_out(fixture.decoder, config.optimizer, mesh, 0, config.model.adapter)
    with pytest.raises(UserError, match=line), contextlib.closing(Checkpoints(tmp_path / FOLDER)) as own:
        restore(start, own, layout, ORDER)


@pytest.mark.parametrize("fixture", FLOAT32[:1], indirect=True)
def test_another_models_checkpoint_is_refused(fixture: Fixture, tmp_path: Path):
    other = decoder_config(fixture.reference["hf_config"] | {"num_hidden_layers": 3})
    start, config = start_of(recipe(tmp_path, fixture.folder), other)
    layout = layout_of(config, other, {"mesh_data": 1}, 0)
    line = r"^model_name_or_path: need the tensors that config.json implies, got .* without model.layers.2"
    with pytest.raises(UserError, match=line), contextlib.closing(Checkpoints(tmp_path / FOLDER)) as own:
        restore(start, own, layout, ORDER)


@pytest.mark.parametrize("fixture", FLOAT32[:1], indirect=True)
def test_files_that_are_not_whole_are_named_by_the_users_key(fixture: Fixture, tmp_path: Path):
    folder = tmp_path / "copy" / "global_step3"
    folder.mkdir(parents=True)
    for path in (fixture.folder / "global_step3").iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content if "rank_1" not in path.name else content[: len(content) // 2])
    with pytest.raises(UserError, match=r"^resume_from_checkpoint: need .*zero_pp_rank_1"):
        start_of(recipe(tmp_path / "out", folder), fixture.decoder)


def test_a_folder_with_nothing_to_go_on_from(tmp_path: Path, decoder: Any):
    line = (
        r"^resume_from_checkpoint: need a run, one of its checkpoints or a DeepSpeed checkpoint, got .*; check the path"
    )
    with pytest.raises(UserError, match=line):
        start_of(recipe(tmp_path / "out", tmp_path), decoder)


def saved_with(**changes: Any) -> Saved:
    """A run that saved two groups with the Trainer's settings, with changes."""
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "initial_lr": 2e-3}
    groups = (
        ParameterGroup(settings, ("model.embed_tokens.weight",)),
        ParameterGroup(settings | {"weight_decay": 0.0}, ("model.norm.weight",)),
    )
    fields = {
        "folder": Path("there"), "stage": 2, "world_size": 2, "universal": False, "dtype": "float32", "frozen": (),
        "tied": {}, "groups": groups, "step": 3, "global_steps": 3, "skipped_steps": 0, "scheduler": None,
        "trainer_state": None, "ds_config": {},
    }  # fmt: skip
    return Saved(**(fields | changes))


def test_settings_come_through_json_as_they_were():
    saved = saved_with(scheduler=Scheduler("scheduler.pt", {"base_lrs": [2e-3, 2e-3]}))
    again = from_json(json.loads(json.dumps(saved.as_json())))
    assert settings_of(again) == settings_of(saved)
    assert settings_of(saved) == {
        "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "weight_decay": 0.1, "learning_rate": 2e-3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"betas": (0.9, 0.99)}, "need one betas for all parameter groups"),
        ({"weight_decay": 0.2}, "need one weight_decay for all parameter groups"),
        ({"initial_lr": 1e-4}, "need one learning_rate for all parameter groups"),
        ({"amsgrad": True}, "amsgrad"),
        ({"betas": 3}, "betas"),
        ({"lr": "fast"}, "lr"),
        ({"lr": float("nan")}, "lr"),
    ],
)
def test_groups_that_cannot_be_had_here_are_refused(change: dict[str, Any], line: str):
    first, second = saved_with().groups
    saved = saved_with(groups=(first, ParameterGroup(second.settings | change, second.names)))
    with pytest.raises(UserError, match=rf"^resume_from_checkpoint: .*{line}"):
        settings_of(saved)


def test_an_elastic_checkpoint_leaves_the_recipes_settings():
    groups = tuple(ParameterGroup({}, group.names) for group in saved_with().groups)
    assert settings_of(saved_with(groups=groups)) == {}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400, "many", None])
def test_a_schedule_of_strange_numbers_is_read_as_if_they_were_not_there(number: Any):
    params = {"warmup_min_lr": number, "warmup_max_lr": number, "warmup_num_steps": number, "total_num_steps": number}
    first, second = saved_with().groups
    plain = {name: value for name, value in first.settings.items() if name != "initial_lr"}
    saved = saved_with(
        groups=(ParameterGroup(plain, first.names), ParameterGroup(plain, second.names)),
        scheduler=Scheduler("model_states", {"last_batch_iteration": 2}),
        ds_config={"scheduler": {"type": "WarmupDecayLR", "params": params}},
    )
    found = settings_of(saved)
    assert (found["lr_scheduler_kwargs"], found["warmup_steps"]) == ({"warmup_min_lr": 0.0}, 1000)
    assert "learning_rate" not in found


@pytest.mark.parametrize(
    ("kind", "rates"), [("WarmupLR", (2, 2, 6, 10, 10, 10)), ("WarmupDecayLR", (2, 2, 6, 10, 8, 6))]
)
def test_deepspeeds_schedules_by_hand(kind: Any, rates: tuple[int, ...]):
    """From 2 to 10 in two steps, each a step behind; then down to 2 in four, of which two are seen."""
    kwargs = {"warmup_min_lr": 2.0} | ({"total_num_steps": 6} if kind == "WarmupDecayLR" else {})
    optim = OptimizerConfig(learning_rate=10.0, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, warmup_steps=2)
    assert [float(make_schedule(optim, 100)(jax.numpy.int32(count))) for count in range(6)] == list(map(float, rates))
