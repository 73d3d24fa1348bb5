"""The loss against a plain reference: sequences one by one in numpy, gradients worked out by hand."""

import dataclasses
import functools
import itertools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import PackedBatch
from r1jax.config.correction import Correction, Mode
from r1jax.models.config import DecoderConfig
from r1jax.models.execution import Execution
from r1jax.models.parameters import init_params
from r1jax.models.transformer import forward, logits
from r1jax.objectives.grpo import make_policy_loss, policy_metrics
from r1jax.objectives.statistics import make_statistics
from r1jax.objectives.surrogate import Level, Surrogate

CONFIG = DecoderConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    norm_eps=1e-6, rope_theta=1e4, tied_embeddings=True, initializer_range=0.2,
)  # fmt: skip
LENGTHS = (9, 5, 12, 4, 7)
PROMPT = 2
TEMPERATURE = 0.7
TOLERANCE = 1e-5  # float32; values and gradients are of order 0.01 to 1


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A prompt of two tokens and a completion."""

    tokens: np.ndarray
    mask: np.ndarray
    advantage: float
    weight: float
    old: np.ndarray
    ref: np.ndarray
    sampler: np.ndarray


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@jax.jit
def plain_logprobs(params, tokens):
    """Of each token but the first, from all logits of one sequence alone."""
    positions = jnp.arange(len(tokens))[None]
    layout = PackedBatch(
        tokens=tokens[None], positions=positions, segment_ids=jnp.ones_like(positions), loss_mask=None, loss_weight=None
    ).layout
    scores = logits(params, forward(params, tokens[None], layout, CONFIG))[0] / TEMPERATURE
    return jnp.take_along_axis(jax.nn.log_softmax(scores)[:-1], tokens[1:, None], axis=1)[:, 0]


@pytest.fixture(scope="module")
def sequences(params) -> list[Sequence]:
    """Old log-probabilities up to 0.8 away, so that every branch of the clip occurs, and a sampler up to 0.4 from them;
    one sequence is masked."""
    rng = np.random.default_rng(3)
    made = []
    for number, length in enumerate(LENGTHS):
        tokens = rng.integers(0, 48, length).astype(np.int32)
        now = np.concatenate([[0.0], plain_logprobs(params, jnp.asarray(tokens))])
        mask = (np.arange(length) >= PROMPT) * (number != 3)
        old, ref, apart = (scale * rng.uniform(-1, 1, length) for scale in (0.8, 0.5, 0.4))
        others = [now + old, now + ref, now + old + apart]
        made.append(Sequence(tokens, mask, rng.normal(), rng.uniform(0.01, 0.1), *others))
    return made


def pack(sequences: list[Sequence], rows: list[list[int]], row_length: int) -> PackedBatch:
    shape = (len(rows), row_length)
    integers = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids", "loss_mask")}
    names = ("loss_weight", "advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs")
    floats = {name: np.zeros(shape, np.float32) for name in names}
    for at, row in enumerate(rows):
        start = 0
        for segment, number in enumerate(row, start=1):
            one = sequences[number]
            span = (at, slice(start, start + len(one.tokens)))
            integers["tokens"][span], integers["positions"][span] = one.tokens, np.arange(len(one.tokens))
            integers["segment_ids"][span], integers["loss_mask"][span] = segment, one.mask
            values = (one.mask * one.weight, one.mask * one.advantage, one.old, one.ref, one.sampler)
            for name, value in zip(names, values, strict=True):
                floats[name][span] = value
            start += len(one.tokens)
    return PackedBatch(**integers, **floats, max_segments=4)


PACKED = [[0, 1, 3], [2, 4]]


def truncated(cap: float | None) -> Correction:
    """Truncated importance sampling of tokens, or nothing."""
    return Correction() if cap is None else Correction(mode="token_truncate", high=cap)


def importance_of(one: Sequence, correction: Correction) -> np.ndarray:
    """The weight of each token, from the definitions."""
    d, trained = (one.old - one.sampler) * one.mask, one.mask == 1
    if correction.mode is None:
        return np.ones(len(d))
    kind, how = correction.mode.split("_")
    n = max(trained.sum(), 1)
    ratio = {"token": np.exp(d), "sequence": np.exp(d.sum()), "geometric": np.exp(d.sum() / n)}[kind] * np.ones(len(d))
    if how == "truncate":
        return np.clip(ratio, correction.low, correction.high)
    return ratio * ((ratio >= correction.low) & (ratio <= correction.high))


def stays_of(one: Sequence, lp: np.ndarray, correction: Correction) -> np.ndarray:
    """1 where the masks of the present policy leave a token in."""
    stays, trained = np.ones(len(lp)), one.mask == 1
    if correction.max_shift is not None:
        shift = np.exp(lp) - np.exp(one.sampler)
        stays[shift * np.sign(one.advantage) > correction.max_shift] = 0
    if correction.max_divergence is not None and one.advantage < 0 and trained.any():
        stays *= (one.sampler - lp)[trained].mean() <= correction.max_divergence
    return stays


def surrogate_of(one: Sequence, w: float, t: int, phi: float, lp: np.ndarray, s: Surrogate) -> tuple[float, float]:
    """(loss of token t, its derivative in log w where w is what the loss is of, else in log p)."""
    a = one.advantage
    if s.shape == "cispo":
        return -min(w, s.epsilon_high) * a * lp[t], -min(w, s.epsilon_high) * a
    if s.shape == "vespo":
        return -phi * a * lp[t], -phi * a
    if s.shape == "sapo":
        tau = s.sapo[0] if a > 0 else s.sapo[1]
        gate = 1 / (1 + np.exp(-tau * (w - 1)))
        return -4 / tau * gate * a, -4 * gate * (1 - gate) * w * a
    free = w if s.delta is None else min(w, s.delta)
    clipped = min(max(w, 1 - s.epsilon), 1 + s.epsilon_high)
    moves = free == w if free * a <= clipped * a else clipped == w
    return -min(free * a, clipped * a), -a * w * moves


def phi_of(one: Sequence, d: np.ndarray, weights: np.ndarray, s: Surrogate) -> float:
    """VESPO's weight of a completion."""
    trained = one.mask == 1
    total = np.clip(d[trained], -20, 20).sum()
    if s.correction.mode is not None:
        total += np.clip(np.log(np.maximum(weights[trained], 1e-8)), -20, 20).sum()
    k, rate = s.vespo[0] if one.advantage >= 0 else s.vespo[1]
    w = np.exp(np.clip(total, np.log(1e-8), 20))
    return np.exp(rate) * w**k * np.exp(-rate * w)


def reference(sequences: list[Sequence], now: list[np.ndarray], s: Surrogate) -> tuple[float, list[np.ndarray]]:
    """(loss, d loss / d log-probability of each token), float64."""
    total, slopes = 0.0, []
    for one, lp in zip(sequences, now, strict=True):
        slope = np.zeros(len(lp))
        trained = np.flatnonzero(one.mask)
        d = lp - one.old
        weights = importance_of(one, s.correction)
        factors = stays_of(one, lp, s.correction) * (1.0 if s.shape == "vespo" else weights)
        phi = phi_of(one, d, weights, s)
        whole = s.level == "sequence"
        for t in map(int, trained):
            w = np.exp(d[trained].mean() if whole else d[t])
            value, by = surrogate_of(one, w, t, phi, lp, s)
            total += one.weight * factors[t] * value
            if whole and s.shape in ("clip", "sapo"):  # all tokens of a sequence share its ratio, each a 1/n of it
                slope[trained] += one.weight * factors[t] * by / len(trained)
            else:
                slope[t] += one.weight * factors[t] * by
            away = one.ref[t] - lp[t]
            k3, by_k3 = np.exp(away) - away - 1, 1 - np.exp(away)
            if s.bias_corrected_kl:
                total += one.weight * s.beta * w * k3
                slope[t] += one.weight * s.beta * w * by_k3
                slope[trained if whole else t] += one.weight * s.beta * w * k3 / (len(trained) if whole else 1)
            else:
                total += one.weight * s.beta * k3
                slope[t] += one.weight * s.beta * by_k3
        slopes.append(slope)
    return total, slopes


LEVELS: tuple[Level, ...] = ("token", "sequence")
BETAS = (0.0, 0.3)
CLIPPED = [
    Surrogate(epsilon=0.2, epsilon_high=high, beta=beta, delta=delta, level=level)
    for high, beta, delta, level in itertools.product((0.2, 0.35), BETAS, (None, 1.5), LEVELS)
]
SHAPED = [
    Surrogate(shape=shape, epsilon_high=1.3, beta=beta, level=level, sapo=(1.0, 2.0))
    for shape, beta, level in itertools.product(("cispo", "sapo", "vespo"), BETAS, LEVELS)
]
UNBIASED = [
    Surrogate(shape=shape, epsilon_high=1.3, beta=0.3, level=level, bias_corrected_kl=True)
    for shape, level in itertools.product(("clip", "cispo", "sapo", "vespo"), LEVELS)
]
CORRECTIONS = [
    Correction(mode=mode, low=low, high=high)
    for mode in get_args(Mode)
    for low, high in ((0.0, 1.0), (0.7, 1.2), (0.0, math.inf))
]
MASKS = [
    Correction(max_shift=0.05), Correction(max_divergence=0.05),
    Correction(mode="token_mask", low=0.7, high=1.4, max_shift=0.05, max_divergence=0.05),
]  # fmt: skip
CORRECTED = [
    Surrogate(beta=0.3, level=level, correction=correction)
    # Bounds of each mode at one level, each mode at the other.
    for level, correction in [
        *(("token", one) for one in CORRECTIONS),
        *(("sequence", one) for one in CORRECTIONS[1::3]),
        *itertools.product(LEVELS, MASKS),
    ]
] + [
    Surrogate(shape=shape, epsilon_high=1.3, correction=correction)
    for shape, correction in itertools.product(
        ("cispo", "sapo", "vespo"), [Correction(mode="token_truncate", high=1.5), *MASKS]
    )
]


@pytest.fixture(scope="module")
def now(params, sequences) -> list[np.ndarray]:
    """The policy's log-probabilities, 0 for the first token."""
    return [np.concatenate([[0.0], plain_logprobs(params, jnp.asarray(one.tokens))]) for one in sequences]


def given(params, batch):
    """Statistics that are the parameters: what the loss does with them has no model in it."""
    return params, jnp.zeros_like(params)


def lie(values: list[np.ndarray], rows: list[list[int]], row_length: int) -> np.ndarray:
    """One value a token, where `pack` puts the tokens."""
    found = np.zeros((len(rows), row_length), np.float32)
    for at, row in enumerate(rows):
        joined = np.concatenate([values[number] for number in row])
        found[at, : len(joined)] = joined
    return found


@pytest.mark.parametrize("surrogate", CLIPPED + SHAPED + UNBIASED + CORRECTED)
def test_loss_and_gradients_are_those_of_the_plain_reference(sequences, now, surrogate):
    expected, slopes = reference(sequences, now, surrogate)
    compute = jax.value_and_grad(make_policy_loss(given, surrogate), has_aux=True)
    (value, _), found = compute(
        jnp.asarray(lie(now, PACKED, 32)), jax.tree.map(jnp.asarray, pack(sequences, PACKED, 32))
    )
    np.testing.assert_allclose(value, expected, atol=1e-6)
    np.testing.assert_allclose(found, lie(slopes, PACKED, 32), atol=1e-6)
    assert np.abs(found).max() > 0.01


def test_the_correction_by_hand():
    """Twice as likely to the trainer as to the sampler, cut at 1.5; half as likely; and a prompt's token. A is 2 and a
    token weighs 0.1: the loss is -0.1 * 2 * (1.5 + 0.5), and so are its parts the gradient; the weight has none."""
    row = {"tokens": [0, 0, 0], "positions": [0, 1, 2], "segment_ids": [1, 1, 1], "loss_mask": [0, 1, 1]}
    floats = {"loss_weight": [0.0, 0.1, 0.1], "advantages": [0.0, 2.0, 2.0], "sampler_logprobs": np.log([9, 0.25, 0.4])}
    batch = PackedBatch(
        **{name: jnp.asarray([values], jnp.int32) for name, values in row.items()},
        **{name: jnp.asarray([values], jnp.float32) for name, values in floats.items()},
        max_segments=1,
    )
    compute = jax.value_and_grad(make_policy_loss(given, Surrogate(correction=truncated(1.5))), has_aux=True)
    (value, sums), slope = compute(jnp.log(jnp.asarray([[1.0, 0.5, 0.2]])), batch)
    np.testing.assert_allclose(value, -0.4, rtol=1e-6)
    np.testing.assert_allclose(slope, [[0.0, -0.3, -0.1]], rtol=1e-6)
    told = {name: float(sums[f"importance{name}"]) for name in ("", "_min", "_max", "_truncated")}
    assert told == pytest.approx({"": 2.0, "_min": 0.5, "_max": 1.5, "_truncated": 1.0})


@pytest.mark.parametrize("aged", [True, False])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sampler_that_is_the_trainer_is_corrected_by_no_bit(sequences, now, level, aged):
    """Even under the lowest cap; aged: the batch has been updated on before."""
    batch, lp = pack(sequences, PACKED, 32), lie(now, PACKED, 32)
    batch = dataclasses.replace(
        batch, old_logprobs=batch.old_logprobs if aged else None, sampler_logprobs=batch.old_logprobs if aged else lp
    )

    def computed(cap: float | None):
        loss = make_policy_loss(given, Surrogate(beta=0.3, level=level, correction=truncated(cap)))
        (value, sums), slope = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(lp), jax.tree.map(jnp.asarray, batch))
        return value, sums, slope

    value, sums, slope = computed(None)
    corrected, more, found = computed(1.0)
    assert float(value) == float(corrected) != 0.0
    np.testing.assert_array_equal(found, slope)
    assert {name: float(more[name]) for name in sums} == {name: float(one) for name, one in sums.items()}
    metrics = policy_metrics({"loss": 0.0, **{name: float(one) for name, one in more.items()}}, 1)
    assert [metrics[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")] == [1.0] * 3
    assert metrics["sampling/importance_sampling_truncated"] == 0.0


def test_a_sampler_that_is_off_shows(sequences, now):
    """Noise on its log-probabilities is in the metrics, counted in numpy; without the correction they are not there."""
    rng = np.random.default_rng(5)
    noisy = [dataclasses.replace(one, sampler=one.old + 0.7 * rng.normal(size=len(one.old))) for one in sequences]

    def told(cap: float | None) -> dict[str, float]:
        loss = make_policy_loss(given, Surrogate(correction=truncated(cap)))
        _, sums = loss(jnp.asarray(lie(now, PACKED, 32)), jax.tree.map(jnp.asarray, pack(noisy, PACKED, 32)))
        return policy_metrics({"loss": 0.0, **{name: float(one) for name, one in sums.items()}}, 1)

    ratio = np.exp(np.concatenate([(one.old - one.sampler)[one.mask == 1] for one in noisy]))
    wanted = {f"ratio/{name}": getattr(np.minimum(ratio, 1.5), name)() for name in ("min", "mean", "max")}
    wanted["truncated"], wanted["masked"] = (ratio > 1.5).mean(), 0.0
    used = np.minimum(ratio, 1.5)
    size = used.sum() ** 2 / (len(used) * (used**2).sum())
    assert 0.1 < wanted["truncated"] < 0.9
    found = told(1.5)
    assert {name: found[f"sampling/importance_sampling_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert found["sampling/effective_sample_size"] == pytest.approx(size, rel=1e-5) and 0.5 < size < 0.99
    extra = {f"sampling/importance_sampling_{name}" for name in wanted} | {"sampling/effective_sample_size"}
    assert found.keys() - told(None).keys() == extra


@pytest.fixture(scope="module")
def gradients():
    statistics = make_statistics(CONFIG, Execution(loss_chunk=11), temperature=TEMPERATURE)

    @functools.cache
    def make(surrogate: Surrogate):
        return jax.jit(jax.value_and_grad(make_policy_loss(statistics, surrogate), has_aux=True))

    return make


def test_the_gradient_reaches_the_parameters(params, sequences, now, gradients):
    """The slopes of the reference, pulled back through each sequence alone."""
    surrogate = Surrogate(beta=0.1)
    expected, slopes = reference(sequences, now, surrogate)

    def total(p):
        return sum(
            jnp.sum(plain_logprobs(p, jnp.asarray(one.tokens)) * slope[1:].astype(np.float32))
            for one, slope in zip(sequences, slopes, strict=True)
        )

    (value, _), found = gradients(surrogate)(params, pack(sequences, PACKED, 32))
    np.testing.assert_allclose(value, expected, atol=TOLERANCE)
    assert_close(found, jax.grad(total)(params))


def assert_close(found, wanted) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert float(jnp.linalg.norm(one - other)) <= TOLERANCE * max(1.0, float(jnp.linalg.norm(other)))


@pytest.mark.parametrize(("level", "cap"), [("token", None), ("sequence", None), ("token", 1.5)])
def test_packing_and_padding_change_nothing(params, sequences, gradients, level, cap):
    compute = gradients(Surrogate(beta=0.1, level=level, correction=truncated(cap)))
    (value, sums), wanted = compute(params, pack(sequences, PACKED, 32))
    (other, others), found = compute(params, pack(sequences, [[number] for number in range(5)] + [[]], 40))
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for name in sums:
        if not name.endswith(("_min", "_max")):
            np.testing.assert_allclose(others[name], sums[name], rtol=1e-4, atol=1e-5)
    assert_close(found, wanted)


def test_the_first_step_on_new_completions(params, sequences, gradients):
    """Without old log-probabilities the ratio is 1: the loss is -sum(w A), nothing is clipped, and the gradient is that
    of the log-likelihood weighted with the advantages."""
    batch = dataclasses.replace(pack(sequences, PACKED, 32), old_logprobs=None)
    (value, sums), found = gradients(Surrogate())(params, batch)
    expected = -sum(one.weight * one.advantage * one.mask.sum() for one in sequences)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert float(sums["clipped_low"]) == float(sums["clipped_high"]) == 0.0

    def likelihood(p):
        return sum(
            -one.weight
            * one.advantage
            * jnp.sum(plain_logprobs(p, jnp.asarray(one.tokens)) * one.mask[1:].astype(np.float32))
            for one in sequences
        )

    assert_close(found, jax.grad(likelihood)(params))


def test_what_is_summed_by_hand(params, sequences, now, gradients):
    """Clip counts, the divergence from the reference and from the sampler, over trained tokens only."""
    surrogate = Surrogate(beta=0.1)
    (_, sums), _ = gradients(surrogate)(params, pack(sequences, PACKED, 32))
    mask = np.concatenate([one.mask for one in sequences]) == 1
    lp, old, ref, sampler = (
        np.concatenate(x)[mask]
        for x in (now, *([getattr(one, name) for one in sequences] for name in ("old", "ref", "sampler")))
    )
    advantages = np.concatenate([np.full(len(one.tokens), one.advantage) for one in sequences])[mask]
    ratio, away, apart = np.exp(lp - old), ref - lp, old - sampler
    assert float(sums["loss_tokens"]) == mask.sum()
    assert float(sums["clipped_low"]) == ((ratio < 0.8) & (advantages < 0)).sum() > 0
    assert float(sums["clipped_high"]) == ((ratio > 1.2) & (advantages > 0)).sum() > 0
    np.testing.assert_allclose(sums["kl"], (np.exp(away) - away - 1).sum(), rtol=1e-4)
    np.testing.assert_allclose(sums["mismatch"], (np.exp(apart) - apart - 1).sum(), rtol=1e-4)
    np.testing.assert_allclose(sums["logp_difference_max"], np.abs(apart).max(), rtol=1e-4)
    metrics = policy_metrics({"loss": 6.0, **{name: float(value) for name, value in sums.items()}}, 3)
    assert metrics["loss"] == 2.0
    clipped = float(sums["clipped_low"]) + float(sums["clipped_high"])
    np.testing.assert_allclose(metrics["clip_ratio/region_mean"], clipped / mask.sum())


def test_nothing_to_train_on_gives_no_gradient(params, sequences, gradients):
    nothing = [dataclasses.replace(one, mask=0 * one.mask) for one in sequences]
    (value, sums), found = gradients(Surrogate(beta=0.1, level="sequence"))(params, pack(nothing, PACKED, 32))
    assert float(value) == 0.0 and all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(found))
    assert all(
        np.isfinite(v) for v in policy_metrics({"loss": 0.0, **{k: float(v) for k, v in sums.items()}}, 1).values()
    )


def test_entropy_and_logprobs_are_at_the_temperature(params, sequences):
    """The entropy of softmax(logits / T), at the token that is drawn from it."""
    one = sequences[0]
    batch = pack([one], [[0]], 16)
    logprobs, entropy = jax.jit(make_statistics(CONFIG, temperature=TEMPERATURE))(params, batch)
    layout = jax.tree.map(jnp.asarray, pack([one], [[0]], 9).layout)
    scores = logits(params, forward(params, jnp.asarray(one.tokens)[None], layout, CONFIG))[0]
    p = jax.nn.softmax(scores / TEMPERATURE)
    np.testing.assert_allclose(entropy[0, 1:9], -(p * jnp.log(p)).sum(-1)[:8], rtol=1e-5)
    np.testing.assert_allclose(logprobs[0, 1:9], plain_logprobs(params, jnp.asarray(one.tokens)), rtol=1e-5)
