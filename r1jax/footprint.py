"""Bytes that a training step needs on each device, worked out before anything is compiled, and what to turn when they
are too many."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from rich.table import Table

from r1jax.batch import Layout
from r1jax.config.lora import LoraConfig
from r1jax.models.attention.backends import Backend
from r1jax.models.attention.blocks import QUERY_BLOCK
from r1jax.models.config import DecoderConfig
from r1jax.models.lora import abstract_adapter, join, with_scale
from r1jax.models.parameters import abstract_params
from r1jax.models.transformer import RematPolicy, forward

GIB = 2**30
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What one device does in a micro-batch, and the settings that advice can change."""

    rows: int
    """Rows of a micro-batch on one device (per_device_train_batch_size)."""
    row_length: int
    """Tokens of a row."""
    compute_dtype: str
    """'float32' or 'bfloat16'."""
    remat: RematPolicy
    """What the backward pass recomputes; 'dots' when gradient_checkpointing is off."""
    loss_chunk_size: int
    """Tokens of one device whose logits exist at one time."""
    zero_stage: int
    """As configured."""
    state_shards: int
    """Devices over which ZeRO can spread state (mesh_data x mesh_fsdp)."""
    tensor_shards: int = 1
    """Devices that share each layer's matrices (mesh_tensor)."""
    optim: str = "adamw_torch"
    """As configured."""
    attention: Backend = "xla"
    """Whose attention it is: only plain XLA's has scores in memory."""
    samples: bool = False
    """Whether the device also samples completions (GRPO)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on the fullest device, by what they are for."""

    parameters: int
    """Master weights of what is trained; exact."""
    gradients: int
    """Gradients as they are accumulated; exact."""
    optimizer: int
    """Moments and what else the optimizer keeps; exact."""
    compute_copies: int
    """Weights and their gradients in the compute dtype, and a gathered layer where weights are sharded."""
    activations: int
    """What the backward pass needs of the forward pass, and the working set of one layer."""
    logits: int
    """One chunk of logits with its gradient, and the gradient of the vocabulary projection."""
    workload: Workload
    """What it was worked out for."""
    frozen: int = 0
    """LoRA: the weights beside the adapter; exact."""
    reference: int = 0
    """GRPO: the reference's weights; exact."""
    rollouts: int = 0
    """GRPO: weights as they are sampled with, exact, and the most that caches of keys and values may take."""

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name, in the order in which they are shown."""
        fields = (field.name for field in dataclasses.fields(self) if field.name != "workload")
        absent = {"frozen"} if self.frozen == 0 else set[str]()
        absent |= set() if self.workload.samples else {"reference", "rollouts"}
        return {name.replace("_", " "): getattr(self, name) for name in fields if name not in absent}

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


def bytes_per_device(abstract: Any, shardings: Any) -> int:
    """Bytes of a tree of abstract arrays on one device; shardings is a tree of its structure."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, abstract, shardings
    )
    return sum(jax.tree.leaves(sizes))


def estimate(
    *,
    params: Any,
    param_shardings: Any,
    gradient_shardings: Any,
    optimizer: Any,
    optimizer_shardings: Any,
    config: DecoderConfig,
    workload: Workload,
    lora: LoraConfig | None = None,
    frozen: int = 0,
    reference: int = 0,
    rollouts: int = 0,
) -> Footprint:
    """The footprint of a train step; params and optimizer are abstract trees, gradients have the shape of params.

    lora: params are such an adapter's, beside so many bytes of frozen weights.

    With c bytes a compute element, P parameters on the device and t = mesh_tensor:
    compute copies = 2 c P when c < 4 (weights and gradients),
    plus 2 c (layer + embedding) / t when weights are sharded; activations as in activation_bytes;
    logits = 2 * 4 * chunk * V / t + 4 D V / t. What is frozen has no gradient, which leaves half of the second term and
    takes off the last one, and is in the compute dtype already.
    """
    parameters = bytes_per_device(params, param_shardings)
    width = jnp.dtype(workload.compute_dtype).itemsize
    vocabulary = config.vocab_size * config.hidden_size
    model = abstract_params(config)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
    layer = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model["layers"])) // config.num_layers
    copies = 2 * width * parameters // 4 if width < 4 else 0
    held, whole = (parameters, 4 * total) if lora is None else (frozen, width * total)
    if held * workload.tensor_shards < whole:
        copies += (2 if lora is None else 1) * width * (layer + vocabulary) // workload.tensor_shards
    chunk = min(workload.loss_chunk_size, workload.rows * workload.row_length)
    return Footprint(
        parameters=parameters,
        gradients=bytes_per_device(params, gradient_shardings),
        optimizer=bytes_per_device(optimizer, optimizer_shardings),
        compute_copies=copies,
        activations=activation_bytes(config, workload, lora),
        logits=(8 * chunk * config.vocab_size + (4 * vocabulary if lora is None else 0)) // workload.tensor_shards,
        workload=workload,
        frozen=frozen,
        reference=reference,
        rollouts=rollouts,
    )


def activation_bytes(config: DecoderConfig, workload: Workload, lora: LoraConfig | None = None) -> int:
    """What the backward pass reads of the forward pass, and its working set in one layer.

    With c bytes a compute element: residuals of L layers under the remat policy, those of one layer without a policy
    (the recomputed layer), 3 c B T F / t (the MLP's gradients) and, where the attention is no kernel, about
    2 B N T T / t (the causal half of the scores in float32, recomputed in the backward pass). In float32 on CPU this is
    0.87 to 1.20 of what XLA says for the greedier of its two schedules; the default one may need less (0.7 of the
    estimate in jax 0.12).
    """
    shards = workload.tensor_shards
    local = dataclasses.replace(
        config,
        num_heads=config.num_heads // shards,
        num_kv_heads=max(1, config.num_kv_heads // shards),
        intermediate_size=config.intermediate_size // shards,
    )
    one, two = (_residual_bytes(dataclasses.replace(local, num_layers=n), workload, "none", lora) for n in (1, 2))
    tokens = workload.rows * workload.row_length
    gradients = 3 * jnp.dtype(workload.compute_dtype).itemsize * tokens * local.intermediate_size
    scores = 2 * tokens * local.num_heads * (workload.row_length + min(workload.row_length, QUERY_BLOCK))
    kept = _residual_bytes(local, workload, workload.remat, lora)
    return kept + two - one + gradients + (scores if workload.attention == "xla" else 0)


def _residual_bytes(config: DecoderConfig, workload: Workload, remat: RematPolicy, lora: LoraConfig | None) -> int:
    """Bytes that jax's partial evaluation of the forward pass hands to the backward pass, the weights left out.

    Read off the trace of the model itself, so that it cannot drift from it; nothing is compiled.
    """
    dtype = jnp.dtype(workload.compute_dtype)
    base = abstract_params(config)
    trained = base if lora is None else abstract_adapter(config, lora)
    if lora is not None:
        base = with_scale(base, lora, lambda depth: jax.ShapeDtypeStruct((depth,), dtype))
    params, base = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), (trained, base))
    tokens = jax.ShapeDtypeStruct((workload.rows, workload.row_length), jnp.int32)

    def residuals(params: Any, base: Any, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> Any:
        layout = Layout(segment_ids=segment_ids, positions=positions)

        def hidden(trained: Any) -> jax.Array:
            model = trained if lora is None else join(base, trained)
            return forward(model, tokens, layout, config, dtype=dtype, remat=remat)

        return jax.vjp(hidden, params)[1]

    jaxpr = jax.make_jaxpr(residuals)(params, base, tokens, tokens, tokens).jaxpr
    given = set(jaxpr.invars)
    kept: list[Any] = [var.aval for var in set(jaxpr.outvars) - given if isinstance(var, Var)]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in kept)


def device_limit(device: Any) -> int | None:
    """Bytes that jax may use on the device, or None where the backend does not say (CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit")


def table(footprint: Footprint, limit: int | None) -> Table:
    """The parts and their sum in GiB (in MiB below one), against the device's memory where that is known."""
    unit, size_of_unit = ("GiB", GIB) if footprint.total >= GIB else ("MiB", GIB / 1024)
    shown = Table(title="memory on each device (estimate)", show_footer=True)
    shown.add_column("for", footer="total" if limit is None else f"total of {limit / size_of_unit:.2f}")
    shown.add_column(unit, footer=f"{footprint.total / size_of_unit:.2f}", justify="right")
    for name, size in footprint.parts.items():
        shown.add_row(name, f"{size / size_of_unit:.2f}")
    return shown


def advice(error_text: str, footprint: Footprint) -> str:
    """One line that names the keys to turn, the most useful first; empty when the error is not one of memory."""
    if not any(mark in error_text for mark in OUT_OF_MEMORY):
        return ""
    remedies = [remedy for name in _by_size(footprint) for remedy in _remedies(name, footprint.workload)]
    # A key that helps two parts is named once, where it helps most.
    first, *others = dict(remedies or [("mesh_fsdp", "train on more devices")]).items()
    name, size = max(footprint.parts.items(), key=lambda part: part[1])
    got = f"about {footprint.total / GIB:.2f} GiB, {size / GIB:.2f} of them {name}"
    what = "; or ".join([first[1], *(f"{key}: {text}" for key, text in others[:2])])
    return f"{first[0]}: need a step that fits the device's memory, got {got}; {what}"


def _by_size(footprint: Footprint) -> list[str]:
    return sorted(footprint.parts, key=lambda name: footprint.parts[name], reverse=True)


def _remedies(part: str, work: Workload) -> list[tuple[str, str]]:
    """Keys that make the part smaller and are not turned yet, with what to do."""
    smaller_batch = (
        "per_device_train_batch_size",
        f"set {max(1, work.rows // 2)} and double gradient_accumulation_steps",
    )
    options = {
        "parameters": [(work.zero_stage < 3, "zero_stage", "set 3 to shard parameters")],
        "gradients": [(work.zero_stage < 2, "zero_stage", "set 2 or 3 to shard gradients")],
        "optimizer": [
            (work.zero_stage < 1, "zero_stage", "set 1 or more to shard the optimizer"),
            ("8bit" not in work.optim, "optim", "set adamw_8bit for smaller moments"),
        ],
        "compute copies": [(work.zero_stage < 3, "zero_stage", "set 3 to shard parameters")],
        "activations": [
            (work.remat in ("none", "dots"), "gradient_checkpointing", "set true"),
            (work.remat == "attention", "remat_policy", "set full"),
            (work.rows > 1, *smaller_batch),
            (work.rows == 1 and not work.samples, "max_length", f"set less than {work.row_length}"),
            (work.rows == 1 and work.samples, "max_completion_length", "lower it"),
        ],
        "frozen": [
            (work.zero_stage < 3, "zero_stage", "set 3 to shard parameters"),
            (work.compute_dtype == "float32", "bf16", "set true: frozen weights are held in the compute dtype"),
        ],
        "reference": [(True, "beta", "set 0, which needs no reference")],
        "rollouts": [(True, "mesh_tensor", "raise it: weights are whole on each device but for that axis")],
        "logits": [(work.loss_chunk_size > 256, "loss_chunk_size", f"set {work.loss_chunk_size // 2} or less")],
    }
    sharding_helps = work.state_shards > 1
    return [(key, text) for useful, key, text in options[part] if useful and (key != "zero_stage" or sharding_helps)]
