"""A GRPO step over eight devices is that of one: rollouts, packing, scores, loss and gradients, at every ZeRO stage.

Each layout packs the same completions in its own way, since rows of a micro-batch follow from the number of devices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import PackedBatch, Rollout, Turn, VersionSpan
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.experience.batches import make_geometry
from r1jax.experience.collect import Experience
from r1jax.experience.generations import Packer
from r1jax.models.config import DecoderConfig
from r1jax.models.execution import Execution
from r1jax.objectives.grpo import make_policy_loss
from r1jax.objectives.reductions import micro_batch_mean
from r1jax.objectives.statistics import make_scorer, make_statistics
from r1jax.objectives.surrogate import Surrogate
from r1jax.rollout.engine import EmbeddedEngine
from r1jax.rollout.settings import SamplingSettings
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import data_shards, make_mesh
from r1jax.training.state import StateLayout, fresh_params, lay_out
from r1jax.training.step import make_gradients, make_score_step

NUM, TEMPERATURE = 48, 0.8
DECODER = DecoderConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    norm_eps=1e-6, rope_theta=1e4, qkv_bias=True, qk_norm=True, initializer_range=0.1,
)  # fmt: skip
FSDP, DATA_FSDP, FSDP_TENSOR = {"mesh_fsdp": 8}, {"mesh_data": 2, "mesh_fsdp": 4}, {"mesh_fsdp": 4, "mesh_tensor": 2}
CASES = [(FSDP, 3), (DATA_FSDP, 2), (FSDP_TENSOR, 0)] + [
    pytest.param(shape, stage, marks=pytest.mark.slow)
    for shape, stage in [(FSDP, 0), (FSDP, 1), (FSDP, 2), (FSDP_TENSOR, 3)]
]


def laid_out(shape: dict[str, int], stage: int) -> StateLayout:
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    return lay_out(DECODER, OptimizerConfig(), make_mesh(MeshConfig(**shape), devices), stage)


@pytest.fixture(scope="module")
def experience() -> Experience:
    """48 completions in groups of four, of up to 90 tokens with their prompts; every sixth has met the limit."""
    rng = np.random.default_rng(0)
    rollouts = []
    for at in range(NUM):
        begin, length = int(rng.integers(2, 12)), int(rng.integers(14, 90))
        mask = (np.arange(length) >= begin).astype(np.int32)
        drawn = (mask * rng.normal(-4, 0.3, length)).astype(np.float32)
        tokens = rng.integers(0, 64, length).astype(np.int32)
        turn = Turn(begin, length, "stop" if at % 6 else "length")
        rollouts.append(
            Rollout(
                prompt_id=at // 4, sample=at % 4, tokens=tokens, action_mask=mask, logprobs=drawn,
                policy_logprobs=drawn, versions=(VersionSpan(begin, length, 0),), turns=(turn,),
            )
        )  # fmt: skip
    nothing = np.zeros(NUM)
    return Experience(
        rollouts=tuple(rollouts), group_size=4, reward_names=(), values=np.zeros((NUM, 0)), rewards=nothing,
        advantages=rng.normal(size=NUM), counts={}, seconds={},
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Update:
    """What a layout makes of the experience, on the host."""

    batch: PackedBatch
    gradients: Any
    loss: float
    sums: dict[str, float]


def update(layout: StateLayout, experience: Experience) -> Update:
    """The gradients of fresh parameters; the old policy and the reference are others near them."""
    shards = data_shards(layout.mesh)
    geometry = make_geometry(longest=90, shortest=14, num_sequences=NUM, per_device=2, shards=shards)
    geometry = dataclasses.replace(geometry, row_length=256, max_micro_batches=4 if shards > 1 else 24)
    packer = Packer(geometry=geometry, sharding=layout.batch, weigh=micro_batch_mean, masks_truncated=True)
    batch, _ = packer.pack(experience, range(NUM), np.arange(NUM) % 3)
    how = Execution(constrain=make_constrain(layout.mesh, layout.specs), mesh=layout.mesh, loss_chunk=20)
    statistics = make_statistics(DECODER, how, temperature=TEMPERATURE)
    score = make_score_step(make_scorer(statistics), layout)
    params = fresh_params(DECODER, 0, layout)

    def near(seed: int) -> Any:
        mix = jax.jit(lambda a, b: jax.tree.map(lambda x, y: 0.7 * x + 0.3 * y, a, b), out_shardings=places)
        return mix(params, fresh_params(DECODER, seed, layout))

    places = layout.shardings.params
    batch = dataclasses.replace(batch, old_logprobs=score(near(1), batch), ref_logprobs=score(near(2), batch))
    loss = make_policy_loss(statistics, Surrogate(beta=0.1, epsilon_high=0.3))
    compute = jax.jit(make_gradients(loss, layout, skip_empty=True), in_shardings=(places, layout.batch))
    gradients, value, sums = jax.device_get(compute(params, batch))
    return Update(jax.device_get(batch), gradients, float(value), {name: float(one) for name, one in sums.items()})


@pytest.fixture(scope="module")
def one_device(experience: Experience) -> Update:
    return update(laid_out({"mesh_fsdp": 1}, 0), experience)


@pytest.mark.parametrize(("shape", "stage"), CASES)
def test_eight_devices_equal_one(experience: Experience, one_device: Update, shape: dict[str, int], stage: int) -> None:
    found = update(laid_out(shape, stage), experience)
    shards = 8 // shape.get("mesh_tensor", 1)
    assert found.batch.tokens.shape[1] == shards and one_device.batch.tokens.shape[1] == 1
    assert 1 < int(np.any(found.batch.segment_ids > 0, axis=(1, 2)).sum()) <= 4
    assert found.loss == pytest.approx(one_device.loss, rel=1e-5)
    for name, value in one_device.sums.items():
        if not name.endswith(("_min", "_max")) or name == "logp_difference_max":
            assert found.sums[name] == pytest.approx(value, rel=1e-5), name
    wanted = dict(jax.tree_util.tree_leaves_with_path(one_device.gradients))
    for path, leaf in jax.tree_util.tree_leaves_with_path(found.gradients):
        assert np.linalg.norm(leaf - wanted[path]) <= 1e-5 * np.linalg.norm(wanted[path]), path


def test_it_is_a_step_in_which_all_terms_count(one_device: Update, experience: Experience) -> None:
    sums, trained = one_device.sums, [one for one in experience.rollouts if not one.truncated]
    assert sums["loss_tokens"] == sum(one.num_actions for one in trained)
    assert min(sums[name] for name in ("kl", "clipped_low", "clipped_high", "mismatch", "entropy")) > 0
    assert all(np.linalg.norm(leaf) > 1e-6 for leaf in jax.tree.leaves(one_device.gradients))
    assert np.any(one_device.batch.old_logprobs != one_device.batch.ref_logprobs)


@pytest.mark.parametrize("shape", [FSDP, FSDP_TENSOR])
def test_rollouts_of_sharded_parameters_are_those_of_one_device(shape: dict[str, int]) -> None:
    """The same tokens whatever the trainer splits; log-probabilities to rounding."""
    settings = SamplingSettings(max_new_tokens=6, temperature=TEMPERATURE, stop_ids=(3, 4), seed=5)
    prompts = [[7, 8], [9], [10, 11, 12]]

    def drawn(layout: StateLayout) -> list[Rollout]:
        engine = EmbeddedEngine(DECODER, layout.mesh, settings)
        engine.sync(fresh_params(DECODER, 0, layout), 2)
        groups = engine.generate(prompts, [4, 0, 9], num_generations=3, step=1)
        return [one for group in groups for one in group]

    one, eight = drawn(laid_out({"mesh_fsdp": 1}, 0)), drawn(laid_out(shape, 3))
    for a, b in zip(one, eight, strict=True):
        assert (a.prompt_id, a.sample, a.turns, a.versions) == (b.prompt_id, b.sample, b.turns, b.versions)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.policy_logprobs, b.policy_logprobs, atol=1e-5)
    assert jnp.unique(jnp.concatenate([jnp.asarray(one.tokens) for one in eight])).size > 8
