"""Which attention a run uses, chosen once, and how it is spread over a mesh."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from r1jax.batch import Layout
from r1jax.models.attention import blocks, cudnn, pallas
from r1jax.models.attention.cached import Cached, cached_attention

Attend = Callable[[Array, Array, Array, Layout], Array]
"""(q [B, T, N, H], k and v [B, T, K, H], layout) -> [B, T, N, H]: causal within each document; what stands in padding
is finite and read by nobody."""
Backend = Literal["xla", "cudnn", "pallas", "splash"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
COUNTING: tuple[Backend, ...] = ("cudnn",)
"""Those that must be told how many documents a row has at most (`PackedBatch.max_segments`)."""


class Device(NamedTuple):
    """What of a device the choice depends on."""

    platform: str
    """cpu, gpu or tpu."""
    capability: tuple[int, ...] = ()
    """An NVIDIA GPU's compute capability, (9, 0) for Hopper."""


def device_of(device: Any) -> Device:
    """The choice's view of a JAX device."""
    version = str(getattr(device, "compute_capability", ""))
    numbers = version.replace(".", "").isdigit()
    return Device(str(device.platform), tuple(int(part) for part in version.split(".")) if numbers else ())


def why_not(backend: Backend, device: Device, dtype: str, head_dim: int) -> str | None:
    """What speaks against a backend there, or None."""
    if backend == "xla":
        return None
    if backend == "splash":
        return None if device.platform == "tpu" else "it is for TPUs"
    if device.platform != "gpu" or not device.capability:
        return "it is for NVIDIA GPUs"
    if dtype == "float32":
        return "float32 is computed by plain XLA, to the last bit of its products"
    if backend == "pallas":
        least, reason, fits = (8, 0), pallas.why_not(), head_dim & (head_dim - 1) == 0
    else:
        least, reason, fits = (9, 0), cudnn.why_not(), head_dim % 8 == 0 and head_dim <= 256
    if device.capability < least:
        return f"it needs compute capability {'.'.join(map(str, least))}"
    return reason or (None if fits else f"it takes no heads of {head_dim}")


def choose(device: Device, dtype: str, head_dim: int) -> Backend:
    """The fastest backend that the device can run."""
    order: tuple[Backend, ...] = ("splash", "cudnn", "pallas", "xla")
    return next(backend for backend in order if why_not(backend, device, dtype, head_dim) is None)


def make_attend(backend: Backend, mesh: Mesh | None = None, batch_axes: tuple[str, ...] = ()) -> Attend:
    """The backend over a mesh, whose batch_axes split the rows: each device its rows and its heads. XLA splits its own;
    a kernel is split by hand."""
    if backend == "xla":
        return blocks.attend
    local = _splash() if backend == "splash" else {"cudnn": cudnn.attend, "pallas": pallas.attend}[backend]
    return local if mesh is None or mesh.size == 1 else spread(local, mesh, batch_axes)


def spread(local: Attend, mesh: Mesh, batch_axes: tuple[str, ...]) -> Attend:
    """local under `shard_map`: rows over batch_axes, heads over tensor."""
    by_head, by_row = PartitionSpec(batch_axes, None, "tensor", None), PartitionSpec(batch_axes)

    def attend(q: Array, k: Array, v: Array, layout: Layout) -> Array:
        if k.shape[2] % mesh.shape["tensor"]:
            # Fewer key heads than devices: each gets those of its query heads.
            k, v = (jnp.repeat(leaf, q.shape[2] // leaf.shape[2], axis=2) for leaf in (k, v))
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head, check_vma=False
        )
        return mapped(q, k, v, layout)

    return attend


def make_cached(backend: Backend, head_dim: int, mesh: Mesh | None = None) -> Cached:
    """Generation's attention beside a backend, over a mesh of slots and tensor: with a kernel of its own where the
    backend is a GPU's."""
    if backend not in ("cudnn", "pallas"):
        return cached_attention
    try:  # here, as splash attention is
        from r1jax.models.attention import filled
    except ImportError:  # a later jax without Pallas' Triton, which 0.12 calls deprecated
        return cached_attention
    if not filled.fits(head_dim):
        return cached_attention
    return filled.cached_attention if mesh is None or mesh.size == 1 else spread_cached(filled.cached_attention, mesh)


def spread_cached(local: Cached, mesh: Mesh) -> Cached:
    """local under `shard_map`: rows and their prompts over slots, heads over tensor."""
    by_head, by_prompt = PartitionSpec("slots", "tensor"), PartitionSpec("slots")
    caches = (by_head, by_head)

    def attend(q: Array, prompt: Any, completion: Any, lengths: Array, step: Array) -> Array:
        if prompt[0].shape[1] % mesh.shape["tensor"]:
            # Key heads are whole on every device and query heads are not: XLA's to sort out.
            return cached_attention(q, prompt, completion, lengths, step)
        specs = (by_head, caches, caches, by_prompt, PartitionSpec())
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=False)
        return mapped(q, prompt, completion, lengths, step)

    return attend


def is_kernel(primitive: Any, *avals: Any, **params: Any) -> bool:
    """A remat policy: keep what a fused kernel's forward pass gives, its sums of the softmax with the output, without
    which the backward pass would run it again. Splash attention names its own."""
    del avals
    if primitive.name == "custom_vjp_call":  # the Pallas kernel's forward pass calls the differentiable function again
        return pallas.FORWARD in str(params.get("call_jaxpr", ""))
    return primitive.name == cudnn.FORWARD


@functools.cache
def _splash() -> Attend:
    # Imported here: the kernel's module takes time that only TPUs should pay for.
    from r1jax.models.attention import splash

    return splash.attend
