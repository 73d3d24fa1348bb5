import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Layout
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import init_params
from r1jax.models.transformer import RematPolicy, forward, linear, logits, mlp, output_kernel, rms_norm

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    rope_theta=1e4,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    tied_embeddings=True,
    initializer_range=0.2,
)
DOCUMENTS = [90, 37, 1, 60]
ROOM = 200
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def params() -> Tree:
    """Fresh parameters with noise on every leaf, so that no bias is 0 and no norm scale 1."""
    rng = np.random.default_rng(1)

    def disturb(leaf: jax.Array) -> jax.Array:
        return leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree.map(disturb, init_params(CONFIG, jax.random.key(0)))


def rows_of(documents: list[np.ndarray], length: int) -> tuple[np.ndarray, Layout]:
    """One row: the documents behind each other, then padding."""
    row, segments, positions = (np.zeros((1, length), np.int32) for _ in range(3))
    start = 0
    for number, document in enumerate(documents, 1):
        part = np.s_[0, start : start + len(document)]
        row[part], segments[part], positions[part] = document, number, np.arange(len(document))
        start += len(document)
    return row, Layout(segment_ids=segments, positions=positions)


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, CONFIG.vocab_size, size, dtype=np.int32) for size in DOCUMENTS]


run = jax.jit(forward, static_argnums=3, static_argnames=("dtype", "remat"))


def score(
    params: Tree, tokens: jax.Array, layout: Layout, weights: jax.Array, remat: RematPolicy
) -> tuple[jax.Array, jax.Array]:
    """A loss that reads every real token's hidden state differently, and the hidden states."""
    hidden = forward(params, tokens, layout, CONFIG, remat=remat)
    return jnp.sum(jnp.where((layout.segment_ids > 0)[..., None], hidden * weights, 0.0)), hidden


gradients = jax.jit(jax.grad(score, has_aux=True), static_argnames="remat")


def relative_distance(ours: Tree, theirs: Tree) -> float:
    """The largest, over leaves, of |ours - theirs| / |theirs|."""
    distances = jax.tree.map(lambda a, b: jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()), ours, theirs)
    return max(float(x) for x in jax.tree.leaves(distances))


def test_packed_documents_equal_separate_documents(params: Tree, documents: list[np.ndarray]):
    weights = np.random.default_rng(3).normal(size=(1, ROOM, CONFIG.hidden_size)).astype(np.float32)
    tokens, layout = rows_of(documents, ROOM)
    separate = [rows_of([document], max(DOCUMENTS)) for document in documents]
    alone_tokens = np.concatenate([row for row, _ in separate])
    alone_layout = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[layout for _, layout in separate])
    alone_weights = np.zeros((len(documents), max(DOCUMENTS), CONFIG.hidden_size), np.float32)
    start = 0
    for number, size in enumerate(DOCUMENTS):
        alone_weights[number, :size] = weights[0, start : start + size]
        start += size
    ours, packed = gradients(params, tokens, layout, weights, remat="none")
    theirs, alone = gradients(params, alone_tokens, alone_layout, alone_weights, remat="none")
    together = np.concatenate([alone[number, :size] for number, size in enumerate(DOCUMENTS)])
    np.testing.assert_allclose(packed[0, : sum(DOCUMENTS)], together, atol=1e-5)
    assert relative_distance(ours, theirs) < 1e-5


def test_padding_and_segment_numbers_change_nothing(params: Tree, documents: list[np.ndarray]):
    tokens, layout = rows_of(documents, ROOM)
    real = np.asarray(layout.segment_ids[0] > 0)
    before = np.asarray(run(params, tokens, layout, CONFIG))[0, real]
    rubbish = np.where(real[None], tokens, 7)
    renumbered = dataclasses.replace(layout, segment_ids=np.where(real[None], 9 - layout.segment_ids, 0))
    np.testing.assert_array_equal(np.asarray(run(params, rubbish, renumbered, CONFIG))[0, real], before)


def test_a_later_token_changes_nothing_earlier(params: Tree):
    tokens = np.random.default_rng(4).integers(0, 61, (1, ROOM), dtype=np.int32)
    layout = Layout(segment_ids=np.ones_like(tokens), positions=np.arange(ROOM, dtype=np.int32)[None])
    other = tokens.copy()
    other[0, 130] = (other[0, 130] + 1) % 61
    before, after = (np.asarray(run(params, row, layout, CONFIG))[0] for row in (tokens, other))
    np.testing.assert_array_equal(before[:130], after[:130])
    assert (np.abs(before[130:] - after[130:]).max(axis=-1) > 1e-4).all()


def test_only_distances_between_positions_matter(params: Tree, documents: list[np.ndarray]):
    tokens, layout = rows_of(documents, ROOM)
    before = np.asarray(run(params, tokens, layout, CONFIG))
    shifted = dataclasses.replace(layout, positions=layout.positions + np.int32(500))
    # Angles near 500 are rounded to 3e-5 in float32.
    np.testing.assert_allclose(run(params, tokens, shifted, CONFIG), before, atol=1e-3)
    stretched = dataclasses.replace(layout, positions=layout.positions * np.int32(2))
    assert np.abs(np.asarray(run(params, tokens, stretched, CONFIG)) - before).max() > 0.1


def test_remat_policies_change_cost_but_no_gradient(params: Tree, documents: list[np.ndarray]):
    tokens, layout = rows_of(documents[1:3], 64)
    weights = np.random.default_rng(3).normal(size=(1, 64, CONFIG.hidden_size)).astype(np.float32)
    plain, _ = gradients(params, tokens, layout, weights, remat="none")
    flops = {}
    policies: tuple[RematPolicy, ...] = ("none", "dots", "attention", "full")
    for remat in policies:
        lowered: Any = gradients.lower(params, tokens, layout, weights, remat=remat)
        flops[remat] = lowered.cost_analysis()["flops"]
        compiled = lowered.compile()
        assert relative_distance(compiled(params, tokens, layout, weights)[0], plain) < 1e-6, remat
    # What is not kept is computed again; which of the two in the middle costs more depends on the length.
    assert flops["none"] < min(flops["dots"], flops["attention"])
    assert max(flops["dots"], flops["attention"]) < flops["full"]


def test_bf16_is_near_fp32(params: Tree, documents: list[np.ndarray]):
    tokens, layout = rows_of(documents, ROOM)
    exact = run(params, tokens, layout, CONFIG)
    narrow = run(params, tokens, layout, CONFIG, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    # 2^-8 a rounding, some tens of roundings in two layers.
    assert relative_distance({"hidden": narrow.astype(jnp.float32)}, {"hidden": exact}) < 0.03


def test_constrain_sees_the_stream_and_each_layer(params: Tree, documents: list[np.ndarray]):
    seen = []

    def constrain(kind: str, tree: Any) -> Any:
        seen.append((kind, jax.tree.map(jnp.shape, tree)))
        return tree

    tokens, layout = rows_of(documents, ROOM)
    jax.eval_shape(partial(forward, config=CONFIG, constrain=constrain), params, tokens, layout)
    stream = ("activations", (1, ROOM, CONFIG.hidden_size))
    one_layer = ("layer", jax.tree.map(lambda leaf: leaf.shape[1:], params["layers"]))
    lookup = ("lookup", params["embed"]["embedding"].shape)
    assert seen == [lookup, stream, one_layer, stream]


def test_rms_norm_worked_by_hand():
    # Mean square of (3, 4) is 12.5; with eps 3.5 the root is 4.
    np.testing.assert_allclose(rms_norm(jnp.asarray([3.0, 4.0]), jnp.asarray([2.0, 1.0]), 3.5), [1.5, 1.0], rtol=1e-6)


def test_mlp_and_linear_worked_by_hand():
    def dense(kernel: list[list[float]], bias: list[float]) -> Tree:
        return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}

    x = jnp.ones((1, 1, 2))
    np.testing.assert_allclose(linear(dense([[1.0], [2.0]], [0.5]), x).ravel(), [3.5])
    # gate = 1 + 1 - 2 + ln 3 = ln 3, silu(ln 3) = 3/4 ln 3; up = 4; down: times 2, plus 1.
    gate = dense([[1.0], [1.0]], [float(np.log(3.0)) - 2.0])
    params = {"gate": gate, "up": dense([[1.0], [3.0]], [0.0]), "down": dense([[2.0, 0.0]], [1.0, 0.0])}
    np.testing.assert_allclose(mlp(params, x).ravel(), [6 * np.log(3.0) + 1, 0.0], rtol=1e-6)


def test_output_kernel_is_the_head_or_the_embedding_transposed():
    embedding, head = jnp.arange(6.0).reshape(3, 2), jnp.ones((2, 3))
    tied, untied = {"embed": {"embedding": embedding}}, {"embed": {"embedding": embedding}, "lm_head": {"kernel": head}}
    np.testing.assert_array_equal(output_kernel(tied), embedding.T)
    np.testing.assert_array_equal(output_kernel(untied), head)
    hidden = jnp.asarray([[[1.0, 2.0]]])
    np.testing.assert_array_equal(logits(tied, hidden)[0, 0], [2.0, 8.0, 14.0])
    assert logits(untied, hidden.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("adapted", [False, True])
def test_linear_takes_and_gives_heads_as_it_does_their_numbers_in_a_row(adapted: bool):
    """[B, T, 3, 4] to [B, T, 5, 2], as [B, T, 12] to [B, T, 10], bit for bit; with an adapter and its dropout."""
    draw = np.random.default_rng(0).normal
    sizes = {"kernel": (12, 10), "bias": (10,)} | ({"lora_a": (12, 2), "lora_b": (2, 10)} if adapted else {})
    params = {name: jnp.asarray(draw(size=size), jnp.float32) for name, size in sizes.items()}
    x = jnp.asarray(draw(size=(2, 7, 3, 4)), jnp.float32)

    def drop(x: Any) -> Any:
        return jnp.where(jnp.arange(x.size).reshape(x.shape) % 3 > 0, x, 0.0)

    found = linear(params, x, drop, over=2, out=(-1, 2))
    assert found.shape == (2, 7, 5, 2)
    np.testing.assert_array_equal(found.reshape(2, 7, 10), linear(params, x.reshape(2, 7, 12), drop))
    wanted = np.asarray(x).reshape(2, 7, 12) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    if adapted:
        wanted += np.asarray(drop(x)).reshape(2, 7, 12) @ np.asarray(params["lora_a"]) @ np.asarray(params["lora_b"])
    np.testing.assert_allclose(found.reshape(2, 7, 10), wanted, rtol=1e-4, atol=1e-5)
