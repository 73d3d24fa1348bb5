"""Weights that come over the server's own port, for a trainer that shares no file system with it.

    PUT /r1jax/weights/NAME.safetensors     Content-Length: as long as the file

The body goes to the private directory under another name and is renamed when it is whole; loading it is another call
(`worker.WeightSync`). Nothing listens but the server's own socket, so TCP, a Unix socket and a TLS proxy all work.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from r1jax.vllm_plugin.folder import Refused, path_of, sync_folder

PREFIX = "/r1jax/weights/"
SILENCE_SECONDS = 60.0
"""Without a byte for so long, an upload is given up."""

Message = MutableMapping[str, Any]


class ReceiveWeights:
    """ASGI middleware that answers PUT below `PREFIX` and passes everything else on. Stands behind `RequireKey`."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app, self._folder = app, sync_folder()
        self._busy: set[str] = set()

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        """Answers, or passes on."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        status, content = 200, {"ok": True}
        try:
            if scope["method"] != "PUT":
                raise Refused("method: need PUT, got another; see r1jax.vllm_plugin.receive")
            path = path_of(scope["path"][len(PREFIX) :], self._folder)
            await self._receive(path, _length(scope), receive)
        except Refused as error:
            status, content = 400, {"ok": False, "error": str(error)}
        except OSError as error:
            status, content = 507, {"ok": False, "error": f"sync directory: {error.strerror or error}"}
        await _answer(send, status, content)

    async def _receive(self, path: str, length: int, receive: Callable[[], Awaitable[Message]]) -> None:
        if path in self._busy:
            raise Refused("file: need one upload of a name at a time, got a second; one trainer may use a server")
        self._busy.add(path)
        part = path + ".part"
        try:
            with open_in_place(path, part) as file:
                await _copy(file, length, receive)
            os.replace(part, path)
        except BaseException:
            # Whatever ended it, cancellation too, half a model must not stay in memory.
            if os.path.exists(part):
                os.unlink(part)
            raise
        finally:
            self._busy.discard(path)


def open_in_place(path: str, part: str) -> Any:
    """The file at `part`, open for writing from its start. Where `path` exists it becomes `part`: pages that a tmpfs
    has already given are written in a third of the time that new ones take."""
    if os.path.exists(path):
        os.replace(path, part)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    return os.fdopen(descriptor, "wb", buffering=0)


async def _copy(file: Any, length: int, receive: Callable[[], Awaitable[Message]]) -> None:
    received, more = 0, True
    while more:
        try:
            message = await asyncio.wait_for(receive(), SILENCE_SECONDS)
        except TimeoutError as error:
            raise Refused(f"body: need a byte a minute, got {received} of {length} bytes and silence") from error
        if message["type"] != "http.request":
            raise Refused(f"body: need {length} bytes, got {received}; the connection ended")
        body = message.get("body", b"")
        received += len(body)
        if received > length:
            raise Refused(f"body: need {length} bytes, got more")
        while body:
            body = body[file.write(body) :]
        more = message.get("more_body", False)
    if received != length:
        raise Refused(f"body: need {length} bytes, got {received}")
    file.truncate(length)


def _length(scope: Message) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    raise Refused("Content-Length: need the file's length, got none; send it")


async def _answer(send: Any, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
