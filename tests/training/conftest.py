"""A decoder small enough to train in a test, and packed steps of counting sequences that it learns in ten of them."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from r1jax.batch import PackedBatch
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.data.batches import build_batch
from r1jax.data.packing import make_plan
from r1jax.data.tokenized import TokenizedRows
from r1jax.models.config import DecoderConfig
from r1jax.models.execution import Execution
from r1jax.models.transformer import RematPolicy
from r1jax.objectives.reductions import token_mean
from r1jax.objectives.sft import Loss, make_nll
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import make_mesh
from r1jax.training.state import StateLayout, lay_out

ROW_LENGTH = 24


@pytest.fixture(scope="session")
def decoder() -> DecoderConfig:
    """Every kind of leaf, each with a dimension that 8 divides; 2 divides the kv heads."""
    return DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-6,
        rope_theta=1e4,
        qkv_bias=True,
        qk_norm=True,
    )


def counting_rows(count: int) -> TokenizedRows:
    """Documents of 5 to 15 tokens that count on from anywhere, modulo 16; the first two tokens are the prompt."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 16, count)
    return TokenizedRows(
        tokens=np.concatenate([(rng.integers(16) + np.arange(n)) % 16 for n in lengths]).astype(np.int32),
        loss_mask=np.concatenate([np.arange(n) >= 2 for n in lengths]),
        lengths=lengths.astype(np.int32),
        loss_tokens=(lengths - 2).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        num_dropped=0,
        num_truncated=0,
        num_unaligned=0,
    )


@pytest.fixture(scope="session")
def packed_steps() -> Callable[[int, int], list[PackedBatch]]:
    """(number of steps, micro-batches of 8 rows) -> a step's batch [A, 8, 24] each, packed best fit."""

    def make(num_steps: int, micro_batches: int) -> list[PackedBatch]:
        rows = counting_rows(20 * micro_batches * num_steps)
        plan = make_plan(
            rows.lengths,
            packing=True,
            max_length=ROW_LENGTH,
            rows_per_micro_batch=8,
            max_micro_batches=micro_batches,
            seed=0,
        )
        assert plan.num_steps >= num_steps
        return [build_batch(rows, plan.step(s), 8, token_mean, range(8)) for s in range(num_steps)]

    return make


@pytest.fixture(scope="session")
def laid_out(decoder: DecoderConfig) -> Callable[..., tuple[StateLayout, Loss]]:
    """(mesh keys, stage, optimizer, ...) -> the state's layout on the first that many devices, and the loss on it."""

    def make(
        shape: dict[str, int], stage: int, optim: OptimizerConfig, remat: RematPolicy = "none"
    ) -> tuple[StateLayout, Loss]:
        devices = jax.devices()[: int(np.prod(list(shape.values())))]
        layout = lay_out(decoder, optim, make_mesh(MeshConfig(**shape), devices), stage)
        # A chunk that does not divide a device's tokens.
        constrain = make_constrain(layout.mesh, layout.specs)
        return layout, make_nll(decoder, Execution(remat=remat, constrain=constrain, mesh=layout.mesh, loss_chunk=20))

    return make
