"""The decoder's forward pass over packed rows: pure functions of a parameter tree, layers scanned.

`constrain(kind, tree)` is how a caller pins shardings without the model knowing of any: kind "activations" is the
[B, T, D] stream, "layer" one layer's parameters, "ends" the parameters outside the layers, "lookup" the embedding as
tokens are looked up in it. The default does nothing.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from r1jax.batch import Layout
from r1jax.models.attention.backends import Attend, is_kernel
from r1jax.models.attention.blocks import attend
from r1jax.models.config import DecoderConfig
from r1jax.models.lora import Dropout, folded, make_dropout, undropped
from r1jax.models.parameters import Params
from r1jax.models.rope import rotate, rotation

Constrain = Callable[[str, Any], Any]
RematPolicy = Literal["none", "full", "attention", "dots"]


def _is_costly_product(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Whether an operation is a product without batch dimensions that costs more to do again than to keep.

    An adapter's (x A) B is not: with it kept beside x W, factors in all projections took half as much memory again
    (SmolLM2's layers on CPU: 309 MiB instead of 206, for 1 % more operations).
    """
    if primitive is not jax.lax.dot_general_p:
        return False
    (contracted, _), (batched, _) = params["dimension_numbers"]
    depth = math.prod(avals[0].shape[dim] for dim in contracted)
    return not batched and 8 * depth > avals[1].size // depth


_of_attention = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names("attention_output"), is_kernel
)
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _of_attention,
    "dots": jax.checkpoint_policies.save_from_both_policies(_is_costly_product, _of_attention),
}


def unconstrained(kind: str, tree: Any) -> Any:
    """The tree itself: leaves every sharding to the compiler."""
    del kind
    return tree


def cast(params: Params, dtype: jnp.dtype | type) -> Params:
    """Every leaf in dtype, an adapter's scale in its B: done while leaves are still sharded, so that gathering them
    moves the fewer bytes."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), folded(params))


def prepare(params: Params, dtype: jnp.dtype | type, constrain: Constrain = unconstrained) -> Params:
    """Parameters as a forward pass reads them: in dtype, those outside the layers gathered once for both their uses."""
    params = cast(params, dtype)
    ends = constrain("ends", {name: leaf for name, leaf in params.items() if name != "layers"})
    return {**ends, "layers": params["layers"]}


def rms_norm(x: Float[Array, "*shape D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*shape D"]:
    """x over its root mean square, computed in float32, times scale (Zhang and Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale


def linear(
    params: Params,
    x: Float[Array, "*shape"],
    drop: Callable[[Array], Array] = lambda x: x,
    *,
    over: int = 1,
    out: tuple[int, ...] = (-1,),
) -> Float[Array, "*result"]:
    """x @ kernel, plus the bias and an adapter's drop(x) @ A @ B where they are: sums over the last `over` dimensions
    of x, and dimensions `out` in their place.

    So a TPU has heads where its attention reads them, and copies nothing: a fifth of what its compiler expects of
    Qwen3-0.6B's update (tests/aot/updates.py). Elsewhere it is the product of the same two matrices.
    """
    # Flattened to two dimensions: XLA on CPU copies a transposed [B, T, D] for the weight gradient, and the MLP's
    # forward and backward took 214 ms instead of 133 (2048 tokens x 576 x 1536, two cores).
    rest, inner = x.shape[: x.ndim - over], x.shape[x.ndim - over :]
    y = jnp.tensordot(x.reshape(-1, *inner), params["kernel"].reshape(*inner, *out), over)
    if "lora_a" in params:
        # Two thin products beside the frozen one: the gradient of a [D, out] matrix never exists.
        rank = params["lora_a"].shape[-1]
        thin = jnp.tensordot(drop(x).reshape(-1, *inner), params["lora_a"].reshape(*inner, rank), over)
        y = y + jnp.tensordot(thin, params["lora_b"].reshape(rank, *out), 1)
    y = y.reshape(*rest, *y.shape[1:])
    return y + params["bias"].reshape(out) if "bias" in params else y


def heads_of(
    params: Params,
    x: Float[Array, "B T D"],
    rope: tuple[Array, ...],
    config: DecoderConfig,
    drop: Dropout = undropped,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries, keys and values by head; q and k normed (Qwen3) and rotated."""
    q, k, v = (linear(params[name], x, partial(drop, name), out=(-1, config.head_dim)) for name in "qkv")
    if config.qk_norm:
        q = rms_norm(q, params["q_norm"]["scale"], config.norm_eps)
        k = rms_norm(k, params["k_norm"]["scale"], config.norm_eps)
    return rotate(q, *rope), rotate(k, *rope), v


def mlp(params: Params, x: Float[Array, "B T D"], drop: Dropout = undropped) -> Float[Array, "B T D"]:
    """SwiGLU (Shazeer 2020)."""
    gate, up = (linear(params[name], x, partial(drop, name)) for name in ("gate", "up"))
    return linear(params["down"], jax.nn.silu(gate) * up, partial(drop, "down"))


def layer(
    params: Params,
    x: Float[Array, "B T D"],
    layout: Layout,
    rope: tuple[Array, ...],
    config: DecoderConfig,
    drop: Dropout = undropped,
    attend: Attend = attend,
) -> tuple[Float[Array, "B T D"], None]:
    """The stream after one layer, and its auxiliary loss (None: dense layers have none)."""
    # The names stand in profiles (docs/performance.md).
    with jax.named_scope("attention"):
        normed = rms_norm(x, params["input_norm"]["scale"], config.norm_eps)
        q, k, v = heads_of(params["attention"], normed, rope, config, drop)
        x = x + linear(params["attention"]["o"], attend(q, k, v, layout), partial(drop, "o"), over=2)
    with jax.named_scope("mlp"):
        normed = rms_norm(x, params["post_attention_norm"]["scale"], config.norm_eps)
        return x + mlp(params["mlp"], normed, drop), None


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    layout: Layout,
    config: DecoderConfig,
    *,
    dtype: jnp.dtype | type = jnp.float32,
    remat: RematPolicy = "none",
    attend: Attend = attend,
    constrain: Constrain = unconstrained,
    perturb: Callable[[Array], Array] = lambda embedded: embedded,
    dropout: tuple[float, PRNGKeyArray] | None = None,
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, in dtype; multiply by `output_kernel` for logits.

    remat says what the backward pass keeps of each layer: "none" keeps everything, "full" only the layer's input,
    "attention" that and the attention output, "dots" the results of matrix products and attention: what is cheap to
    recompute goes, and with it more than half the memory (SmolLM2-135M, 4 x 512 tokens: 4.2 GB to 1.6, no slower).
    perturb is applied to the embedded tokens. dropout: (rate, key) of what an adapter sees.
    """
    params = cast(params, dtype)
    rope = rotation(config, layout.positions)
    embedded = constrain("lookup", params["embed"]["embedding"])[tokens]
    x = constrain("activations", perturb(embedded))

    def body(x: Array, part: tuple[Params, Array | None]) -> tuple[Array, None]:
        layer_params, key = part
        drop = undropped if dropout is None or key is None else make_dropout(key, dropout[0])
        y, aux = layer(constrain("layer", layer_params), x, layout, rope, config, drop, attend)
        return constrain("activations", y), aux

    if remat != "none":
        # prevent_cse is for code outside a scan; inside one it only blocks fusion.
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    keys = None if dropout is None else jax.random.split(dropout[1], config.num_layers)
    x, _ = jax.lax.scan(body, x, (params["layers"], keys))
    return rms_norm(x, params["final_norm"]["scale"], config.norm_eps)


def output_kernel(params: Params) -> Float[Array, "D V"]:
    """The vocabulary projection: the embedding transposed where they are tied."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["embed"]["embedding"].T


@jax.named_scope("vocabulary")
def logits(params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """All logits at once in float32; for tests and sampling, never for a training loss."""
    kernel = output_kernel(params).astype(hidden.dtype)
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
