"""Which server gets which request: the least loaded one; what fails is asked again, elsewhere where there is another.

A server that answers nothing at all, though its connections stay open, is found by its pulse and left for the others.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from r1jax import progress
from r1jax.config.errors import RunFailure
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.vllm_client import Clients, Server, ServerChanged, ServersLost, VllmClient, all_or_none
from r1jax.rollout.vllm_http import Answer, Failure
from r1jax.rollout.vllm_requests import Malformed, Piece, Sample, body_of, pieces_of, samples_of

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Accept = Callable[[Piece, list[Sample]], None]

_REST_SECONDS = 2.0
"""A server that failed gets no new request for so long while another one can take it."""
_LONGEST_PAUSE = 8.0
_MOST_TIMEOUTS = 2
"""Tries of one request that may run into its time limit: what a server could not do twice it will not do again."""


def draw_samples(
    client: VllmClient,
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    settings: SamplingSettings,
    *,
    num_generations: int,
    step: int | None,
    model: str,
    vocab_size: int,
    version: int | None = None,
    known: Sequence[dict[int, Sample]] | None = None,
    accept: Accept | None = None,
) -> list[list[Sample]]:
    """Each prompt's samples, in the prompts' order; version: the one that all servers have.

    known: each prompt's samples that are there already, by number; accept is told of the others as they come. Raises
    `ServersLost` for samples that could not be had, `ServerChanged` where the weights are not known, and `RunFailure`
    for a request that a server refuses.
    """
    found = [dict(one) for one in known] if known is not None else [{} for _ in prompts]
    numbers = [[n for n in range(num_generations) if n not in have] for have in found]
    # Whole groups, so that a prompt is read once; pieces of them where servers would have nothing to do.
    servers = len(client.in_use)
    size = num_generations if sum(map(bool, numbers)) >= servers else -(-num_generations // servers)
    pieces = pieces_of(prompts, prompt_ids, numbers, step, min(size, client.limits.in_flight))
    rows = {prompt_id: row for row, prompt_id in enumerate(prompt_ids)}

    def parse(content: Any, piece: Piece) -> list[Sample]:
        return samples_of(content, piece, settings, vocab_size=vocab_size, version=version)

    def take(piece: Piece, samples: list[Sample]) -> None:
        if accept is not None:
            accept(piece, samples)
        found[rows[piece.prompt_id]].update(zip(range(piece.first, piece.first + piece.count), samples, strict=True))
        progress.report("rollout")

    async def draw(clients: Clients) -> None:
        async with _routing(client, clients) as router:
            await all_or_none([router.ask(piece, body_of(piece, settings, model), parse, take) for piece in pieces])

    if pieces:
        client.run(draw)
    return [[have[number] for number in range(num_generations)] for have in found]


@contextlib.asynccontextmanager
async def _routing(client: VllmClient, clients: Clients) -> AsyncIterator["_Router"]:
    """A router, with a pulse taken of each server meanwhile."""
    router = _Router(client, clients)
    pulses = [asyncio.ensure_future(router.watch(server)) for server in client.in_use]
    try:
        yield router
    finally:
        for pulse in pulses:
            pulse.cancel()
        ended = await asyncio.gather(*pulses, return_exceptions=True)
    for mistake in ended:
        if isinstance(mistake, Exception):
            raise mistake


class _Router:
    """For one call of `draw_samples`."""

    def __init__(self, client: VllmClient, clients: Clients) -> None:
        self._client, self._clients, self._limits = client, clients, client.limits
        self._changed = asyncio.Condition()
        self._silent = {server.url: asyncio.Event() for server in client.in_use}

    async def ask(
        self, piece: Piece, body: dict[str, Any], parse: Callable[[Any, Piece], list[Sample]], take: Accept
    ) -> None:
        """Gives the piece's samples to `take`; raises `RunFailure` when all tries have failed."""
        failures: list[Failure] = []
        while len(failures) <= self._limits.num_retries:
            if failures:
                self._client.counts["retries"] += 1
                await asyncio.sleep(min(self._limits.first_pause * 2 ** (len(failures) - 1), _LONGEST_PAUSE))
            async with self._place(piece.count) as server:
                try:
                    samples = await self._try(server, piece, body, parse)
                except Failure as failure:
                    self._note(server, failure)
                    failures.append(failure)
                else:
                    take(piece, samples)
                    return
            if failures[-1].kind == "stale":
                raise ServerChanged(server.url, failures[-1].what)
            timeouts = sum(failure.kind == "timeout" for failure in failures)
            if failures[-1].kind == "refused" or timeouts == _MOST_TIMEOUTS:
                break
        text = (
            f"vllm: no answer for prompt {piece.prompt_id} at step {piece.step}, samples {piece.first} to "
            f"{piece.first + piece.count - 1}, in {len(failures)} tries; the last: {failures[-1]}"
        )
        raise (RunFailure if failures[-1].kind == "refused" else ServersLost)(text)

    async def watch(self, server: Server) -> None:
        """Returns when the server has given no sign of life so often that it is taken for frozen."""
        missed = 0
        while missed < self._limits.missed_pulses:
            await asyncio.sleep(self._limits.pulse_seconds)
            try:
                # Through to the worker: the port alone answers for an engine that has stopped.
                await self._clients.rpc(server, "r1jax_state", seconds=self._limits.pulse_seconds)
                missed = 0
                # Requests end within their own limit, which may be longer than ddp_timeout.
                progress.report("rollout")
            except Failure as failure:
                missed = missed + 1 if failure.kind == "timeout" else 0
        logger.warning("vllm: %s gives no sign of life; its requests are given up", server.url)
        self._silent[server.url].set()
        async with self._changed:
            self._changed.notify_all()

    async def _try(
        self, server: Server, piece: Piece, body: dict[str, Any], parse: Callable[[Any, Piece], list[Sample]]
    ) -> list[Sample]:
        call = self._clients.call(server, "/v1/completions", body, self._limits.request_seconds)
        answer = await self._while_alive(server, call)
        if server.instance is not None and answer.instance != server.instance:
            raise Failure("stale", server.url, "was started again, or given other weights, since it got this run's")
        try:
            return parse(answer.content, piece)
        except Malformed as error:
            raise Failure("malformed", server.url, f"/v1/completions: {error}") from error

    async def _while_alive(self, server: Server, call: Coroutine[Any, Any, Answer]) -> Answer:
        """The call's answer; raises `Failure` as soon as the server is taken for frozen."""
        answer = asyncio.ensure_future(call)
        silence = asyncio.ensure_future(self._silent[server.url].wait())
        try:
            await asyncio.wait((answer, silence), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            times, seconds = self._limits.missed_pulses, self._limits.pulse_seconds
            raise Failure("silent", server.url, f"no sign of life, asked {times} times for {seconds:g} s each")
        finally:
            await _ended(answer, silence)

    @contextlib.asynccontextmanager
    async def _place(self, count: int) -> AsyncIterator[Server]:
        """A server with room, the least loaded one that is not resting; waits for one. Raises when all are frozen."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free(count) is not None or not self._alive())
            server = self._free(count)
            if server is None:
                raise ServersLost(f"vllm: no sign of life from {', '.join(self._silent)}")
            server.in_flight += count
        try:
            yield server
        finally:
            server.in_flight -= count
            async with self._changed:
                self._changed.notify_all()

    def _alive(self) -> list[Server]:
        return [server for server in self._client.in_use if not self._silent[server.url].is_set()]

    def _free(self, count: int) -> Server | None:
        now, alive = time.monotonic(), self._alive()
        awake = [server for server in alive if server.resting_until <= now]
        server = min(awake or alive, key=lambda one: (one.in_flight, one.turn), default=None)
        # One piece is always let in, however large it is.
        room = server is not None and (not server.in_flight or server.in_flight + count <= self._limits.in_flight)
        return server if room else None

    def _note(self, server: Server, failure: Failure) -> None:
        self._client.counts[failure.kind] += 1
        server.resting_until = time.monotonic() + _REST_SECONDS
        logger.warning("vllm: %s (%s)", failure, failure.kind)


async def _ended(*tasks: "asyncio.Future[Any]") -> None:
    """Nothing, when none of the tasks runs any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
