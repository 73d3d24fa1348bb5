"""The memory estimate of a run, shown before anything is compiled, and the advice when memory runs out after all."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from rich.console import Console

from r1jax import footprint
from r1jax.config.errors import RunFailure
from r1jax.config.schema import RunConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import abstract_params
from r1jax.objectives.vocabulary import tiles_of
from r1jax.sharding.mesh import data_shards
from r1jax.sharding.rules import shardings
from r1jax.training.execution import backend_of, remat_of
from r1jax.training.state import StateLayout


def estimate_memory(
    config: RunConfig,
    decoder: DecoderConfig,
    layout: StateLayout,
    row_length: int,
    *,
    rows: int | None = None,
    cache_bytes: int = 0,
) -> footprint.Footprint:
    """The footprint of a step on rows of at most row_length tokens, printed on the first process.

    rows: of a micro-batch on a device; None: per_device_train_batch_size. cache_bytes: a device's, for sampling.
    """
    samples = config.run.task == "grpo"
    rows = rows or config.batch.per_device_train_batch_size
    vocab_slice = decoder.vocab_size // layout.mesh.shape["tensor"]
    tiles = tiles_of(rows * row_length, vocab_slice, config.model.loss_chunk_size)
    workload = footprint.Workload(
        rows=rows,
        samples=samples,
        row_length=row_length,
        compute_dtype=config.model.compute_dtype,
        remat=remat_of(config),
        loss_chunk_size=rows * row_length * tiles.width // vocab_slice,
        zero_stage=config.mesh.zero_stage,
        state_shards=data_shards(layout.mesh),
        tensor_shards=layout.mesh.shape["tensor"],
        optim=config.optimizer.optim,
        attention=backend_of(config, decoder, layout),
    )
    places = layout.shardings
    width = jnp.dtype(config.model.compute_dtype).itemsize
    whole = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(decoder))) * width // workload.tensor_shards
    held = footprint.bytes_per_device(layout.abstract.params, places.params)
    reference = held if config.grpo.reference.sync_ref_model or config.model.adapter else held * width // 4
    estimate = footprint.estimate(
        params=layout.abstract.params,
        param_shardings=places.params,
        gradient_shardings=shardings(layout.mesh, layout.trained.gradients),
        optimizer=layout.abstract.optimizer,
        optimizer_shardings=places.optimizer,
        config=decoder,
        workload=workload,
        lora=config.model.adapter,
        frozen=footprint.bytes_per_device(layout.frozen, layout.frozen_shardings),
        reference=reference if samples and config.grpo.reference.beta else 0,
        rollouts=whole + cache_bytes if samples else 0,
    )
    if jax.process_index() == 0:
        limit = footprint.device_limit(jax.local_devices()[0])
        Console(stderr=True).print(footprint.table(estimate, limit))
    return estimate


@contextlib.contextmanager
def out_of_memory_named(estimate: footprint.Footprint) -> Iterator[None]:
    """Turns a device's out-of-memory error into the line that names the key to turn."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        advice = footprint.advice(str(error), estimate)
        if not advice:
            raise
        raise RunFailure(advice) from error
