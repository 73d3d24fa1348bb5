"""How often this server's weights may have been changed, as each answer says.

A trainer that has pushed weights believes an answer where nobody has changed them since: between the request's coming
and its answer, and since the trainer looked. Counted are vLLM's own routes that change weights, and every call of a
worker's method that is not known to leave them alone.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_RPC = "/collective_rpc"
_READS = frozenset({"r1jax_state", "r1jax_digest", "r1jax_prepare"})
_CHANGES = ("/update_weights", "/start_weight_update", "/finish_weight_update", "/wake_up", "/sleep")
_MOST_BYTES = 1 << 16
"""Of a call's JSON; a longer one is counted unread."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class Changes:
    """The count of one server process."""

    def __init__(self) -> None:
        self.count = 0

    def watched(self, scope: Message, receive: Receive) -> Receive:
        """The request's `receive`, which counts before the application has the whole of a call that may change."""
        if scope["path"].startswith(_CHANGES):
            self.count += 1
        if scope["path"] != _RPC:
            return receive
        parts: list[bytes] = []

        async def counting() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                parts.append(message.get("body", b""))
                if not message.get("more_body", False) and not _only_reads(b"".join(parts)):
                    self.count += 1
            return message

        return counting


def _only_reads(body: bytes) -> bool:
    if len(body) > _MOST_BYTES:
        return False
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False
    method = content.get("method") if isinstance(content, dict) else None
    return isinstance(method, str) and method in _READS
