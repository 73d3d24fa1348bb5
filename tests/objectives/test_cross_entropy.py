import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.config.mesh import MeshConfig
from r1jax.models.support import Support, supported_logits
from r1jax.objectives.cross_entropy import (
    support_floors,
    token_logprobs,
    token_logprobs_and_entropy,
    weighted_nll,
)
from r1jax.objectives.vocabulary import CHUNK_ELEMENTS, WHOLE_ELEMENTS, default_chunk, tiles_of
from r1jax.sharding.mesh import make_mesh

ROWS, TOKENS, WIDTH, VOCAB = 8, 7, 12, 40
MESHES = [{"mesh_fsdp": 8}, {"mesh_data": 2, "mesh_fsdp": 4}, {"mesh_fsdp": 4, "mesh_tensor": 2}]


def random_case(rows: int = ROWS) -> tuple[np.ndarray, ...]:
    """hidden, kernel, targets, cotangent; the targets include the first and the last of the vocabulary."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, VOCAB, (rows, TOKENS)).astype(np.int32)
    targets[0, 0], targets[-1, -1] = 0, VOCAB - 1
    hidden, kernel = rng.normal(size=(rows, TOKENS, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    weights = rng.uniform(-1, 1, (rows, TOKENS))
    return hidden.astype(np.float32), kernel.astype(np.float32), targets, weights.astype(np.float32)


def by_hand(hidden, kernel, targets, weights):
    """Log-probabilities, is-top and the gradients of sum(weights * logprobs), all logits at once, in float64."""
    wide, columns = hidden.astype(np.float64), kernel.astype(np.float64)
    logits = wide @ columns
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    onehot = np.eye(kernel.shape[1])[targets]
    slope = weights[..., None] * (onehot - np.exp(logprobs))
    kernel_gradient = np.einsum("btd,btv->dv", wide, slope)
    return (logprobs * onehot).sum(-1), logits.argmax(-1) == targets, slope @ columns.T, kernel_gradient


@functools.partial(jax.jit, static_argnums=(4, 5))
def ours(hidden, kernel, targets, weights, chunk, mesh=None):
    """The same four, of our function."""

    def weighted(hidden, kernel):
        logprobs, is_top = token_logprobs(hidden, kernel, targets, chunk, mesh)
        return jnp.sum(weights * logprobs), (logprobs, is_top)

    gradients, values = jax.grad(weighted, argnums=(0, 1), has_aux=True)(hidden, kernel)
    return *values, *gradients


@functools.partial(jax.jit, static_argnums=(4, 5))
def fused(hidden, kernel, targets, weights, chunk, mesh=None):
    """(-sum(weights * logprobs), is top, the gradients of the sum), of the function that makes them together."""

    def weighted(hidden, kernel):
        nll, is_top = weighted_nll(hidden, kernel, targets, weights, chunk, mesh)
        return -nll, is_top

    (value, is_top), gradients = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(hidden, kernel)
    return -value, is_top, *gradients


def fused_by_hand(hidden, kernel, targets, weights):
    logprobs, *rest = by_hand(hidden, kernel, targets, weights)
    return -(weights * logprobs).sum(), *rest


def assert_same(actual, expected, tolerance: float):
    for one, other in zip(actual, expected, strict=True):
        if one.dtype == bool:
            np.testing.assert_array_equal(one, other)
        else:
            error = np.linalg.norm(np.asarray(one, np.float64) - other) / np.linalg.norm(other)
            assert error <= tolerance


def test_three_tokens_by_hand():
    """Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8; slopes are weight * (onehot - softmax)."""
    hidden, kernel = jnp.ones((1, 3, 1)), jnp.log(jnp.asarray([[1.0, 2.0, 5.0]]))
    weights = jnp.asarray([[1.0, 2.0, 0.0]])
    logprobs, is_top, hidden_gradient, kernel_gradient = ours(hidden, kernel, jnp.asarray([[0, 1, 2]]), weights, 2)
    np.testing.assert_allclose(logprobs, np.log([[1 / 8, 2 / 8, 5 / 8]]), rtol=1e-6)
    assert is_top.tolist() == [[False, False, True]]
    first, second = np.asarray([7, -2, -5]) / 8, 2 * np.asarray([-1, 6, -5]) / 8
    np.testing.assert_allclose(kernel_gradient[0], first + second, rtol=1e-6)
    slopes = np.stack([first, second, 0 * first])
    np.testing.assert_allclose(hidden_gradient[0, :, 0], slopes @ np.log([1, 2, 5]), rtol=1e-6)


# Of 56 tokens, against 40 ids: tiles of one id, of 6 and of 10, of all.
@pytest.mark.parametrize("chunk", [1, 9, 14, 56, 1000])
def test_values_and_gradients_for_any_chunk(chunk):
    case = random_case()
    assert_same(ours(*case, chunk), by_hand(*case), 1e-6)
    assert_same(fused(*case, chunk), fused_by_hand(*case), 1e-6)


def test_the_fused_value_without_gradients_and_under_a_factor():
    """What evaluation computes is what training does; a loss multiplied by 3 has three times the gradients."""
    hidden, kernel, targets, weights = (jnp.asarray(leaf) for leaf in random_case())
    nll, is_top, *gradients = fused(hidden, kernel, targets, weights, 9)
    plain, plain_top = jax.jit(weighted_nll, static_argnums=4)(hidden, kernel, targets, weights, 9)
    np.testing.assert_allclose(plain, nll, rtol=1e-6)
    np.testing.assert_array_equal(plain_top, is_top)

    def tripled(hidden, kernel):
        return -3.0 * weighted_nll(hidden, kernel, targets, weights, 9)[0]

    assert_same(jax.grad(tripled, argnums=(0, 1))(hidden, kernel), [3.0 * np.asarray(leaf) for leaf in gradients], 1e-6)


def test_equally_likely_tokens_are_all_top():
    kernel = jnp.asarray([[3.0, 3.0, 1.0]])
    _, is_top = token_logprobs(jnp.ones((1, 3, 1)), kernel, jnp.asarray([[0, 1, 2]]), 3, None)
    assert is_top.tolist() == [[True, True, False]]


def test_large_logits_stay_finite():
    """Logits 1e4 and 0: exp overflows unless the largest is taken off first."""
    hidden, kernel = jnp.full((1, 2, 1), 100.0), jnp.asarray([[100.0, 0.0]])
    logprobs, _, *gradients = ours(hidden, kernel, jnp.asarray([[0, 1]]), jnp.ones((1, 2)), 1)
    assert logprobs.tolist() == [[0.0, -1e4]]
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in gradients)


def test_bfloat16_keeps_float32_logits():
    """Inputs and gradients are bfloat16; sums and log-probabilities are not: 40 equal logits give ln 40 to 1e-6."""
    hidden, kernel, targets, weights = (jnp.asarray(leaf) for leaf in random_case())
    half = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    logprobs, _, *gradients = ours(*half, targets, weights, 16)
    assert logprobs.dtype == jnp.float32 and {leaf.dtype for leaf in gradients} == {jnp.dtype(jnp.bfloat16)}
    # Against float64 on the same rounded inputs: only the gradients are rounded, to 8 bits.
    expected = by_hand(*(np.asarray(leaf.astype(jnp.float32)) for leaf in half), *map(np.asarray, (targets, weights)))
    assert_same([logprobs], [expected[0]], 1e-6)
    assert_same(gradients, expected[2:], 5e-3)
    uniform, _ = token_logprobs(half[0], jnp.zeros_like(half[1]), targets, 16, None)
    np.testing.assert_allclose(uniform, -np.log(VOCAB), rtol=1e-6)


@pytest.mark.parametrize("chunk", [9, 1000])
def test_weights_times_probability(chunk):
    """DFT: the probability multiplies the weight and is a constant for the gradient (float64 by hand, 1e-6).

    The sum cancels: the terms' absolute values sum to 12.6 times its own. Its error is therefore bounded in units of
    theirs: 0.2 to 0.4 float32 epsilon in jax 0.10.2, up to 0.73 (1.1e-6 of the sum) in 0.12, which sums in another
    order.
    """
    hidden, kernel, targets, weights = random_case()
    probabilities = np.exp(by_hand(hidden, kernel, targets, weights)[0])
    scaled = by_hand(hidden, kernel, targets, weights * probabilities)
    terms = weights * probabilities * scaled[0]
    bound = np.finfo(np.float32).eps * np.abs(terms).sum()

    def dft(hidden, kernel):
        given = jnp.asarray(targets), jnp.asarray(weights)
        return weighted_nll(hidden, kernel, *given, chunk, by_probability=True)[0]

    arrays = jnp.asarray(hidden), jnp.asarray(kernel)
    np.testing.assert_allclose(jax.jit(dft)(*arrays), -terms.sum(), rtol=0, atol=bound)
    value, gradients = jax.jit(jax.value_and_grad(dft, argnums=(0, 1)))(*arrays)
    np.testing.assert_allclose(value, -terms.sum(), rtol=0, atol=bound)
    assert_same([-leaf for leaf in gradients], scaled[2:], 1e-6)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def tempered(hidden, kernel, targets, weights, chunk, temperature, mesh=None):
    """(log-probabilities, entropy, is top, the gradients of sum(weights * logprobs)) at a temperature."""

    def weighted(hidden, kernel):
        found = token_logprobs_and_entropy(hidden, kernel, targets, chunk, mesh, temperature=temperature)
        return jnp.sum(weights * found[0]), found

    gradients, values = jax.grad(weighted, argnums=(0, 1), has_aux=True)(hidden, kernel)
    alone, is_top = token_logprobs(hidden, kernel, targets, chunk, mesh, temperature=temperature)
    return *values, alone, is_top, *gradients


def tempered_by_hand(hidden, kernel, targets, weights, temperature):
    """The same: a temperature T is a kernel divided by T, whose gradient is T times ours; entropy in float64."""
    logprobs, is_top, hidden_gradient, kernel_gradient = by_hand(hidden, kernel / temperature, targets, weights)
    logits = hidden.astype(np.float64) @ kernel.astype(np.float64) / temperature
    everything = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    entropy = -(np.exp(everything) * everything).sum(-1)
    return logprobs, entropy, logprobs, is_top, hidden_gradient, kernel_gradient / temperature


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("chunk", [9, 1000])
def test_temperature_and_entropy_for_any_chunk(chunk, temperature):
    hidden, kernel, targets, weights = random_case()
    expected = tempered_by_hand(hidden, kernel, targets, weights, temperature)
    assert_same(tempered(hidden, kernel, targets, weights, chunk, temperature), expected, 1e-6)


def test_entropies_by_hand():
    """Four equal logits: ln 4; logits ln 9 and 0 at temperature 0.5: probabilities 81/82 and 1/82."""
    one = jnp.ones((1, 1, 1))
    _, uniform = token_logprobs_and_entropy(one, jnp.full((1, 4), 3.0), jnp.asarray([[2]]), 1)
    np.testing.assert_allclose(uniform, [[np.log(4)]], rtol=1e-6)
    kernel = jnp.log(jnp.asarray([[9.0, 1.0]]))
    logprobs, entropy = token_logprobs_and_entropy(one, kernel, jnp.asarray([[1]]), 1, temperature=0.5)
    np.testing.assert_allclose(logprobs, [[np.log(1 / 82)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[np.log(82) - 81 / 82 * np.log(81)]], rtol=1e-5)


def test_entropy_of_large_logits_is_finite_and_has_no_gradient():
    hidden, kernel = jnp.full((1, 2, 1), 100.0), jnp.asarray([[100.0, 0.0]])

    def total(hidden, kernel):
        return jnp.sum(token_logprobs_and_entropy(hidden, kernel, jnp.asarray([[0, 1]]), 1)[1])

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(hidden, kernel)
    assert value == 0
    assert all(not leaf.any() for leaf in gradients)


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def renormalised(hidden, kernel, targets, weights, entropy_weights, floor, chunk, temperature, mesh=None):
    """(log-probabilities, entropies, the gradients of the weighted sum of both) over what can
    be drawn."""

    def weighted(hidden, kernel):
        found = token_logprobs_and_entropy(
            hidden, kernel, targets, chunk, mesh, temperature=temperature, floor=floor, entropy_gradient=True
        )
        return jnp.sum(weights * found[0] + entropy_weights * found[1]), found

    gradients, values = jax.grad(weighted, argnums=(0, 1), has_aux=True)(hidden, kernel)
    return *values, *gradients


def renormalised_by_hand(hidden, kernel, targets, weights, entropy_weights, floor, temperature):
    """The same in float64, every logit at once, slopes as they follow from the definitions."""
    wide, columns = hidden.astype(np.float64), kernel.astype(np.float64)
    logits = wide @ columns / temperature
    onehot = np.eye(kernel.shape[1])[targets]
    everything = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    inside = np.ones_like(logits, bool) if floor is None else (everything >= floor[..., None]) | (onehot == 1)
    p = np.where(inside, np.exp(logits), 0.0)
    p /= p.sum(-1, keepdims=True)
    log_p = np.log(np.where(inside, p, 1.0))
    entropy = -(p * log_p).sum(-1)
    slope = weights[..., None] * (onehot - p) - entropy_weights[..., None] * p * (log_p + entropy[..., None])
    slope /= temperature
    kernel_gradient = np.einsum("btd,btv->dv", wide, slope)
    return (log_p * onehot).sum(-1), entropy, slope @ columns.T, kernel_gradient


def with_entropy_weights():
    """`random_case`, a weight for each entropy, and floors that leave one to all tokens."""
    case = random_case()
    rng = np.random.default_rng(1)
    entropy_weights = rng.uniform(-1, 1, case[2].shape).astype(np.float32)
    return *case, entropy_weights, rng.uniform(-6, -0.5, case[2].shape).astype(np.float32)


@pytest.mark.parametrize("has_floor", [False, True])
@pytest.mark.parametrize(("chunk", "temperature"), [(9, 1.0), (1000, 0.7)])
def test_entropy_has_a_gradient_and_floors_leave_tokens_out(has_floor, chunk, temperature):
    hidden, kernel, targets, weights, entropy_weights, floors = with_entropy_weights()
    case = (hidden, kernel, targets, weights, entropy_weights, floors if has_floor else None)
    expected = renormalised_by_hand(*case, temperature)
    assert_same(renormalised(*case, chunk, temperature), expected, 2e-6)
    if has_floor:
        assert expected[1].min() < 1e-9 and expected[1].max() > 2.0  # from the target alone to nearly all


def test_what_was_drawn_counts_though_the_policy_would_not_draw_it():
    """Probabilities 1/8, 2/8, 5/8, all below the floor but the last: the target and that are left, 1/6 and 5/6."""
    hidden, kernel = jnp.ones((1, 1, 1)), jnp.log(jnp.asarray([[1.0, 2.0, 5.0]]))
    logprobs, _ = token_logprobs_and_entropy(hidden, kernel, jnp.asarray([[0]]), 2, floor=jnp.log(jnp.asarray([[0.5]])))
    np.testing.assert_allclose(logprobs, np.log([[1 / 6]]), rtol=1e-6)


SUPPORTS = [Support(top_k=3), Support(top_p=0.6), Support(min_p=0.2), Support(top_k=5, top_p=0.8, min_p=0.1), Support()]


@pytest.mark.parametrize("support", SUPPORTS)
def test_floors_part_what_the_sampler_would_draw(support):
    """Between the least likely token that it keeps and the likeliest that it drops, at the temperature."""
    hidden, kernel = (jnp.asarray(leaf) for leaf in random_case()[:2])
    floors = support_floors(hidden, kernel, 9, None, support, 0.7)
    log_p = jax.nn.log_softmax(hidden @ kernel / 0.7)
    kept = jnp.isfinite(supported_logits(log_p.reshape(-1, VOCAB), support)).reshape(log_p.shape)
    np.testing.assert_array_equal(log_p >= floors[..., None], kept)
    assert kept.all() == (support == Support())


def on_mesh(shape: dict[str, int]):
    """The mesh, and the shardings of hidden, kernel, targets and weights on it."""
    mesh = make_mesh(MeshConfig(**shape))
    rows = PartitionSpec(("fsdp", "data"))
    specs = (rows, PartitionSpec(None, "tensor"), rows, rows)
    return mesh, tuple(NamedSharding(mesh, spec) for spec in specs)


@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_equal_one(shape):
    case = random_case()
    mesh, places = on_mesh(shape)
    sharded = [jax.device_put(leaf, place) for leaf, place in zip(case, places, strict=True)]
    assert_same(ours(*sharded, 4, mesh), [np.asarray(leaf) for leaf in ours(*case, 9)], 1e-6)
    assert_same(fused(*sharded, 4, mesh), [np.asarray(leaf) for leaf in fused(*case, 9)], 1e-6)
    assert_same(tempered(*sharded, 4, 0.7, mesh), [np.asarray(leaf) for leaf in tempered(*case, 9, 0.7)], 1e-6)
    *_, entropy_weights, floor = with_entropy_weights()
    more = [jax.device_put(leaf, places[2]) for leaf in (entropy_weights, floor)]
    found = renormalised(*sharded, *more, 4, 0.7, mesh)
    assert_same(found, [np.asarray(leaf) for leaf in renormalised(*case, entropy_weights, floor, 9, 0.7)], 1e-6)
    floors = jax.jit(support_floors, static_argnums=(2, 3, 4, 5))(*sharded[:2], 4, mesh, SUPPORTS[3], 0.7)
    hidden, kernel = (jnp.asarray(leaf) for leaf in case[:2])
    np.testing.assert_allclose(floors, support_floors(hidden, kernel, 9, None, SUPPORTS[3], 0.7), rtol=1e-5)


def compiled_at(function, rows, tokens, width, vocab, chunk, mesh=None, places=None) -> Any:
    shapes = [((rows, tokens, width), "float32"), ((width, vocab), "float32"), ((rows, tokens), "int32")]
    shapes.append(((rows, tokens), "float32"))
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for (shape, dtype), place in zip(shapes, places or [None] * 4, strict=True)
    ]
    return function.lower(*arguments, chunk, mesh).compile()


BOTH = pytest.mark.parametrize("function", [ours, fused], ids=["general", "fused"])


@BOTH
@pytest.mark.parametrize(("chunk", "whole"), [(256, False), (4096, True)])
def test_logits_are_never_whole(function, chunk, whole):
    """4096 tokens x 8192 ids are 128 MiB of logits; in tiles of 512 ids forward and backward need a fifth. The control,
    one tile of everything, shows that both measurements see whole logits where there are any."""
    compiled = compiled_at(function, 8, 512, 32, 8192, chunk)
    logits_bytes = 4096 * 8192 * 4
    of_logits_shape = re.findall(r"f32\[(?:4096,8192|8192,4096|8,512,8192)\]", compiled.as_text())
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert (temporary >= logits_bytes) == whole
    assert bool(of_logits_shape) == whole
    assert whole or temporary < 0.2 * logits_bytes


@BOTH
@pytest.mark.parametrize("shape", MESHES)
def test_work_is_shared_by_all_devices(function, shape):
    """At most 1.05 x total / 8 FLOPs a device. XLA counts a loop's body once whatever its number of turns, so each
    device (and the single one) gets exactly one tile, which is not made a loop."""
    mesh, places = on_mesh(shape)
    size = {"rows": 8, "tokens": 128, "width": 128, "vocab": 2048}
    flops = compiled_at(function, **size, chunk=1024).cost_analysis()["flops"]
    tokens_per_device = 1024 // (mesh.shape["data"] * mesh.shape["fsdp"])
    compiled = compiled_at(function, **size, chunk=tokens_per_device, mesh=mesh, places=places)
    assert "while(" not in compiled.as_text()
    # The three products that cannot be left out: the logits of one tile are kept for the backward pass.
    assert 2.9 * 2 * 1024 * 128 * 2048 < flops < 3.5 * 2 * 1024 * 128 * 2048
    assert compiled.cost_analysis()["flops"] <= 1.05 * flops / 8


@BOTH
@pytest.mark.parametrize("shape", MESHES)
def test_kernel_gradient_is_summed_over_devices_once(function, shape):
    """Not once a tile: outside the loops, which here turn four times."""
    mesh, places = on_mesh(shape)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    text = compiled_at(function, 8, 128, 48, 512, 1024 // shards // 4, mesh, places).as_text()
    inner, outer = text.split("\nENTRY ")
    gradient = f"f32[{512 // mesh.shape['tensor']},48]"

    def sums(part: str) -> int:
        return sum(" all-reduce(" in line and gradient in line for line in part.splitlines())

    assert "while(" in outer
    assert (sums(inner), sums(outer)) == (0, 1)


def test_tiles_bound_the_logits_and_cover_the_vocabulary():
    """Qwen's vocabulary, as one device of one and of four along the tensor axis sees it."""
    assert tiles_of(16, 151_936) == (1, 151_936)  # whole, though no multiple of the lanes
    for tokens, vocab in ((16_384, 151_936), (4_096, 151_936), (32_768, 37_984), (5_000, 128_256)):
        count, width = tiles_of(tokens, vocab)
        assert tokens * vocab > WHOLE_ELEMENTS and width % 128 == 0
        assert tokens * width <= CHUNK_ELEMENTS + 128 * tokens
        assert (count - 1) * width < vocab <= count * width
        assert default_chunk(tokens, vocab) == CHUNK_ELEMENTS // vocab


@BOTH
def test_memory_of_a_large_loss(function):
    """16k tokens x 152k ids, float32: what forward and backward need beside their arguments and results is at most 5 %
    of the logits, by XLA's own account."""
    compiled = compiled_at(function, 1, 16_384, 64, 151_936, None)
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.05 * 4 * 16_384 * 151_936
