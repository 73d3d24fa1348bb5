"""Samples from one or several vLLM servers, and calls to them: plain functions outside, asyncio inside.

A sample is known by (step, prompt id, number). Its request is one at a time, the connection of a try that was given up
is closed before the next try, and one answer is taken: nothing is counted twice. Everything ends within a time.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx

from r1jax.config.errors import RunFailure, need
from r1jax.rollout import vllm_http
from r1jax.rollout.vllm_http import Failure

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class ServersLost(RunFailure):
    """No server gives what is asked for at present: it is down, frozen, or talks nonsense. It may come back."""


class ServerChanged(ServersLost):
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
    pulse_seconds: float = 10.0
    """While requests are under way a server is asked so often for a sign of life, and has as long to give it."""
    missed_pulses: int = 3
    """So many in a row, and its requests are given up: a server that is frozen keeps its connections open."""


@dataclasses.dataclass(kw_only=True)
class Server:
    """One server as this process knows it."""

    url: str
    turn: int
    """Among equally loaded servers the one with the lowest is asked first."""
    instance: str | None = None
    """The process that has the weights and how often they had changed, by its answers; None: nobody has looked yet."""
    in_flight: int = 0
    resting_until: float = 0.0
    absent: bool = False
    """Left out, as it did not come back when the others did."""


class VllmClient:
    """Plain functions outside, asyncio inside; one call at a time."""

    def __init__(self, urls: Sequence[str], key: str, *, limits: Limits | None = None, first_server: int = 0) -> None:
        """first_server: where equally loaded servers are asked first, another one for each trainer process."""
        assert urls, "a client of no server"
        self.servers = [
            Server(url=url.rstrip("/"), turn=(place - first_server) % len(urls)) for place, url in enumerate(urls)
        ]
        self.key, self.limits = key, limits or Limits()
        self.counts: collections.Counter[str] = collections.Counter()
        """Failures so far by kind, `retries`, and `recoveries` (servers looked at and pushed to again)."""
        self._closed = False
        self._running: tuple[asyncio.AbstractEventLoop, Any] | None = None

    @property
    def in_use(self) -> list[Server]:
        """The servers that are not left out."""
        return [server for server in self.servers if not server.absent]

    def run(self, work: Callable[["Clients"], Coroutine[Any, Any, Result]]) -> Result:
        """The result of `work` with connections to the servers, which are closed when it ends."""

        async def inside() -> Result:
            self._running = (asyncio.get_running_loop(), asyncio.current_task())
            try:
                if self._closed:
                    raise asyncio.CancelledError("the client was closed")
                async with self._connected() as clients:
                    return await work(clients)
            finally:
                self._running = None

        return asyncio.run(inside())

    def close(self) -> None:
        """Ends the call that another thread is in, and every later one, by `asyncio.CancelledError` there."""
        self._closed = True
        if (running := self._running) is not None:
            loop, task = running
            with contextlib.suppress(RuntimeError):  # the loop has just closed
                loop.call_soon_threadsafe(task.cancel)

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

    async def rpc(self, server: Server, method: str, *args: Any, seconds: float | None = None) -> dict[str, Any]:
        """What the first worker's method answers, and the `instance` that answered; raises `Failure` where any worker
        refuses."""
        seconds = self.owner.limits.control_seconds if seconds is None else seconds
        body = {"method": method, "args": list(args), "timeout": seconds}
        answer = await self.call(server, "/collective_rpc", body, seconds)
        results = answer.content.get("results") if isinstance(answer.content, dict) else None
        if not isinstance(results, list) or not results or not all(isinstance(one, dict) for one in results):
            raise Failure("malformed", server.url, f"{method} answered something else than its workers' results")
        for one in results:
            if not one.get("ok"):
                raise Failure("refused", server.url, f"{method}: {one.get('error')}")
        return {**results[0], "instance": answer.instance}

    async def each(self, work: Callable[[Server], Awaitable[Result]]) -> list[Result]:
        """The results of all servers in use, in their order; the first failure ends the others."""
        return await all_or_none([work(server) for server in self.owner.in_use])


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
