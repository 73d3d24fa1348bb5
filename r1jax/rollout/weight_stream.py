"""A parameter tree as the bytes of one safetensors file, and where they may go: a file, or a server's own port.

The header follows from shapes, so it goes first; then each tensor when it is gathered. No more than two are whole at a
time, on any device or host.
"""

import collections
import http.client
import math
import os
import socket
import ssl
from collections.abc import Iterator
from typing import Protocol, runtime_checkable
from urllib.parse import quote, urlsplit

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.models.config import DecoderConfig
from r1jax.models.hf_tensors import HfTensor, file_header, gather, hf_tensors
from r1jax.models.parameters import Params

UPLOAD_PATH = "/r1jax/weights/"
_AHEAD = 2


def header_of(params: Params, config: DecoderConfig, dtype: str, version: int) -> bytes:
    """The file's beginning, which says the version too."""
    return file_header(hf_tensors(params, config), dtype, {"version": str(version)})


def data_bytes(params: Params, config: DecoderConfig, dtype: str) -> int:
    """Length of what follows the header."""
    return jnp.dtype(dtype).itemsize * sum(math.prod(tensor.shape) for tensor in hf_tensors(params, config))


def gathered(params: Params, config: DecoderConfig, dtype: str) -> Iterator[memoryview]:
    """Each tensor's bytes in the header's order. Every process must take all of them."""
    ahead: collections.deque[jax.Array] = collections.deque()
    rest: Iterator[HfTensor] = hf_tensors(params, config)
    while True:
        # The next one is gathered while this one is written.
        while len(ahead) < _AHEAD and (tensor := next(rest, None)) is not None:
            ahead.append(gather(tensor, dtype))
        if not ahead:
            return
        yield np.ascontiguousarray(ahead.popleft()).reshape(-1).view(np.uint8).data


@runtime_checkable
class Sink(Protocol):
    """Where the bytes go; each method raises OSError for what the other end does not take, ConnectionError or
    FileNotFoundError where it is not there any more."""

    def write(self, data: bytes | memoryview) -> None:
        """Takes the next bytes."""
        ...

    def finish(self) -> None:
        """Returns when the other end has the whole."""
        ...

    def abort(self) -> None:
        """Leaves nothing behind."""
        ...


class FileSink:
    """A file that appears under its name when it is whole."""

    def __init__(self, path: str) -> None:
        self._path, self._part = path, path + ".part"
        # The last version's file is written over, under another name: a tmpfs gives no new pages then.
        if os.path.exists(path):
            os.replace(path, self._part)
        descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self._file = os.fdopen(descriptor, "wb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        """Takes the next bytes."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            # The system names no file here, and whoever makes room must know where.
            raise OSError(error.errno, error.strerror, self._path) from error

    def finish(self) -> None:
        """Renames."""
        self._file.truncate()
        self._file.close()
        os.replace(self._part, self._path)

    def abort(self) -> None:
        """Removes what there is."""
        self._file.close()
        if os.path.exists(self._part):
            os.unlink(self._part)


class UploadSink:
    """PUT to a server, piece by piece: over TCP, TLS, or the Unix socket of a `unix:/path` address."""

    def __init__(self, url: str, key: str, name: str, num_bytes: int, timeout: float) -> None:
        """timeout: seconds that the other end may be silent."""
        self._connection = _connection(url, timeout)
        self._connection.putrequest("PUT", UPLOAD_PATH + quote(name))
        self._connection.putheader("Authorization", f"Bearer {key}")
        self._connection.putheader("Content-Type", "application/octet-stream")
        self._connection.putheader("Content-Length", str(num_bytes))
        self._connection.endheaders()

    def write(self, data: bytes | memoryview) -> None:
        """Sends."""
        try:
            self._connection.send(data)
        except OSError as error:
            # A server that refuses says why before it hangs up.
            self._heard()
            raise ConnectionError(str(error)) from error

    def finish(self) -> None:
        """Waits for the server's word."""
        self._heard()
        self._connection.close()

    def abort(self) -> None:
        """Hangs up; the server removes what it has."""
        self._connection.close()

    def _heard(self) -> None:
        """Nothing where the server took all; raises OSError with its words, ConnectionError without any."""
        try:
            response = self._connection.getresponse()
            text = response.read(2000).decode(errors="replace")
        except (http.client.HTTPException, OSError) as error:
            raise ConnectionError(f"no answer to the upload: {error or type(error).__name__}") from error
        if response.status != 200:
            raise OSError(f"the upload was answered {response.status}: {text}")


def _connection(url: str, timeout: float) -> http.client.HTTPConnection:
    if url.startswith("unix:"):
        return _UnixConnection(url.removeprefix("unix:"), timeout)
    parts = urlsplit(url)
    assert parts.hostname, url
    if parts.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout, context=context)
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
