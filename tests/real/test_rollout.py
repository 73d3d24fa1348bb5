"""SmolLM2-135M-Instruct samples answers to GSM8K: what the engine says of each token is what the trainer says of it."""

import dataclasses
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Layout, Rollout
from r1jax.checkpoints import hf
from r1jax.config.mesh import MeshConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.families import decoder_config
from r1jax.models.parameters import abstract_params
from r1jax.models.transformer import forward, output_kernel
from r1jax.objectives.cross_entropy import token_logprobs
from r1jax.rollout.engine import EmbeddedEngine
from r1jax.rollout.settings import SamplingSettings
from r1jax.sharding.mesh import make_mesh
from r1jax.sharding.rules import make_specs, shardings

pytestmark = pytest.mark.real
logger = logging.getLogger(__name__)
SETTINGS = SamplingSettings(max_new_tokens=64, stop_ids=(2,), seed=1)


@pytest.fixture(scope="module")
def config(smollm2: Path) -> DecoderConfig:
    return decoder_config(hf.read_config(smollm2))


@pytest.fixture(scope="module")
def prompts(assets: Path, smollm2: Path) -> list[list[int]]:
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(smollm2)
    with (assets / "data" / "gsm8k_test.jsonl").open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(4), strict=False)]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@partial(jax.jit, static_argnames=("config", "temperature"))
def row_logprobs(params: Any, tokens: Any, layout: Layout, config: DecoderConfig, temperature: float) -> Any:
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    kernel = output_kernel(params)
    found, _ = token_logprobs(forward(params, tokens, layout, config), kernel, targets, temperature=temperature)
    return jnp.pad(found[:, :-1], ((0, 0), (1, 0)))


def trained(params: Any, rollouts: list[Rollout], config: DecoderConfig, temperature: float) -> np.ndarray:
    """The trainer's log-probability of every action, the rollouts packed into one row."""
    lengths = [len(one.tokens) for one in rollouts]
    size = -(-sum(lengths) // 512) * 512
    tokens, segments, positions = np.zeros((3, 1, size), np.int32)
    tokens[0, : sum(lengths)] = np.concatenate([one.tokens for one in rollouts])
    segments[0, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions[0, : sum(lengths)] = np.concatenate([np.arange(length) for length in lengths])
    layout = Layout(segment_ids=segments, positions=positions)
    found = np.asarray(row_logprobs(params, tokens, layout, config, temperature))[0, : sum(lengths)]
    return found[np.concatenate([one.action_mask for one in rollouts]) == 1]


def test_the_engine_and_the_trainer_agree_on_every_token(
    smollm2: Path, config: DecoderConfig, prompts: list[list[int]]
):
    mesh = make_mesh(MeshConfig(mesh_fsdp=1), jax.devices()[:1])
    heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
    places = shardings(mesh, make_specs(abstract_params(config), mesh, 0, **heads).params)
    params = hf.load_params(smollm2, config, places)
    engine = EmbeddedEngine(config, mesh, SETTINGS)
    engine.sync(params, 0)
    for temperature in (1.0, 0.7):
        settings = dataclasses.replace(SETTINGS, temperature=temperature)
        groups = engine.generate(prompts, range(4), num_generations=4, step=0, settings=settings)
        rollouts = [one for group in groups for one in group]
        sampled = np.concatenate([one.policy_logprobs[one.action_mask == 1] for one in rollouts])
        difference = trained(params, rollouts, config, temperature) - sampled
        mismatch_kl = np.mean(np.exp(difference) - difference - 1)
        largest = np.abs(difference).max()
        logger.info(
            "T %s: %d tokens, largest difference %.1e, kl %.1e", temperature, len(sampled), largest, mismatch_kl
        )
        assert len(sampled) > 500 and sampled.std() > 0.5
        assert largest < 1e-4
        assert mismatch_kl < 1e-6
