"""The door of the server: every request but the probes of its health shows the key, and every answer names the process
and the state of its weights.

Stock vLLM guards /v1 and /inference alone; /collective_rpc, /pause, /update_weights and /invocations answer anybody
[vLLM 0.32 with --api-key]. Starlette adds a --middleware outside of vLLM's own, so nothing is reached before this.
"""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from r1jax.vllm_plugin.changes import Changes
from r1jax.vllm_plugin.receive import ReceiveWeights

KEY = "R1JAX_VLLM_KEY"
INSTANCE = "R1JAX_VLLM_INSTANCE"
INSTANCE_HEADER = b"x-r1jax-instance"
OPEN_PATHS = frozenset({"/health", "/ping", "/metrics"})

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequireKey:
    """ASGI middleware: 401 without `Authorization: Bearer KEY`; raises RuntimeError where no key is set."""

    def __init__(self, app: App) -> None:
        key, instance = os.environ.get(KEY), os.environ.get(INSTANCE)
        if not key or not instance:
            missing = INSTANCE if key else KEY
            raise RuntimeError(f"{missing}: need a value, got nothing; start the server with launch/vllm_server.sh")
        self._app = ReceiveWeights(app)
        self._expected = b"Bearer " + key.encode()
        # A restarted server has the weights it was started with: its answers must not pass for the old one's.
        self._instance, self._changes = instance, Changes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what may pass."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and (scope["path"] in OPEN_PATHS or self._has_key(scope)):
            named = self._named(send)
            await self._app(scope, self._changes.watched(scope, receive), named)
        elif scope["type"] == "http":
            await _refuse(send)
        elif scope["type"] == "websocket" and self._has_key(scope):
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)

    def _named(self, send: Send) -> Send:
        """Adds PROCESS.CHANGES to the answer's headers; nothing where weights may have changed since the request."""
        before = self._changes.count

        async def with_instance(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                name = f"{self._instance}.{before}" if self._changes.count == before else ""
                message = {**message, "headers": [*message.get("headers", ()), (INSTANCE_HEADER, name.encode())]}
            await send(message)

        return with_instance


async def _refuse(send: Send) -> None:
    body = b'{"error": "unauthorized"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
