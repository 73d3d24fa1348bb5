"""Our decoder against transformers' on random weights, and the same check failing on each of five kinds of mistake."""

import dataclasses
import logging
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Layout
from r1jax.models import transformer
from r1jax.models.attention.backends import Attend
from r1jax.models.attention.blocks import attend
from r1jax.models.config import DecoderConfig, RopeScaling
from r1jax.models.families import decoder_config

logger = logging.getLogger(__name__)

LENGTH = 517  # more than four blocks of queries, and no multiple of one
NEW_TOKENS = 64
TOLERANCE = 1e-4
CASES = ("qwen2_tied", "qwen2_untied", "qwen3_head_dim", "llama3_biases", "llama_linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What transformers says of one model, and that model as ours."""

    config: DecoderConfig
    params: dict[str, Any]
    tokens: np.ndarray
    logits: np.ndarray
    generated: np.ndarray


@pytest.fixture(scope="module")
def reference(make_model: Callable, params_of: Callable) -> Callable[[str], Reference]:
    import torch

    made: dict[str, Reference] = {}

    def make(case: str) -> Reference:
        model = make_model(case)
        config = decoder_config(model.config.to_dict())
        tokens = np.random.default_rng(5).integers(0, config.vocab_size, (2, LENGTH), dtype=np.int32)
        prompt = torch.from_numpy(tokens).long()
        with torch.no_grad():
            logits = model(prompt).logits.numpy()
            kwargs = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
            whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), **kwargs)
        generated = whole[:, LENGTH:].numpy().astype(np.int32)
        return Reference(
            config=config, params=params_of(model, config), tokens=tokens, logits=logits, generated=generated
        )

    return lambda case: made.setdefault(case, made.get(case) or make(case))


def our_logits(config: DecoderConfig, params: dict[str, Any], tokens: np.ndarray, attend: Attend) -> np.ndarray:
    """Logits of rows that are one document each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    layout = Layout(segment_ids=np.ones_like(tokens), positions=positions)

    def run(params: dict[str, Any], tokens: jax.Array, layout: Layout) -> jax.Array:
        return transformer.logits(params, transformer.forward(params, tokens, layout, config, attend=attend))

    return np.asarray(jax.jit(run)(params, tokens, layout))


def check_logits(reference: Reference, config: DecoderConfig, params: dict[str, Any], attend: Attend = attend) -> float:
    """Raises unless our logits are those of transformers; the largest difference."""
    assert reference.logits.std() >= 1, "logits too small for the tolerance to mean anything"
    difference = np.abs(our_logits(config, params, reference.tokens, attend) - reference.logits).max()
    assert difference < TOLERANCE, f"logits differ by {difference}"
    return float(difference)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, reference: Callable[[str], Reference]):
    ref = reference(case)
    difference = check_logits(ref, ref.config, ref.params)
    logger.info("%s: logits of std %.2f, largest difference %.1e", case, ref.logits.std(), difference)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_transformers(case: str, reference: Callable[[str], Reference]):
    ref = reference(case)
    config, total = ref.config, LENGTH + NEW_TOKENS
    positions = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), (2, total))
    layout = Layout(segment_ids=jnp.ones((2, total), jnp.int32), positions=positions)

    @jax.jit
    def generate(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        # What stands after the newest token is not yet generated, and causality hides it.
        def extend(index: int, tokens: jax.Array) -> jax.Array:
            hidden = transformer.forward(params, tokens, layout, config)
            last = jax.lax.dynamic_slice_in_dim(hidden, index - 1, 1, axis=1)
            chosen = jnp.argmax(transformer.logits(params, last), axis=-1).astype(tokens.dtype)
            return jax.lax.dynamic_update_slice_in_dim(tokens, chosen, index, axis=1)

        return jax.lax.fori_loop(LENGTH, total, extend, tokens)

    padded = np.pad(ref.tokens, ((0, 0), (0, NEW_TOKENS)))
    ours = np.asarray(generate(ref.params, padded))[:, LENGTH:]
    assert len(set(ref.generated[0].tolist())) > 8, "a model that repeats itself would agree by chance"
    np.testing.assert_array_equal(ours, ref.generated)


def _without_biases(params: dict[str, Any], group: str) -> dict[str, Any]:
    layers = params["layers"]
    kept = {name: {"kernel": leaf["kernel"]} if "bias" in leaf else leaf for name, leaf in layers[group].items()}
    return {**params, "layers": {**layers, group: kept}}


def _interleaved_attend(q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout) -> jax.Array:
    """Attention in which query head n reads kv head n modulo K."""
    group = q.shape[2] // k.shape[2]
    return attend(q, jnp.tile(k, (1, 1, group, 1)), jnp.tile(v, (1, 1, group, 1)), layout)


def _other_scaling(config: DecoderConfig) -> RopeScaling:
    assert config.rope_scaling is not None
    return dataclasses.replace(config.rope_scaling, factor=config.rope_scaling.factor * 1.25)


MUTATIONS: dict[str, tuple[str, Callable[[DecoderConfig], dict[str, Any]]]] = {
    "rope base": ("qwen3_head_dim", lambda c: {"rope_theta": c.rope_theta * 1.1}),
    "rope base, llama3": ("llama3_biases", lambda c: {"rope_theta": c.rope_theta * 1.1}),
    "norm eps": ("qwen2_untied", lambda c: {"norm_eps": 1e-6}),
    "norm eps, llama3": ("llama3_biases", lambda c: {"norm_eps": 1e-6}),
    "scaling dropped, llama3": ("llama3_biases", lambda c: {"rope_scaling": None}),
    "scaling changed, llama3": ("llama3_biases", lambda c: {"rope_scaling": _other_scaling(c)}),
    "scaling dropped, linear": ("llama_linear", lambda c: {"rope_scaling": None}),
}


def assert_check_fails(
    reference: Reference, config: DecoderConfig, params: dict[str, Any], attend: Attend = attend
) -> None:
    """The parity check must raise, and not by a hair: ten times the tolerance."""
    with pytest.raises(AssertionError) as failure:
        check_logits(reference, config, params, attend)
    found = re.match(r"logits differ by ([\d.]+)", str(failure.value))
    logger.info("mutated: largest difference %s", found and found.group(1))
    assert found and float(found.group(1)) > 10 * TOLERANCE


@pytest.mark.parametrize("name", MUTATIONS)
def test_check_fails_on_another_config(name: str, reference: Callable[[str], Reference]):
    case, mutate = MUTATIONS[name]
    ref = reference(case)
    assert_check_fails(ref, dataclasses.replace(ref.config, **mutate(ref.config)), ref.params)


@pytest.mark.parametrize(
    ("case", "group"), [("qwen2_tied", "attention"), ("llama3_biases", "attention"), ("llama3_biases", "mlp")]
)
def test_check_fails_without_biases(case: str, group: str, reference: Callable[[str], Reference]):
    ref = reference(case)
    assert_check_fails(ref, ref.config, _without_biases(ref.params, group))


@pytest.mark.parametrize("case", ["qwen2_untied", "qwen3_head_dim"])
def test_check_fails_on_another_gqa_order(case: str, reference: Callable):
    ref = reference(case)
    assert_check_fails(ref, ref.config, ref.params, _interleaved_attend)
