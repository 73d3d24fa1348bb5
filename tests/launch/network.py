"""Two hosts on this machine: network namespaces with an address and a name each, joined by a cable that can be pulled;
and a connection between them that behaves as ssh and sshd do.

    python network.py serve ADDRESS LOG     what sshd does; everything that its commands write also goes to LOG
    python network.py HOST COMMAND          what ssh does
"""

import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

PORT = 2222
KEEPALIVE_SECONDS, SILENCE_SECONDS = 5, 20
"""As `-o ServerAliveInterval=5 -o ServerAliveCountMax=4`: the caller notices a cut, the far side does not."""
NAMES, ADDRESSES = ("r1jax-host-a", "r1jax-host-b"), ("10.231.87.1", "10.231.87.2")


class Network:
    """Namespaces called like their hosts."""

    @staticmethod
    def inside(name: str, *command: str) -> list[str]:
        """The command line that runs a command on a host."""
        return [
            "ip",
            "netns",
            "exec",
            name,
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {name}; exec "$@"',
            "-",
            *command,
        ]

    def pull_cable(self) -> None:
        _ip("-n", NAMES[0], "link", "set", "eth0", "down")

    def plug_cable(self) -> None:
        _ip("-n", NAMES[0], "link", "set", "eth0", "up")


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Two hosts that reach each other and nothing else; raises CalledProcessError or OSError where one may not."""
    folders = [Path("/etc/netns", name) for name in NAMES]
    try:
        for name in NAMES:
            _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
        for name, address, folder in zip(NAMES, ADDRESSES, folders, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", name, "link", "set", link, "up")
            folder.mkdir(parents=True)  # `ip netns exec` puts what is in it over /etc
            known = [f"{address} {name}" for address, name in zip(ADDRESSES, NAMES, strict=True)]
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known]) + "\n")
        yield Network()
    finally:
        for name, folder in zip(NAMES, folders, strict=True):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            (folder / "hosts").unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


# The connection. To the caller go frames: a kind, a length, bytes. From the caller come a line, then stdin as it is.


def serve(address: str, log: str) -> None:
    """Runs what callers ask for until it is killed."""
    with socket.create_server((address, PORT)) as server, open(log, "ab", buffering=0) as file:
        while True:
            caller, _ = server.accept()
            threading.Thread(target=_run, args=(caller, file), daemon=True).start()


def _run(caller: socket.socket, log) -> None:
    stream = caller.makefile("rb", buffering=0)
    command = stream.readline().decode()
    process = subprocess.Popen(
        ["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    assert process.stdin is not None and process.stdout is not None
    threading.Thread(target=_feed, args=(caller, process), daemon=True).start()
    while True:
        if not select.select([process.stdout], [], [], KEEPALIVE_SECONDS)[0]:
            _send(caller, b"k", b"")
        elif data := os.read(process.stdout.fileno(), 4096):
            log.write(data)
            _send(caller, b"o", data)
        else:
            break
    code = process.wait()
    _send(caller, b"x", bytes([code if code >= 0 else 255]))
    caller.close()


def _feed(caller: socket.socket, process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        while data := caller.recv(4096):
            process.stdin.write(data)
    process.stdin.close()


def _send(caller: socket.socket, kind: bytes, data: bytes) -> None:
    with contextlib.suppress(OSError):
        caller.sendall(kind + struct.pack("!I", len(data)) + data)


def call(host: str, command: str) -> int:
    """The command's exit code, 255 when the connection was lost."""
    try:
        server = socket.create_connection((host, PORT), timeout=10)
    except OSError as error:
        sys.stderr.write(f"ssh: connect to host {host} port {PORT}: {error}\n")
        return 255
    server.settimeout(SILENCE_SECONDS)
    server.sendall(command.encode() + b"\n")
    threading.Thread(target=_pass_on, args=(server,), daemon=True).start()
    try:
        while True:
            kind, size = struct.unpack("!cI", _exactly(server, 5))
            data = _exactly(server, size)
            if kind == b"x":
                return data[0]
            os.write(1, data)
    except TimeoutError:
        sys.stderr.write(f"Timeout, server {host} not responding.\n")
    except OSError as error:
        sys.stderr.write(f"client_loop: send disconnect: {error}\n")
    return 255


def _exactly(server: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = server.recv(size - len(data))
        if not more:
            raise ConnectionResetError("closed")
        data += more
    return data


def _pass_on(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(0, 4096):
            server.sendall(data)
        server.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    sys.stdout.flush()
    os._exit(call(*sys.argv[-2:]))
