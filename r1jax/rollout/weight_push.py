"""The trainer's weights become the servers': written where they can read them, looked at, loaded, old caches dropped.

    file     one file in the server's private directory, where this process sees that directory (one machine, or a
             shared file system); its pages are used again each time
    upload   the same bytes through the server's own port, where it does not

Two phases: no server loads before all have accepted. The version goes with the file and comes back with the state.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from typing import Literal

from r1jax.config.errors import RunFailure, need
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import Params
from r1jax.rollout.vllm_checks import Found
from r1jax.rollout.vllm_client import Clients, Server, ServersLost, VllmClient
from r1jax.rollout.vllm_http import Failure
from r1jax.rollout.weight_stream import FileSink, Sink, UploadSink, data_bytes, gathered, header_of

Route = Literal["auto", "file", "upload"]
_CACHE_SECONDS = 10.0
"""A server may still hold blocks of requests that have just ended; after so long it holds them for another reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushTimes:
    """Seconds of the phases."""

    write: float
    """Gathering and writing, which overlap."""
    prepare: float
    apply: float
    reset: float

    @property
    def total(self) -> float:
        """From the trainer's arrays to a server that samples with them."""
        return self.write + self.prepare + self.apply + self.reset


class WeightPush:
    """Pushes versions of one model to the servers of a client."""

    def __init__(self, client: VllmClient, found: Found, config: DecoderConfig, *, route: Route = "auto") -> None:
        """Raises `UserError` where route is file and a server's directory cannot be seen."""
        self._client, self._config, self.dtype = client, config, found.dtype
        self._name = f"weights-{secrets.token_hex(8)}.safetensors"
        folders = [None if route == "upload" else state["sync_dir"] for state in found.states]
        seen = client.run(lambda clients: _seen(clients, folders))
        self._folders = [folder if ok else None for folder, ok in zip(folders, seen, strict=True)]
        if route == "file" and not all(self._folders):
            missing = next(server.url for server, ok in zip(client.in_use, seen, strict=True) if not ok)
            rule = f"the directory of {missing} to be seen from here"
            raise need("route", rule, "another machine's or another user's", "use upload, or a shared one")

    @property
    def routes(self) -> list[str]:
        """How each server gets its weights."""
        return ["upload" if folder is None else "file" for folder in self._folders]

    def send(self, params: Params, version: int, *, writes: bool) -> float:
        """Seconds it took to bring the bytes to all servers. Every process must call it, one of them writes.

        Raises `ServersLost` where a server, or its directory, is not there any more, `RunFailure` where it cannot take
        them; after the last tensor is gathered, as the others of a mesh would wait for it otherwise.
        """
        start = time.perf_counter()
        failure: OSError | None = None
        with contextlib.ExitStack() as stack:
            sinks: list[Sink] = []
            if writes:
                try:
                    sinks += self._open(params, version, stack)
                except OSError as error:
                    failure = error
            for data in gathered(params, self._config, self.dtype):
                failure = failure or _write(sinks, data)
            if failure is None:
                failure = _finish(sinks)
            if failure is None:
                stack.pop_all()
        if failure is not None:
            gone = isinstance(failure, (ConnectionError, TimeoutError, FileNotFoundError))
            text = f"vllm: weights of step {version} did not reach every server: {_words(failure)}"
            raise (ServersLost if gone else RunFailure)(text)
        return time.perf_counter() - start

    def load(self, version: int, owner: str) -> tuple[float, float, float]:
        """Seconds of prepare, apply and reset, after which all servers have this version; raises as `send`.

        owner: the run's name, which servers give with the version.
        """
        times = []
        steps = (self._prepare, self._apply, self._reset)

        async def work(clients: Clients) -> None:
            for step in steps:
                start = time.perf_counter()
                await step(clients, version, owner)
                times.append(time.perf_counter() - start)

        try:
            self._client.run(work)
        except Failure as failure:
            text = f"vllm: weights of step {version} are not loaded: {failure}"
            raise (RunFailure if failure.kind == "refused" else ServersLost)(text) from failure
        return times[0], times[1], times[2]

    def close(self) -> None:
        """Removes what was written."""
        for folder in filter(None, self._folders):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, self._name))

    def _open(self, params: Params, version: int, stack: contextlib.ExitStack) -> list[Sink]:
        """A sink for each directory and each upload, with the header written, to be aborted by the stack."""
        header = header_of(params, self._config, self.dtype, version)
        size = len(header) + data_bytes(params, self._config, self.dtype)
        sinks: list[Sink] = []
        for sink in self._sinks(size):
            stack.callback(sink.abort)
            sink.write(header)
            sinks.append(sink)
        return sinks

    def _sinks(self, size: int) -> Iterator[Sink]:
        for folder in dict.fromkeys(filter(None, self._folders)):
            yield FileSink(os.path.join(folder, self._name))
        for server, folder in zip(self._client.in_use, self._folders, strict=True):
            if folder is None:
                yield UploadSink(server.url, self._client.key, self._name, size, self._client.limits.control_seconds)

    async def _prepare(self, clients: Clients, version: int, owner: str) -> None:
        await clients.each(lambda server: clients.rpc(server, "r1jax_prepare", self._name, version, owner))

    async def _apply(self, clients: Clients, version: int, owner: str) -> None:
        del owner
        await clients.each(lambda server: clients.rpc(server, "r1jax_apply", version))

    async def _reset(self, clients: Clients, version: int, owner: str) -> None:
        """Keys and values of the old weights must go: without it a cached prompt was off by 2e-2 [vLLM 0.32]."""
        del version, owner
        await clients.each(lambda server: _reset_cache(clients, server))


async def _reset_cache(clients: Clients, server: Server) -> None:
    deadline = time.monotonic() + _CACHE_SECONDS
    while True:
        answer = await clients.call(server, "/reset_prefix_cache", {})
        if not isinstance(answer.content, dict) or answer.content.get("success", True):
            return
        if time.monotonic() > deadline:
            raise Failure("refused", server.url, "/reset_prefix_cache: requests are under way that keep the old cache")
        await asyncio.sleep(0.05)


async def _seen(clients: Clients, folders: list[str | None]) -> list[bool]:
    """Whether this process and the server see one directory: a greeting is written and its digest asked for."""
    servers = clients.owner.in_use
    return [
        folder is not None and await _greets(clients, server, folder)
        for server, folder in zip(servers, folders, strict=True)
    ]


async def _greets(clients: Clients, server: Server, folder: str) -> bool:
    name, greeting = f"hello-{secrets.token_hex(8)}.safetensors", secrets.token_bytes(32)
    path = os.path.join(folder, name)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, greeting)
            found = await clients.rpc(server, "r1jax_digest", name)
        finally:
            os.close(descriptor)
            os.unlink(path)
    except (OSError, Failure):
        return False
    return found.get("sha256") == hashlib.sha256(greeting).hexdigest()


def _write(sinks: list[Sink], data: memoryview) -> OSError | None:
    try:
        for sink in sinks:
            sink.write(data)
    except OSError as error:
        return error
    return None


def _finish(sinks: list[Sink]) -> OSError | None:
    try:
        for sink in sinks:
            sink.finish()
    except OSError as error:
        return error
    return None


def _words(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
