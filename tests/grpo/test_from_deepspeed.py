"""GRPO goes on from a DeepSpeed checkpoint: from its weights, at its step, with what goes beside the state afresh."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from r1jax import train
from r1jax.deepspeed.training_state import ParamGroup, Target, TrainingState
from r1jax.deepspeed.writer import write_checkpoint
from r1jax.deepspeed.zero_layout import KINDS, Kind
from r1jax.models.families import decoder_config, parameter_order
from r1jax.models.hf_tensors import hf_tensors
from r1jax.models.parameters import abstract_params
from tests.grpo.world import metrics, recipe

STEP = 3
# A generation of four steps, of which the checkpoint has seen three, and parts that a run keeps beside its state.
KEYS = {
    "steps_per_generation": 4, "num_iterations": 2, "beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 2,
    "use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef": 0.05,
}  # fmt: skip


def made_up(model: Path, rate: float) -> tuple[TrainingState, dict[str, np.ndarray]]:
    """(a state of the world's model with these learning rates, its weights)."""
    config = decoder_config(json.loads((model / "config.json").read_text()))
    shapes = {tensor.name: tensor.shape for tensor in hf_tensors(abstract_params(config), config)}
    generator = np.random.default_rng(0)
    weights = {name: generator.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}

    def tensors() -> Iterator[tuple[str, Kind, np.ndarray]]:
        for name, values in weights.items():
            for kind in KINDS:
                yield name, kind, values if kind == "fp32" else (np.abs(values) / 100).astype(np.float32)

    names = parameter_order(config)
    group = ParamGroup(names=names, lr=rate, initial_lr=rate, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8)
    state = TrainingState(
        shapes={name: shapes[name] for name in names},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        groups=(group,),
        tensors=tensors,
        adam_step=STEP,
        global_step=STEP,
    )
    return state, weights


def test_a_policy_that_a_deepspeed_run_has_trained(world: Path, tmp_path: Path):
    """At the checkpoint's rate of 0 the policy that leaves is the one that came in, bit for bit, three steps later."""
    state, weights = made_up(world / "model", 0.0)
    write_checkpoint(tmp_path, state, Target(stage=2, world_size=3, dtype="fp32"))
    changes = {**KEYS, "resume_from_checkpoint": str(tmp_path), "torch_dtype": "float32"}
    assert train.main(["--config", str(recipe(world, "from-deepspeed", **changes))]) == 0
    folder = world / "from-deepspeed"
    lines = [line for line in metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines] == [4, 5, 6]
    assert all(line["learning_rate"] == 0.0 for line in lines)
    found = load_file(folder / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_it_learns_from_there(world: Path, tmp_path: Path):
    state, weights = made_up(world / "model", 1e-3)
    write_checkpoint(tmp_path, state, Target(stage=3, world_size=2, dtype="fp32"))
    changes = {"resume_from_checkpoint": str(tmp_path), "torch_dtype": "float32"}
    assert train.main(["--config", str(recipe(world, "learns-on", **changes))]) == 0
    assert [line["learning_rate"] for line in metrics(world / "learns-on") if "loss" in line] == [np.float32(1e-3)] * 3
    found = load_file(world / "learns-on" / "model.safetensors")
    moved = max(float(np.abs(found[name] - values).max()) for name, values in weights.items())
    assert 1e-4 < moved < 1e-2
