"""The attention of TPUs and the vocabulary loss, compiled for a TPU that is not there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.batch import Layout
from r1jax.models.attention import splash
from r1jax.models.attention.backends import make_attend
from r1jax.objectives.cross_entropy import token_logprobs_and_entropy, weighted_nll
from r1jax.sharding.mesh import BATCH_AXES
from tests.aot.steps import layout_of, tpu_devices

pytestmark = pytest.mark.aot


def compiled_on(function: Any, *shapes: Any, mesh: Mesh | None = None, specs: Any = None) -> Any:
    """function of arrays of (shape, dtype), compiled for one TPU v5e or for a mesh of eight."""
    mesh = mesh or Mesh(tpu_devices(8)[:1], ("one",))
    places = [NamedSharding(mesh, spec) for spec in specs or [PartitionSpec()] * len(shapes)]
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place) for (shape, dtype), place in zip(shapes, places, strict=True)
    ]
    # As runs in bfloat16 have it: the kernel's compiler takes no other precision for bfloat16 operands.
    with jax.default_matmul_precision("default"):
        return jax.jit(function).lower(*given).compile()


def both_ways(attend: Any, q: Any, k: Any, v: Any, segments: Any) -> Any:
    layout = Layout(segment_ids=segments, positions=segments)

    def total(*given: Any) -> Any:
        return jnp.sum(attend(*given, layout).astype(jnp.float32) ** 2)

    return jax.value_and_grad(total, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 8, 64), (12, 2, 128), (8, 1, 64)])
def test_splash_attention_compiles_both_ways(heads: int, kv_heads: int, width: int):
    """Packed rows of 1,000 tokens, which are no multiple of a block: three kernels, and no [T, T] array."""
    shapes = [((2, 1000, n, width), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]
    compiled = compiled_on(functools.partial(both_ways, splash.attend), *shapes, ((2, 1000), jnp.int32))
    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 3
    assert "1024,1024]" not in text


def test_splash_attention_over_a_mesh():
    """Rows over eight devices' data and fsdp axes, heads over tensor; no device sees another's."""
    layout = layout_of({"mesh_fsdp": 4, "mesh_tensor": 2}, 3, 8)
    attend = make_attend("splash", layout.mesh, BATCH_AXES)
    heads, rows = PartitionSpec(BATCH_AXES, None, "tensor"), PartitionSpec(BATCH_AXES)
    shapes = [((4, 512, n, 64), jnp.bfloat16) for n in (8, 4, 4)]
    compiled = compiled_on(
        functools.partial(both_ways, attend), *shapes, ((4, 512), jnp.int32), mesh=layout.mesh,
        specs=[heads, heads, heads, rows],
    )  # fmt: skip
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    assert not any(name in text for name in ("all-gather(", "all-to-all("))


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_memory_of_a_large_loss(kind: str):
    """16k tokens x 152k ids in bfloat16: at most 5 % of the float32 logits beside arguments and results."""
    tokens, width, vocab = 16_384, 1536, 151_936

    def loss(hidden: Any, vectors: Any, targets: Any, weights: Any) -> Any:
        if kind == "sft":
            return weighted_nll(hidden, vectors.T, targets, weights)[0]
        return jnp.sum(weights * token_logprobs_and_entropy(hidden, vectors.T, targets)[0])

    shapes = [((1, tokens, width), jnp.bfloat16), ((vocab, width), jnp.bfloat16)]
    shapes += [((1, tokens), jnp.int32), ((1, tokens), jnp.float32)]
    compiled = compiled_on(jax.grad(loss, (0, 1)), *shapes)
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.05 * 4 * tokens * vocab
