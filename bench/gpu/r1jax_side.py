"""r1jax's side of a case: `python -m bench.gpu.r1jax_side CASE NUMBER` prints a JSON line of the case's setting NUMBER.

A setting a process: JAX tells the highest use of memory of a process and nothing resets it, so that a second setting
would be told with the first one's peak. Without grain, datasets and tensorboardX: what is used here is what trains, not
what reads and logs.
"""

import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.cases import Case, Setting, case_named, packed
from bench.gpu.timing import rounds
from r1jax import optimizer, runtime
from r1jax.batch import PackedBatch
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.attention.backends import Backend, choose, device_of, make_attend
from r1jax.models.decoding import unstack
from r1jax.models.execution import Execution
from r1jax.models.parameters import init_params
from r1jax.objectives.grpo import make_policy_loss
from r1jax.objectives.sft import make_nll
from r1jax.objectives.statistics import make_statistics
from r1jax.objectives.surrogate import Surrogate
from r1jax.rollout.sampler import Sampler
from r1jax.rollout.settings import SamplingSettings
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import make_mesh
from r1jax.training.state import StateLayout, fresh_params, lay_out, start_state
from r1jax.training.step import make_train_step

Row = dict[str, Any]


def batch_of(case: Case) -> PackedBatch:
    """[1, rows, T]: all but each document's first token are trained on."""
    fields = packed(case)
    mask = (fields["positions"] > 0).astype(np.int32)
    weight = mask / np.float32(mask.sum())
    more: dict[str, Any] = {}
    if case.kind == "grpo":
        rng = np.random.default_rng(1)
        advantages = rng.normal(size=case.documents + 1).astype(np.float32)[fields["segment_ids"]]
        # Of a policy that knows nothing, as random weights are: near ln V for every token.
        near = -np.log(case.decoder.vocab_size) + 0.05 * rng.normal(size=mask.shape)
        logprobs = (mask * near).astype(np.float32)
        more = {"advantages": advantages * mask, "old_logprobs": logprobs, "sampler_logprobs": logprobs}
    leaves = {**fields, "loss_mask": mask, "loss_weight": weight.astype(np.float32), **more}
    return PackedBatch(**{name: leaf[None] for name, leaf in leaves.items()}, max_segments=max(8, case.documents))


def backend_of(case: Case, setting: Setting) -> Backend:
    """The attention: what the setting names, or the fastest on this device."""
    if setting.attention != "auto":
        return setting.attention
    return choose(device_of(jax.devices()[0]), case.dtype, case.decoder.head_dim)


def execution(case: Case, setting: Setting, layout: StateLayout) -> Execution:
    """How it is run."""
    backend = backend_of(case, setting)
    return Execution(
        dtype=case.dtype,
        remat=setting.remat,
        backend=backend,
        attend=make_attend(backend),
        constrain=make_constrain(layout.mesh, layout.specs),
        mesh=layout.mesh,
        loss_chunk=setting.loss_chunk,
    )


def measure_update(case: Case, setting: Setting) -> Row:
    """Tokens/s of whole updates, compile time, memory."""
    optim = OptimizerConfig(optim=setting.optim, learning_rate=1e-4, lr_scheduler_type="constant")  # type: ignore[arg-type]
    layout = lay_out(case.decoder, optim, make_mesh(MeshConfig(), jax.devices()[:1]), zero_stage=0)
    how = execution(case, setting, layout)
    if case.kind == "sft":
        loss = make_nll(case.decoder, how)
    else:
        loss = make_policy_loss(make_statistics(case.decoder, how), Surrogate())
    step: Any = make_train_step(loss, optim, optimizer.make_schedule(optim, 1), layout)
    state = start_state(fresh_params(case.decoder, 0, layout), optim, layout)
    batch = jax.device_put(batch_of(case), layout.batch)
    started = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - started
    held = [state]
    told: list[Any] = []

    def run(count: int) -> None:
        for _ in range(count):
            held[0], metrics = compiled(held[0], batch)
            told[:] = [metrics]
        jax.block_until_ready(held)

    seconds = rounds(run, case.num_rounds)
    memory = compiled.memory_analysis()
    found = {
        "tokens_per_second": case.num_tokens / seconds.median,
        "step_seconds": seconds.all,
        "compile_seconds": compile_seconds,
        "loss": float(told[0]["loss"]),
        "attention": how.backend,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    held.clear()
    return found


def measure_decode(case: Case, setting: Setting) -> Row:
    """Tokens/s of drawing, prompts included."""
    params = jax.jit(lambda key: unstack(init_params(case.decoder, key), jnp.dtype(case.dtype)))(jax.random.key(0))
    sampler = Sampler(params=params, config=case.decoder, backend=backend_of(case, setting))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, case.decoder.vocab_size, (case.documents, case.prompt_length)).tolist()
    settings = SamplingSettings(max_new_tokens=case.row_length)

    def run(count: int) -> None:
        for _ in range(count):
            sampler.generate(
                prompts, settings, num_generations=case.rows // case.documents, batch_size=case.rows
            )  # all of them side by side

    seconds = rounds(run, case.num_rounds)
    return {
        "tokens_per_second": case.num_tokens / seconds.median,
        "step_seconds": seconds.all,
        "compile_seconds": seconds.first - seconds.median,
        "attention": sampler.backend,
        "bytes_per_second": case.bytes_per_token_drawn * case.num_tokens / seconds.median,
    }


def main(arguments: list[str]) -> None:
    """One setting of the case."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    case = case_named(arguments[0])
    setting = case.settings[int(arguments[1])]
    runtime.configure(case.dtype)
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is measured
    measure: Callable[[Case, Setting], Row] = measure_decode if case.kind == "decode" else measure_update
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    about = {"setting": dataclasses.asdict(setting), "versions": versions}
    try:
        found = measure(case, setting)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = {"out_of_memory": str(error).splitlines()[0]}
    stats = jax.devices()[0].memory_stats() or {}
    answers.write(json.dumps({**about, **found, "peak_memory_bytes": stats.get("peak_bytes_in_use")}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
