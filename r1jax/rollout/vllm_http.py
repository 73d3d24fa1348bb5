"""One call to one vLLM server: JSON goes there and comes back within a time, or a `Failure` says what happened."""

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import httpx

from r1jax.config.errors import shown

FailureKind = Literal["timeout", "connection", "status", "malformed", "stale", "refused", "silent"]
INSTANCE_HEADER = "x-r1jax-instance"
MOST_BYTES = 1 << 28
"""Of an answer: a broken server must not fill the memory. 256 MiB are ten million tokens with log-probabilities."""
_TRY_AGAIN = frozenset({408, 409, 425, 429})


class Failure(Exception):
    """A call without a usable answer. `refused` is not tried again: the server would say the same once more."""

    def __init__(self, kind: FailureKind, url: str, what: str) -> None:
        super().__init__(f"{url}: {what}")
        self.kind, self.url, self.what = kind, url, what


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server said."""

    content: Any
    instance: str
    """The server process, as `launch/vllm_server.sh` named it, and a count of changes of its weights; empty where they
    may have changed while it answered, and for a server that has no name."""


def connect(url: str, key: str, connect_timeout: float) -> httpx.AsyncClient:
    """A client for http://host:port, https://..., or unix:/path/of/socket."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    transport = None
    if url.startswith("unix:"):
        transport = httpx.AsyncHTTPTransport(uds=url.removeprefix("unix:"), limits=limits)
    return httpx.AsyncClient(
        base_url="http://localhost" if transport else url,
        transport=transport,
        limits=limits,
        headers={"Authorization": f"Bearer {key}"},
        timeout=httpx.Timeout(None, connect=connect_timeout),  # `call` bounds the whole
        trust_env=False,  # a proxy in the environment is for the internet
    )


async def call(
    client: httpx.AsyncClient,
    url: str,
    path: str,
    body: Mapping[str, Any] | None,
    timeout: float,
    *,
    plain: bool = False,
) -> Answer:
    """The server's answer to POST (to GET without a body); raises `Failure` after `timeout` seconds at the latest.

    plain: the content does not matter.
    """
    try:
        async with asyncio.timeout(timeout):
            method = "GET" if body is None else "POST"
            async with client.stream(method, path, json=body) as response:
                data = await _read(response, url)
                status, instance = response.status_code, response.headers.get(INSTANCE_HEADER, "")
    except (TimeoutError, httpx.TimeoutException) as error:
        raise Failure("timeout", url, f"no answer to {path} within {timeout:g} s") from error
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise Failure("connection", url, f"{path}: {error or type(error).__name__}") from error
    if status != 200:
        kind = "status" if status >= 500 or status in _TRY_AGAIN else "refused"
        raise Failure(kind, url, f"{path} answered {status}: {_said(data)}")
    return Answer(content=None if plain else _json(data, url, path), instance=instance)


async def _read(response: httpx.Response, url: str) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > MOST_BYTES:
            raise Failure("malformed", url, f"an answer of more than {MOST_BYTES:,} bytes")
        parts.append(part)
    return b"".join(parts)


def _json(data: bytes, url: str, path: str) -> Any:
    """None for an empty answer, which some routes of older servers give."""
    if not data:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        got = shown(data[:60].decode(errors="replace"))
        raise Failure("malformed", url, f"{path} answered {got}, which is no JSON") from error


def _said(data: bytes) -> str:
    """An error's own words, short."""
    text = data[:2000].decode(errors="replace")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = text
    error = content.get("error", content.get("detail", content)) if isinstance(content, dict) else content
    return shown(error.get("message", error) if isinstance(error, dict) else error, limit=200)
