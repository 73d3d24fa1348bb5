"""r1jax's own training step on one device: the one that `python -m r1jax.train` compiles, with random weights."""

import resource
import time

import jax
import numpy as np

from bench.cases import Case
from bench.side import LEARNING_RATE, MAX_GRAD_NORM, tokens_of
from r1jax import optimizer, runtime
from r1jax.batch import PackedBatch
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.execution import Execution
from r1jax.models.families import decoder_config
from r1jax.objectives.sft import make_nll
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import make_mesh
from r1jax.training.state import fresh_params, lay_out, start_state
from r1jax.training.step import make_train_step


class R1JaxSide:
    """State on the device and the step."""

    def __init__(self, case: Case):
        runtime.configure(case.compute_dtype)
        jax.config.update("jax_enable_compilation_cache", False)  # compile time is measured
        decoder = decoder_config(case.hf_config)
        optim = OptimizerConfig(learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, lr_scheduler_type="constant")
        layout = lay_out(decoder, optim, make_mesh(MeshConfig(), jax.devices()[:1]), zero_stage=0)
        remat = "full" if case.gradient_checkpointing else "dots"
        constrain = make_constrain(layout.mesh, layout.specs)
        how = Execution(dtype=case.compute_dtype, remat=remat, constrain=constrain, mesh=layout.mesh)
        loss = make_nll(decoder, how)
        step = make_train_step(loss, optim, optimizer.make_schedule(optim, 1), layout)
        self._state = start_state(fresh_params(decoder, 0, layout), optim, layout)
        self._batch = jax.device_put(batch_of(case), layout.batch)
        self._step = step
        start = time.perf_counter()
        self.run(1)
        self.prepare_seconds = time.perf_counter() - start

    def run(self, num_steps: int) -> float:
        metrics = {}
        for _ in range(num_steps):
            self._state, metrics = self._step(self._state, self._batch)
        return float(metrics["loss"])

    def peak_memory_bytes(self) -> int:
        on_device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return on_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def device(self) -> str:
        return jax.devices()[0].device_kind


def batch_of(case: Case) -> PackedBatch:
    """One document a row, every token but the first trained on; leaves are [1, rows, row_length]."""
    tokens = tokens_of(case)[None]
    mask = np.ones_like(tokens)
    mask[..., 0] = 0
    return PackedBatch(
        tokens=tokens,
        positions=np.broadcast_to(np.arange(case.row_length, dtype=np.int32), tokens.shape).copy(),
        segment_ids=np.ones_like(tokens),
        loss_mask=mask,
        loss_weight=(mask / mask.sum()).astype(np.float32),
    )
