"""The servers that a run uses: looked at when it starts, pushed to, asked whether they still have its weights, taken up
again when they were lost.

The first process decides which servers are in use and pushes; every process asks them for itself.
"""

import asyncio
import logging
import secrets
import time
from typing import Any

import jax
import numpy as np

from r1jax.config.errors import RunFailure, UserError, shown
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import Params
from r1jax.rollout.together import from_first, in_step
from r1jax.rollout.vllm_checks import Expected, Unreachable, check_servers
from r1jax.rollout.vllm_client import Clients, Server, ServerChanged, ServersLost, VllmClient
from r1jax.rollout.vllm_http import Failure
from r1jax.rollout.weight_push import PushTimes, Route, WeightPush

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0
"""For a server that was left out to say that it is back."""
_GRACE_SECONDS = 20.0
"""That others are waited for when one server is back."""


class Fleet:
    """The servers of a client, as one run sees them."""

    def __init__(
        self, client: VllmClient, expected: Expected, config: DecoderConfig, *, start_seconds: float, route: Route
    ) -> None:
        """start_seconds: servers may take so long to come up, now and after they were lost.

        Raises `UserError` for servers that do not fit.
        """
        self.client, self._expected, self._config = client, expected, config
        self._start_seconds = start_seconds
        self._route: Route = route
        self.found = check_servers(client, expected, start_seconds=start_seconds)
        self._push = WeightPush(client, self.found, config, route=route)
        # Another run's step may have the same number: a server says whose weights it has.
        token = from_first(lambda: np.frombuffer(secrets.token_bytes(8), np.uint8), np.zeros(8, np.uint8))
        self._owner = token.tobytes().hex()

    @property
    def incomplete(self) -> bool:
        """Whether a server was left out."""
        return len(self.client.in_use) < len(self.client.servers)

    def push(self, params: Params, version: int) -> PushTimes | None:
        """How long it took, in the first process, to give all servers these weights; every process must call it.

        Raises, in every process, `ServersLost` for a server that is not there, `RunFailure` for one that refuses.
        """
        times: list[PushTimes] = []

        def work() -> None:
            writes = jax.process_index() == 0
            seconds = self._push.send(params, version, writes=writes)
            if writes:
                prepare, apply, reset = self._push.load(version, self._owner)
                times.append(PushTimes(write=seconds, prepare=prepare, apply=apply, reset=reset))

        in_step(work, every=True)
        return times[0] if times else None

    def check_version(self, version: int | None) -> None:
        """Nothing; raises `ServerChanged` unless every server in use has this version, `ServersLost` without answer."""

        async def look(clients: Clients) -> None:
            await clients.each(lambda server: self._check(clients, server, version))

        self.client.run(look)

    def look_for_absent(self) -> None:
        """Takes up again what was left out and answers by now; every process must call it."""
        absent = [server for server in self.client.servers if server.absent]
        back = from_first(lambda: np.array(self._answer(absent, _LOOK_SECONDS)), np.zeros(len(absent), bool))
        if back.any():
            self._take_up([server for server, here in zip(absent, back, strict=True) if not here])

    def reopen(self) -> None:
        """Waits for servers that were lost and looks at them as at the start; every process must call it.

        One that does not come back while another one does is left out. Raises `RunFailure`, in every process, where
        none does, or where one came back that does not fit.
        """
        servers = self.client.servers
        back = from_first(lambda: np.array(self._wait_for_any()), np.zeros(len(servers), bool))
        self._take_up([server for server, here in zip(servers, back, strict=True) if not here])

    def close(self) -> None:
        """Removes what was written for the servers and ends a call that is under way."""
        self.client.close()
        self._push.close()

    def _take_up(self, absent: list[Server]) -> None:
        for server in self.client.servers:
            server.absent = server in absent
            if server.absent:
                logger.warning("vllm: going on without %s, which does not answer", server.url)
        in_step(self._look_again, every=False)

    def _look_again(self) -> None:
        self._push.close()
        try:
            found = check_servers(self.client, self._expected, start_seconds=self._start_seconds)
            if found.dtype != self.found.dtype or found.model != self.found.model:
                raise RunFailure(f"vllm: a server came back with dtype {found.dtype} and model {found.model}")
            self._push = WeightPush(self.client, found, self._config, route=self._route)
        except Unreachable as error:
            raise ServersLost(f"vllm: a server went again as soon as it had come: {error}") from error
        except UserError as error:
            raise RunFailure(f"vllm: a server came back that does not fit: {error}") from error
        self.found = found

    def _wait_for_any(self) -> list[bool]:
        """Whether each server answers, when all do or some have and the others were waited for; raises `RunFailure`."""
        deadline, servers = time.monotonic() + self._start_seconds, self.client.servers
        logger.warning("vllm: waiting up to %.0f s for servers that were lost", self._start_seconds)
        while True:
            back = self._answer(servers, _LOOK_SECONDS)
            if all(back) or (any(back) and time.monotonic() > deadline):
                return back
            if any(back):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if time.monotonic() > deadline:
                urls = ", ".join(server.url for server in servers)
                raise RunFailure(
                    f"vllm: no server came back within {self._start_seconds:g} s (vllm_server_timeout): {urls}"
                )
            time.sleep(1)

    def _answer(self, servers: list[Server], seconds: float) -> list[bool]:
        """Whether each of them answers now, its worker included."""

        async def one(clients: Clients, server: Server) -> bool:
            try:
                await clients.rpc(server, "r1jax_state", seconds=seconds)
            except Failure as failure:
                return failure.kind in ("refused", "malformed")  # there, and what is wrong is said by the checks
            return True

        async def ask(clients: Clients) -> list[bool]:
            return list(await asyncio.gather(*(one(clients, server) for server in servers)))

        return self.client.run(ask)

    async def _check(self, clients: Clients, server: Server, version: int | None) -> None:
        state = await self._state(clients, server)
        if state.get("torn"):
            raise ServerChanged(server.url, "has weights that were cut off while they were loaded")
        if state.get("version") != version:
            raise ServerChanged(server.url, f"has version {shown(state.get('version'))}, not {version}")
        if state.get("owner") != self._owner:
            raise ServerChanged(server.url, f"has version {version} of another run")
        if not state["instance"]:
            raise ServerChanged(server.url, "is being given other weights")
        server.instance = state["instance"]

    async def _state(self, clients: Clients, server: Server) -> dict[str, Any]:
        limits, last = self.client.limits, None
        for attempt in range(limits.num_retries + 1):
            if attempt:
                await asyncio.sleep(limits.first_pause)
            try:
                return await clients.rpc(server, "r1jax_state", seconds=limits.pulse_seconds)
            except Failure as failure:
                self.client.counts[failure.kind] += 1
                last = failure
        raise ServersLost(f"vllm: no state from a server in {limits.num_retries + 1} tries; the last: {last}")
