"""Which engine draws a run's completions, by its keys: the embedded one, or vLLM servers."""

import jax
from jax.sharding import Mesh

from r1jax.config import RunConfig
from r1jax.config.errors import need, require
from r1jax.models.attention.backends import Backend
from r1jax.models.config import DecoderConfig
from r1jax.rollout.engine import EmbeddedEngine, RolloutEngine
from r1jax.rollout.journal import Journal
from r1jax.rollout.settings import settings_of
from r1jax.rollout.vllm_client import Limits, VllmClient, check_urls
from r1jax.rollout.vllm_engine import VllmEngine
from r1jax.rollout.vllm_key import read_key
from r1jax.rollout.vllm_probe import Probe

SLOWEST_TOKENS_PER_SECOND = 10.0
"""Of one completion among all that a server works on; a request that is slower is given up and asked again."""


def check_sampler(config: RunConfig) -> None:
    """Raises `UserError` for keys that no engine does, as far as can be said without asking a server."""
    vllm = config.vllm
    if vllm.rollout_engine == "jax":
        advice = "the embedded engine samples on the trainer's own devices: remove the key, or use rollout_engine: vllm"
        depth = vllm.rollout_async_depth
        require(depth == 0, "rollout_async_depth", "0 with rollout_engine: jax", depth, advice)
        return
    if vllm.vllm_mode != "server":
        advice = (
            "start launch/vllm_server.sh on devices of its own, or use rollout_engine: jax, which shares the trainer's"
        )
        raise need("vllm_mode", "server with rollout_engine: vllm", vllm.vllm_mode, advice)
    if vllm.vllm_guided_decoding_regex is not None:
        advice = "remove it: the trainer would compare with a distribution that nothing was drawn from"
        raise need("vllm_guided_decoding_regex", "null", vllm.vllm_guided_decoding_regex, advice)
    check_urls(vllm.server_urls, "vllm_server_base_url")
    read_key()


def make_engine(
    config: RunConfig,
    decoder: DecoderConfig,
    mesh: Mesh,
    *,
    backend: Backend = "xla",
    stop_ids: tuple[int, ...],
    probe: Probe,
    probe_prompt: list[int],
    longest_prompt: int,
    journal: Journal | None = None,
) -> RolloutEngine:
    """The engine; every process makes one. Raises `UserError` for servers that do not fit, before anything is pushed.

    backend: whose attention samples here; probe, probe_prompt: how servers are compared with the trainer
    (`VllmEngine`); journal: what keeps their samples.
    """
    settings = settings_of(config.sampling, stop_ids=stop_ids, seed=config.run.seed)
    if config.vllm.rollout_engine == "jax":
        return EmbeddedEngine(decoder, mesh, settings, dtype=config.model.compute_dtype, backend=backend)
    seconds = config.vllm.vllm_request_timeout
    if seconds is None:
        seconds = max(Limits.request_seconds, settings.max_new_tokens / SLOWEST_TOKENS_PER_SECOND)
    client = VllmClient(
        config.vllm.server_urls,
        read_key(),
        limits=Limits(request_seconds=seconds),
        first_server=jax.process_index(),
    )
    return VllmEngine(
        decoder,
        settings,
        client,
        dtype=config.model.compute_dtype,
        probe=probe,
        probe_prompt=probe_prompt,
        longest_prompt=longest_prompt,
        start_seconds=config.vllm.vllm_server_timeout,
        journal=journal,
        compare_every=config.vllm.vllm_verify_steps,
    )
