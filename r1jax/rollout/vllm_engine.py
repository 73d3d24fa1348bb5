"""The `RolloutEngine` whose samples come from vLLM servers, with the trainer's weights pushed to them.

    sync      gather -> file or upload -> prepare -> apply -> reset the prefix cache (-> compare a probe)
    generate  are the weights still ours? -> requests -> are they still? -> Rollouts

Every trainer process has one, for its own prompts. The first process pushes; all of them take part in the gathering.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from r1jax.batch import Rollout
from r1jax.config.errors import RunFailure, need, shown
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import Params
from r1jax.rollout.distribution import reshapes, switches
from r1jax.rollout.engine import as_rollout
from r1jax.rollout.sampler import Completion, check_prompt
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.vllm_checks import Expected, check_servers
from r1jax.rollout.vllm_client import Clients, Server, ServerChanged, VllmClient
from r1jax.rollout.vllm_http import Failure
from r1jax.rollout.vllm_requests import Malformed, Piece, Sample, body_of, samples_of
from r1jax.rollout.weight_push import PushTimes, Route, WeightPush

logger = logging.getLogger(__name__)

Probe = Callable[[Params, np.ndarray, float], np.ndarray]
"""(the trainer's parameters, int32 [T] tokens, temperature) -> float32 [T], each token's log-probability after those
before it, at the temperature. Every process calls it with the same tokens."""

PROBE_TOKENS = 16
LARGEST_MEAN_DIFFERENCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
"""Of the probe's log-probabilities. SmolLM2-135M in float32: 1e-6 with the right weights, 0.3 with packed old ones."""


class VllmEngine:
    """Samples on servers that others run."""

    def __init__(
        self,
        config: DecoderConfig,
        settings: SamplingSettings,
        client: VllmClient,
        *,
        dtype: str,
        probe: Probe,
        probe_prompt: Sequence[int],
        longest_prompt: int,
        start_seconds: float = 240.0,
        route: Route = "auto",
    ) -> None:
        """dtype: that the trainer computes in. longest_prompt: in tokens.

        Raises `UserError` for servers, or settings, that training could not trust.
        """
        _refuse_reshaped(settings, config)
        self._config, self._settings, self._client, self._probe = config, settings, client, probe
        self._probe_prompt = tuple(map(int, probe_prompt))
        expected = Expected(
            config=config,
            longest=max(longest_prompt + settings.max_new_tokens, len(self._probe_prompt) + PROBE_TOKENS),
            stop_ids=tuple(settings.stop_ids),
            probe=self._probe_prompt,
        )
        self._found = check_servers(client, expected, start_seconds=start_seconds)
        self._push = WeightPush(client, self._found, config, route=route)
        self._tolerance = max(LARGEST_MEAN_DIFFERENCE[dtype], LARGEST_MEAN_DIFFERENCE[self._found.dtype])
        if self._found.dtype != dtype:
            logger.warning("vllm: the servers compute in %s, the trainer in %s", self._found.dtype, dtype)
        self._version: int | None = None
        self._compare_next = True
        self.push_times: PushTimes | None = None
        """Of the last sync; None in processes that do not push."""

    def sync(self, params: Params, version: int) -> None:
        """Gives the servers the trainer's parameters; every process must call it.

        The first time, and after `compare_next`, the servers' log-probabilities of a probe must be the trainer's.
        Raises `RunFailure` where weights do not arrive, or are not those that answer.
        """
        self._version = None
        writes = jax.process_index() == 0
        _in_step(lambda: self._send(params, version, writes=writes), every=True)
        self._version = version
        if self._compare_next:
            self.compare(params)
            self._compare_next = False

    def compare_next(self) -> None:
        """Makes the next sync compare."""
        self._compare_next = True

    def compare(self, params: Params) -> float:
        """The largest mean difference between a server's log-probabilities of a probe and the trainer's.

        Every process must call it. Raises `RunFailure` where it is more than rounding.
        """
        temperature = self._settings.temperature or 1.0
        drawn = np.zeros((len(self._client.servers), PROBE_TOKENS, 2), np.float64)
        drawn = _from_first(lambda: self._drawn_probes(temperature), drawn)
        largest = 0.0
        for server, one in zip(self._client.servers, drawn, strict=True):
            tokens = np.concatenate([np.array(self._probe_prompt, np.int32), one[:, 0].astype(np.int32)])
            ours = np.asarray(self._probe(params, tokens, temperature))[-PROBE_TOKENS:]
            difference = float(np.abs(ours - one[:, 1]).mean())
            if not difference <= self._tolerance:
                raise RunFailure(
                    f"vllm: {server.url} has not the weights of step {self._version}: its log-probabilities of a probe "
                    f"are {difference:.1e} off on average, rounding explains {self._tolerance:.0e}"
                )
            largest = max(largest, difference)
        logger.info("vllm: log-probabilities of a probe differ from the trainer's by %.1e on average", largest)
        return largest

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        num_generations: int,
        step: int,
        settings: SamplingSettings | None = None,
    ) -> list[list[Rollout]]:
        """Each prompt's rollouts, in the prompts' order.

        Raises `UserError` for a prompt that leaves no room, `RunFailure` for samples that could not be had, and
        `ServerChanged` where a server has lost the weights: none of its samples is returned then.
        """
        assert self._version is not None, "sync comes before generate"
        settings = settings or self._settings
        _refuse_reshaped(settings, self._config)
        for row, prompt in enumerate(prompts):
            name = f"prompt {prompt_ids[row]}"
            check_prompt(prompt, self._config, settings.max_new_tokens, name, "max_completion_length")
        self._check_version()
        drawn = self._client.sample(
            prompts,
            prompt_ids,
            settings,
            num_generations=num_generations,
            step=step,
            model=self._found.model,
            vocab_size=self._config.vocab_size,
            version=self._version,
        )
        self._check_version()
        return [
            [
                as_rollout(prompt, completion_of(one), prompt_id, number, self._version)
                for number, one in enumerate(group)
            ]
            for prompt, prompt_id, group in zip(prompts, prompt_ids, drawn, strict=True)
        ]

    def close(self) -> None:
        """Removes what was written for the servers, which stay as they are."""
        self._push.close()

    def _send(self, params: Params, version: int, *, writes: bool) -> None:
        seconds = self._push.send(params, version, writes=writes)
        if not writes:
            return
        prepare, apply, reset = self._push.load(version)
        self.push_times = PushTimes(write=seconds, prepare=prepare, apply=apply, reset=reset)

    def _check_version(self) -> None:
        """Raises `ServerChanged` unless every server has the weights of the last sync."""

        async def look(clients: Clients) -> None:
            await clients.each(lambda server: self._check_server(clients, server))

        self._client.run(look)

    async def _check_server(self, clients: Clients, server: Server) -> None:
        state = await self._state(clients, server)
        if state.get("version") != self._version or state.get("torn"):
            has = "weights cut off while they were loaded" if state.get("torn") else shown(state.get("version"))
            raise ServerChanged(server.url, f"has version {has}, not {self._version}")
        # A process that another one's push has reached since it was looked at first.
        server.instance = state["instance"]

    async def _state(self, clients: Clients, server: Server) -> dict[str, Any]:
        limits, last = self._client.limits, None
        for attempt in range(limits.num_retries + 1):
            if attempt:
                await asyncio.sleep(limits.first_pause)
            try:
                return await clients.rpc(server, "r1jax_state")
            except Failure as failure:
                self._client.counts[failure.kind] += 1
                last = failure
        raise RunFailure(f"vllm: no state from a server in {limits.num_retries + 1} tries; the last: {last}")

    def _drawn_probes(self, temperature: float) -> np.ndarray:
        """[servers, PROBE_TOKENS, 2]: what each server draws behind the probe, and its log-probabilities."""
        settings = SamplingSettings(max_new_tokens=PROBE_TOKENS, temperature=temperature)
        piece = Piece(prompt=self._probe_prompt, prompt_id=0, first=0, count=1, step=self._version)
        vocab_size, version = self._config.vocab_size, self._version

        async def draw(clients: Clients, server: Server) -> Sample:
            answer = await clients.call(server, "/v1/completions", body_of(piece, settings, self._found.model))
            try:
                return samples_of(answer.content, piece, settings, vocab_size=vocab_size, version=version)[0]
            except Malformed as error:
                raise Failure("malformed", server.url, f"/v1/completions: {error}") from error

        try:
            drawn = self._client.run(lambda clients: clients.each(lambda server: draw(clients, server)))
        except Failure as failure:
            raise RunFailure(f"vllm: no answer to the probe: {failure}") from failure
        return np.array([np.stack([one.token_ids, one.logprobs], axis=1) for one in drawn], np.float64)


def _refuse_reshaped(settings: SamplingSettings, config: DecoderConfig) -> None:
    """Raises for a distribution of which the server's log-probabilities say nothing about the policy's."""
    if reshapes(switches(settings, config.vocab_size)):
        names = ("top_k", "top_p", "min_p", "repetition_penalty")
        got = ", ".join(f"{name} {getattr(settings, name)}" for name in names)
        rule = "samples of the policy at its temperature with rollout_engine: vllm"
        raise need("rollout_engine", rule, got, "leave these keys out, or sample with rollout_engine: jax")


def completion_of(sample: Sample) -> Completion:
    """The sample as the embedded sampler would give it; the policy's log-probabilities are taken for the same."""
    return Completion(
        token_ids=sample.token_ids,
        logprobs=sample.logprobs,
        policy_logprobs=sample.logprobs,
        finish_reason=sample.finish_reason,
    )


def _in_step(work: Callable[[], None], *, every: bool) -> None:
    """Does the work, in every process or the first alone; raises in all of them where it fails in any."""
    failure: RunFailure | None = None
    if every or jax.process_index() == 0:
        try:
            work()
        except RunFailure as error:
            failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(failure is not None))
        if failed.any() and failure is None:
            failure = RunFailure(
                f"vllm: process {int(failed.argmax())} could not use the servers; its own line says why"
            )
    if failure is not None:
        raise failure


def _from_first(work: Callable[[], np.ndarray], like: np.ndarray) -> np.ndarray:
    """What the work gives in the first process, in every process; `like` has its shape and dtype."""
    found = [like]

    def keep() -> None:
        found[0] = work()

    _in_step(keep, every=False)
    # As bytes: jax would make float32 of float64.
    sent = np.frombuffer(found[0].astype(like.dtype).tobytes(), np.uint8)
    if jax.process_count() > 1:
        sent = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return np.frombuffer(sent.tobytes(), like.dtype).reshape(like.shape)
