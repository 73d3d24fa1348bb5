"""Every attention against the plain one: kernels of GPUs and TPUs as Pallas interprets them, cuDNN by its contract."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AxisType, Mesh

from r1jax.batch import Layout
from r1jax.models.attention import backends, blocks, cudnn, pallas, splash
from r1jax.models.attention.backends import Attend, Backend, Device, choose, spread, why_not
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import init_params
from r1jax.models.transformer import RematPolicy, forward
from tests.models.test_attention import layout_of, normal

# Documents of each row, row length, query heads, key heads, head size.
CASES = {
    "ratio 1": ([[50, 3, 1], [70]], 77, 2, 2, 64),
    "ratio 2, past a block": ([[130, 70, 56, 1]], 257, 4, 2, 64),
    "ratio 4, one document": ([[140], [9, 9]], 140, 4, 1, 128),
    "ratio 8, ends on ends of blocks": ([[1, 127, 128], [200, 1]], 256, 8, 1, 64),
}
INTERPRETED: dict[str, Attend] = {
    "pallas": functools.partial(pallas.attend, interpret=True),
    "splash": functools.partial(splash.attend, interpret=True),
}
HOPPER, AMPERE, TPU, CPU = Device("gpu", (9, 0)), Device("gpu", (8, 0)), Device("tpu"), Device("cpu")


def case_of(name: str) -> tuple[Layout, list[np.ndarray]]:
    """(layout with its documents counted, [q, k, v, gradient of the output])"""
    rows, length, heads, kv_heads, width = CASES[name]
    shapes = [(len(rows), length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    layout = layout_of(rows, length)
    arrays = [normal(shape, seed) for seed, shape in enumerate(shapes)]
    arrays[3] *= (layout.segment_ids > 0)[..., None, None]  # no loss reads padding
    return jax.tree.map(jnp.asarray, layout).counted(max(map(len, rows)) + 1), arrays


@functools.partial(jax.jit, static_argnames="attend")
def results(attend: Attend, layout: Layout, arrays: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Output and gradients of q, k, v; the output's padding as 0."""
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, layout), *arrays[:3])
    inside = (layout.segment_ids > 0)[..., None, None]
    return jnp.where(inside, out, 0), *pull(arrays[3])


def assert_same(ours: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    for one, other in zip(ours, expected, strict=True):
        difference = np.linalg.norm(np.asarray(one, np.float64) - np.asarray(other, np.float64))
        assert difference <= tolerance * np.linalg.norm(np.asarray(other, np.float64))


@pytest.mark.parametrize("name", INTERPRETED)
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_plain_attention(case: str, name: str):
    """float32: output and gradients within 1e-5 of the norm, packed rows, odd lengths, grouped heads."""
    layout, arrays = case_of(case)
    assert_same(results(INTERPRETED[name], layout, arrays), results(blocks.attend, layout, arrays), 1e-5)


@jax.jit
def over_documents(q: jax.Array, k: jax.Array, v: jax.Array, document: jax.Array, key_at: jax.Array) -> jax.Array:
    """Causal attention within each document over the buffers of all rows, in which query i is of document[i] (0: none)
    and its own key is number key_at[i]; not-a-number where there is no document."""
    q, *kv = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in (q, k, v))
    k, v = (jnp.repeat(leaf, q.shape[1] // leaf.shape[1], axis=1)[key_at] for leaf in kv)
    later = jnp.arange(len(document))[:, None] >= jnp.arange(len(document))
    sees = (document[:, None] == document) & later
    scores = jnp.where(sees, jnp.einsum("tnh,snh->nts", q, k) * q.shape[-1] ** -0.5, -1e30)
    out = jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores), v)
    return jnp.where(document[:, None, None] > 0, out, jnp.nan)


def cudnn_by_contract(written: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """What cuDNN computes of the lengths and offsets that JAX hands it: documents lie one behind the other in one
    buffer, each at its offset in elements. written: what it leaves of a gradient where it writes nothing."""
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")

    def places(q: jax.Array, k: jax.Array, lengths: jax.Array, offsets: jax.Array | None) -> tuple[np.ndarray, ...]:
        """`over_documents`' last two."""
        rows, length, heads, width = q.shape
        starts = np.arange(rows) * length
        of_q, of_k, counts = starts, starts, np.asarray(lengths).ravel()
        if offsets is not None:
            fixed = module._fix_seqlen_offsets(lengths, lengths, offsets, offsets, q, k)
            counts, _, of_q, of_k = (np.asarray(leaf).ravel() for leaf in fixed)
            of_q, of_k = of_q // (heads * width), of_k // (k.shape[2] * width)
        document, key_at = np.zeros((2, rows * length), np.int32)
        for number, (at, key, n) in enumerate(zip(of_q, of_k, counts, strict=False), 1):
            document[at : at + n], key_at[at : at + n] = number, np.arange(key, key + n)
        return document, key_at

    def entry(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert mask_type == module.MaskType.PADDING_CAUSAL
        assert scale == q.shape[-1] ** -0.5
        assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
        where = places(q, k, q_seqlen, q_offsets)

        @jax.custom_vjp
        def attention(*given: jax.Array) -> jax.Array:
            return over_documents(*given, *where).reshape(q.shape)

        def forward(*given: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            return attention(*given), given

        def backward(given: tuple[jax.Array, ...], out_grad: jax.Array) -> tuple[jax.Array, ...]:
            pull = jax.vjp(lambda *given: over_documents(*given, *where).reshape(q.shape), *given)[1]
            return tuple(written(leaf) for leaf in pull(out_grad))

        attention.defvjp(forward, backward)
        return attention(q, k, v)

    return entry


@pytest.mark.parametrize("case", CASES)
def test_cudnn_is_told_where_documents_lie(case: str, monkeypatch: pytest.MonkeyPatch):
    """By the contract of JAX's private entry and the conversion that JAX itself makes of it, which needs no GPU; the
    kernel itself has a test of its own on GPUs. What is not written must reach neither output nor gradients."""
    layout, arrays = case_of(case)
    inside = (layout.segment_ids > 0)[..., None, None]

    def written(leaf: jax.Array) -> jax.Array:
        odd = ((0, 0), (0, leaf.shape[1] - inside.shape[1]), (0, 0), (0, 0))
        return jnp.where(jnp.pad(inside, odd), leaf, jnp.nan)

    entry = cudnn_by_contract(written)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.dot_product_attention", entry)
    out, pull = jax.vjp(lambda q, k, v: cudnn.attend(q, k, v, layout), *map(jnp.asarray, arrays[:3]))
    assert not np.asarray(out)[np.asarray(layout.segment_ids) == 0].any()
    assert_same((out, *pull(jnp.asarray(arrays[3]))), results(blocks.attend, layout, arrays), 1e-5)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11, 1), reason="this jax has it right")
def test_an_older_jax_needs_a_key_head_for_each_query_head():
    """Why `attend` repeats heads there: the place of a document's keys comes out in the queries' stride."""
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    q, k = jnp.zeros((1, 8, 4, 8)), jnp.zeros((1, 8, 2, 8))
    lengths, offsets = jnp.asarray([[3, 5]]), jnp.asarray([[0, 3, -1]])
    *_, of_q, of_k = module._fix_seqlen_offsets(lengths, lengths, offsets, offsets, q, k)
    assert (int(of_q[0, 1]), int(of_k[0, 1])) == (3 * 4 * 8, 3 * 4 * 8)  # of_k should be 3 * 2 * 8


def test_documents_by_hand():
    """Rows of 2 and 3 tokens and of none, in five; one of four, a row of padding."""
    segments = np.asarray([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]], np.int32)
    layout = Layout(segment_ids=jnp.asarray(segments), positions=None).counted(3)
    lengths, starts = cudnn.documents(layout)
    assert lengths.tolist() == [[2, 3, -1], [4, -1, -1], [-1, -1, -1]]
    assert starts.tolist() == [[0, 2, -1], [0, -1, -1], [-1, -1, -1]]


@pytest.mark.parametrize("shape", [(4, 2, 1, 1), (2, 1, 1, 2), (1, 2, 1, 4)])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_eight_devices_equal_one(shape: tuple[int, ...], kv_heads: int):
    """A kernel under shard_map: rows over data and fsdp, heads over tensor, also where key heads are fewer."""
    mesh = Mesh(
        np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("data", "fsdp", "context", "tensor"),
        axis_types=(AxisType.Auto,) * 4,
    )  # fmt: skip
    rows = [[9, 4], [13], [5, 5, 5], [], [16], [1, 2, 3], [8, 8], [2]]
    layout = jax.tree.map(jnp.asarray, layout_of(rows, 16)).counted(3)
    shapes = [(8, 16, n, 8) for n in (4, kv_heads, kv_heads, 4)]
    arrays = [jnp.asarray(normal(shape, seed)) for seed, shape in enumerate(shapes)]
    arrays[3] = jnp.where((layout.segment_ids > 0)[..., None, None], arrays[3], 0)
    spread_out = spread(blocks.attend, mesh, ("fsdp", "data"))
    assert_same(results(spread_out, layout, arrays), results(blocks.attend, layout, arrays), 1e-6)


def answer_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's checks of what cuDNN can do find a Hopper where they would ask a GPU."""
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91_300)
    monkeypatch.setattr(f"{module}.check_compute_capability", lambda capability: True)
    monkeypatch.setattr(f"{module}.is_cuda_compute_capability_equal", lambda capability: False)


FORWARD_KERNELS = {"pallas": "pallas_call mha_forward", "splash": "pallas_call splash_mha_fwd", "cudnn": cudnn.FORWARD}


def kernels_of(jaxpr: Any) -> Iterator[str]:
    """The names of all operations of a program, a kernel's own name behind it."""
    for equation in jaxpr.eqns:
        kernel = equation.params.get("name_and_src_info", equation.params.get("name", ""))
        yield f"{equation.primitive.name} {kernel}"
        if equation.primitive.name != "pallas_call":
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from kernels_of(inner)


@pytest.mark.parametrize("name", FORWARD_KERNELS)
@pytest.mark.parametrize(("remat", "times"), [("full", 2), ("attention", 1), ("dots", 1)])
def test_remat_policies_keep_what_a_kernel_gives(
    name: str, remat: RematPolicy, times: int, monkeypatch: pytest.MonkeyPatch
):
    """How often the forward kernel stands in the gradient's program: with its output and sums kept, once. cuDNN's is
    only traced, which JAX does without a GPU once it does not ask for one."""
    answer_as_a_gpu(monkeypatch)
    attend = {"cudnn": cudnn.attend, **INTERPRETED}[name]
    config = DecoderConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=64,
        norm_eps=1e-6, rope_theta=1e4, tied_embeddings=True,
    )  # fmt: skip
    layout = jax.tree.map(jnp.asarray, layout_of([[100, 28]], 128)).counted(8)
    tokens = jnp.zeros((1, 128), jnp.int32)

    def loss(params):
        hidden = forward(params, tokens, layout, config, dtype=jnp.bfloat16, remat=remat, attend=attend)
        return jnp.sum(hidden.astype(jnp.float32))

    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    assert sum(found.startswith(FORWARD_KERNELS[name]) for found in kernels_of(used)) == times


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        (HOPPER, "bfloat16", 128, "cudnn"),
        (HOPPER, "bfloat16", 96, "cudnn"),
        (HOPPER, "float32", 128, "xla"),
        (AMPERE, "bfloat16", 64, "pallas"),
        (AMPERE, "bfloat16", 96, "xla"),
        (Device("gpu", (7, 5)), "bfloat16", 64, "xla"),
        (Device("gpu"), "bfloat16", 64, "xla"),  # not NVIDIA's
        (TPU, "bfloat16", 64, "splash"),
        (TPU, "float32", 64, "splash"),
        (CPU, "bfloat16", 64, "xla"),
    ],
)
def test_the_fastest_that_runs_is_chosen(device: Device, dtype: str, head_dim: int, expected: Backend):
    assert choose(device, dtype, head_dim) == expected


def test_what_a_jax_lacks_is_not_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 99, 0))
    assert why_not("cudnn", HOPPER, "bfloat16", 128) == f"jax {jax.__version__} has not been tried"
    assert choose(HOPPER, "bfloat16", 128) == "pallas"
    monkeypatch.setattr(backends.pallas, "_MODULE", "jax.experimental.pallas.ops.gone")
    assert choose(HOPPER, "bfloat16", 128) == "xla"


@contextlib.contextmanager
def hopper() -> Iterator[None]:
    """Programs are traced and lowered for an H200, on a machine without a GPU. Before jax 0.11 Pallas asks for none."""
    if jax.__version_info__ < (0, 11):
        yield
        return
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), axis_types=(), abstract_device=device)):
        yield


@pytest.mark.parametrize("group", [1, 6])
@pytest.mark.parametrize("width", [64, 128])
def test_the_gpu_kernel_lowers_for_cuda(width: int, group: int):
    """Forward and backward become Triton kernels."""
    layout = jax.tree.map(jnp.asarray, layout_of([[130, 70, 56, 1]], 257))
    half = [jax.ShapeDtypeStruct((1, 257, n, width), jnp.bfloat16) for n in (2 * group, 2, 2, 2 * group)]
    with hopper():
        text = results.trace(pallas.attend, layout, half).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize(("length", "documents"), [(256, 8), (257, 8), (257, 1)])
@pytest.mark.parametrize("group", [1, 6])
def test_cudnn_lowers_for_cuda(group: int, length: int, documents: int, monkeypatch: pytest.MonkeyPatch):
    """JAX's own checks pass and forward and backward become cuDNN's calls, also for odd lengths."""
    answer_as_a_gpu(monkeypatch)
    layout = jax.tree.map(jnp.asarray, layout_of([[length - 7], [length]], length)).counted(documents)
    half = [jax.ShapeDtypeStruct((2, length, n, 128), jnp.bfloat16) for n in (2 * group, 2, 2, 2 * group)]
    text = results.trace(cudnn.attend, layout, half).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
