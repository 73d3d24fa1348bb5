"""Whether a server has the trainer's weights: both say how likely the same tokens are.

HTTP 200 proves nothing: a CPU server with vLLM's packed layers takes new weights and goes on with the old ones.
"""

import logging
from collections.abc import Callable

import numpy as np

from r1jax.config.errors import RunFailure
from r1jax.models.parameters import Params
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.together import from_first
from r1jax.rollout.vllm_client import Clients, Server, ServersLost, VllmClient
from r1jax.rollout.vllm_http import Failure
from r1jax.rollout.vllm_requests import Malformed, Piece, Sample, body_of, samples_of

logger = logging.getLogger(__name__)

Probe = Callable[[Params, np.ndarray, float], np.ndarray]
"""(the trainer's parameters, int32 [T] tokens, temperature) -> float32 [T], each token's log-probability after those
before it, at the temperature. Every process calls it with the same tokens."""

PROBE_TOKENS = 16
LARGEST_MEAN_DIFFERENCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
"""Of the probe's log-probabilities. SmolLM2-135M in float32: 1e-6 with the right weights, 0.3 with packed old ones."""


def tolerance(*dtypes: str) -> float:
    """The largest mean difference that rounding explains between sides that compute in these."""
    return max(LARGEST_MEAN_DIFFERENCE[dtype] for dtype in dtypes)


def compare(
    client: VllmClient,
    probe: Probe,
    params: Params,
    *,
    prompt: tuple[int, ...],
    model: str,
    vocab_size: int,
    version: int | None,
    temperature: float,
    tolerance: float,
) -> float:
    """The largest mean difference between a server's log-probabilities of a probe and the trainer's.

    Every process must call it. Raises `RunFailure` where it is more than `tolerance`, `ServersLost` without an answer.
    """
    settings = SamplingSettings(max_new_tokens=PROBE_TOKENS, temperature=temperature)
    piece = Piece(prompt=prompt, prompt_id=0, first=0, count=1, step=version)
    servers = client.in_use
    drawn = from_first(
        lambda: _drawn(client, piece, settings, model, vocab_size), np.zeros((len(servers), PROBE_TOKENS, 2))
    )
    largest = 0.0
    for server, one in zip(servers, drawn, strict=True):
        tokens = np.concatenate([np.array(prompt, np.int32), one[:, 0].astype(np.int32)])
        ours = np.asarray(probe(params, tokens, temperature))[-PROBE_TOKENS:]
        difference = float(np.abs(ours - one[:, 1]).mean())
        if not difference <= tolerance:
            raise RunFailure(
                f"vllm: {server.url} has not the weights of step {version}: its log-probabilities of a probe "
                f"are {difference:.1e} off on average, rounding explains {tolerance:.0e}"
            )
        largest = max(largest, difference)
    logger.info("vllm: log-probabilities of a probe differ from the trainer's by %.1e on average", largest)
    return largest


def _drawn(client: VllmClient, piece: Piece, settings: SamplingSettings, model: str, vocab_size: int) -> np.ndarray:
    """float64 [servers, PROBE_TOKENS, 2]: what each server draws behind the probe, and its log-probabilities."""

    async def draw(clients: Clients, server: Server) -> Sample:
        answer = await clients.call(server, "/v1/completions", body_of(piece, settings, model))
        try:
            return samples_of(answer.content, piece, settings, vocab_size=vocab_size, version=piece.step)[0]
        except Malformed as error:
            raise Failure("malformed", server.url, f"/v1/completions: {error}") from error

    try:
        drawn = client.run(lambda clients: clients.each(lambda server: draw(clients, server)))
    except Failure as failure:
        raise (RunFailure if failure.kind == "refused" else ServersLost)(
            f"vllm: no answer to the probe: {failure}"
        ) from failure
    return np.array([np.stack([one.token_ids, one.logprobs], axis=1) for one in drawn], np.float64)
