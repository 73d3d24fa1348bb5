"""Samples from one or several vLLM servers: requests go where least is under way, and what fails is asked again.

A sample is known by (step, prompt id, number). Its request is one at a time, the connection of a try that was given up
is closed before the next try, and one answer is taken: nothing is counted twice. Everything ends within a time.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx

from r1jax.config.errors import RunFailure, need
from r1jax.rollout import vllm_http
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.vllm_http import Failure
from r1jax.rollout.vllm_requests import Malformed, Piece, Sample, body_of, pieces_of, samples_of

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_REST_SECONDS = 2.0
"""A server that failed gets no new request for so long while another one can take it."""
_LONGEST_PAUSE = 8.0


class ServerChanged(RunFailure):
    """A server answered that has not the weights it was given: it was started again, or somebody else pushed."""

    def __init__(self, url: str, what: str) -> None:
        super().__init__(f"vllm: {url} {what}; its samples would be another policy's")
        self.url = url


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How long and how much."""

    request_seconds: float = 600.0
    """Until the answer to one request is whole."""
    control_seconds: float = 120.0
    """The same for everything but completions."""
    connect_seconds: float = 10.0
    num_retries: int = 4
    """Tries of a request after the first."""
    in_flight: int = 128
    """Samples asked of one server at a time by this process."""
    first_pause: float = 0.5
    """Seconds before the second try; doubles each time."""


@dataclasses.dataclass(kw_only=True)
class Server:
    """One server as this process knows it."""

    url: str
    instance: str | None = None
    """The process that has the weights; None: nobody has looked yet."""
    in_flight: int = 0
    resting_until: float = 0.0


class VllmClient:
    """Plain functions outside, asyncio inside; one call at a time."""

    def __init__(self, urls: Sequence[str], key: str, *, limits: Limits | None = None, first_server: int = 0) -> None:
        """first_server: where equally loaded servers are asked first, another one for each trainer process."""
        assert urls, "a client of no server"
        start = first_server % len(urls)
        self.servers = [Server(url=url.rstrip("/")) for url in (*urls[start:], *urls[:start])]
        self.key, self.limits = key, limits or Limits()
        self.counts: collections.Counter[str] = collections.Counter()
        """Failures so far by kind, and `retries`."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        settings: SamplingSettings,
        *,
        num_generations: int,
        step: int | None,
        model: str,
        vocab_size: int,
        version: int | None = None,
    ) -> list[list[Sample]]:
        """Each prompt's samples, in the prompts' order; version: the one that all servers have.

        Raises `RunFailure` for a sample that could not be had, and `ServerChanged` where the weights are not known.
        """
        # Whole groups, so that a prompt is read once; pieces of them where servers would have nothing to do.
        size = num_generations if len(prompts) >= len(self.servers) else -(-num_generations // len(self.servers))
        pieces = pieces_of(prompts, prompt_ids, num_generations, step, min(size, self.limits.in_flight))

        async def draw(clients: "Clients") -> list[list[Sample]]:
            def parse(content: Any, piece: Piece) -> list[Sample]:
                return samples_of(content, piece, settings, vocab_size=vocab_size, version=version)

            router = _Router(self, clients)
            asked = [router.ask(piece, body_of(piece, settings, model), parse) for piece in pieces]
            return await all_or_none(asked)

        drawn = iter(self.run(draw))
        per_prompt = -(-num_generations // min(size, self.limits.in_flight))
        return [[one for _ in range(per_prompt) for one in next(drawn)] for _ in prompts]

    def run(self, work: Callable[["Clients"], Coroutine[Any, Any, Result]]) -> Result:
        """The result of `work` with connections to the servers, which are closed when it ends."""

        async def inside() -> Result:
            async with self._connected() as clients:
                return await work(clients)

        return asyncio.run(inside())

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator["Clients"]:
        async with contextlib.AsyncExitStack() as stack:
            seconds = self.limits.connect_seconds
            made = [vllm_http.connect(server.url, self.key, seconds) for server in self.servers]
            yield Clients(self, [await stack.enter_async_context(one) for one in made])


class Clients:
    """Open connections to the servers of a client."""

    def __init__(self, owner: VllmClient, clients: Sequence[httpx.AsyncClient]) -> None:
        self.owner = owner
        self._of = dict(zip((server.url for server in owner.servers), clients, strict=True))

    async def call(
        self, server: Server, path: str, body: Any = None, seconds: float | None = None, *, plain: bool = False
    ) -> vllm_http.Answer:
        """One answer of a server; raises `Failure`."""
        seconds = self.owner.limits.control_seconds if seconds is None else seconds
        return await vllm_http.call(self._of[server.url], server.url, path, body, seconds, plain=plain)

    async def rpc(self, server: Server, method: str, *args: Any) -> dict[str, Any]:
        """What the first worker's method answers; raises `Failure` where any worker refuses."""
        seconds = self.owner.limits.control_seconds
        body = {"method": method, "args": list(args), "timeout": seconds}
        answer = await self.call(server, "/collective_rpc", body, seconds)
        results = answer.content.get("results") if isinstance(answer.content, dict) else None
        if not isinstance(results, list) or not results or not all(isinstance(one, dict) for one in results):
            raise Failure("malformed", server.url, f"{method} answered something else than its workers' results")
        for one in results:
            if not one.get("ok"):
                raise Failure("refused", server.url, f"{method}: {one.get('error')}")
        return results[0]

    async def each(self, work: Callable[[Server], Awaitable[Result]]) -> list[Result]:
        """The results of all servers, in their order; the first failure ends the others."""
        return await all_or_none([work(server) for server in self.owner.servers])


class _Router:
    """Which server gets which request, for one call of `VllmClient.sample`."""

    def __init__(self, client: VllmClient, clients: Clients) -> None:
        self._client, self._clients, self._limits = client, clients, client.limits
        self._changed = asyncio.Condition()

    async def ask(
        self, piece: Piece, body: dict[str, Any], parse: Callable[[Any, Piece], list[Sample]]
    ) -> list[Sample]:
        """The piece's samples; raises `RunFailure` when all tries have failed."""
        last: Failure | None = None
        for attempt in range(self._limits.num_retries + 1):
            if attempt:
                self._client.counts["retries"] += 1
                await asyncio.sleep(min(self._limits.first_pause * 2 ** (attempt - 1), _LONGEST_PAUSE))
            async with self._place(piece.count) as server:
                try:
                    return await self._try(server, piece, body, parse)
                except Failure as failure:
                    self._note(server, failure)
                    last = failure
            if last.kind == "refused":
                break
            if last.kind == "stale":
                raise ServerChanged(server.url, last.what)
        raise RunFailure(
            f"vllm: no answer for prompt {piece.prompt_id} at step {piece.step}, samples {piece.first} to "
            f"{piece.first + piece.count - 1}, in {attempt + 1} tries; the last: {last}"
        )

    async def _try(
        self, server: Server, piece: Piece, body: dict[str, Any], parse: Callable[[Any, Piece], list[Sample]]
    ) -> list[Sample]:
        answer = await self._clients.call(server, "/v1/completions", body, self._limits.request_seconds)
        if server.instance is not None and answer.instance != server.instance:
            raise Failure("stale", server.url, "was started again since it got its weights")
        try:
            return parse(answer.content, piece)
        except Malformed as error:
            raise Failure("malformed", server.url, f"/v1/completions: {error}") from error

    @contextlib.asynccontextmanager
    async def _place(self, count: int) -> AsyncIterator[Server]:
        """A server with room, the least loaded one that is not resting; waits for one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free(count) is not None)
            server = self._free(count)
            assert server is not None
            server.in_flight += count
        try:
            yield server
        finally:
            server.in_flight -= count
            async with self._changed:
                self._changed.notify_all()

    def _free(self, count: int) -> Server | None:
        now = time.monotonic()
        awake = [server for server in self._client.servers if server.resting_until <= now]
        server = min(awake or self._client.servers, key=lambda one: one.in_flight)
        # One piece is always let in, however large it is.
        return server if not server.in_flight or server.in_flight + count <= self._limits.in_flight else None

    def _note(self, server: Server, failure: Failure) -> None:
        self._client.counts[failure.kind] += 1
        server.resting_until = time.monotonic() + _REST_SECONDS
        logger.warning("vllm: %s (%s)", failure, failure.kind)


async def all_or_none(work: Sequence[Awaitable[Result]]) -> list[Result]:
    """All results in their order; where one raises, the others are ended before it goes on."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_urls(urls: Sequence[str], field: str) -> None:
    """Raises `UserError` for what is no address of a server."""
    for url in urls:
        if not url.startswith(("http://", "https://", "unix:/")):
            raise need(field, "http://host:port, https://host:port or unix:/path", url, "add http:// before the host")
    if not urls:
        raise need(field, "at least one address", "none", "name the server, such as http://127.0.0.1:8000")
    if len(set(urls)) < len(urls):
        raise need(field, "each server once", ", ".join(urls), "remove the second mention")
