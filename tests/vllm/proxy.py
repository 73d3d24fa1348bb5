"""A proxy in front of a real server that counts what it is asked for and spoils the answers that a test chooses."""

import contextlib
import dataclasses
import http.client
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SECONDS = 600
GROUP = "group"
"""The kind of a request for several samples: training asks for these, checks and probes for one."""
_OWN_HEADERS = ("connection", "content-length", "transfer-encoding", "keep-alive", "server", "date")

Change = Callable[[bytes], bytes]
"""Of an answer's body."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A request."""

    path: str
    body: Any
    """Its JSON; None for what is none."""
    number: int
    """Of requests of its kind before it."""

    @property
    def kind(self) -> str:
        """`GROUP`, the method of a call to the workers, or the path."""
        if self.path == "/collective_rpc":
            return self.body["method"]
        return GROUP if self.path == "/v1/completions" and self.body.get("n", 1) > 1 else self.path

    @property
    def samples(self) -> range:
        """The seeds of the samples it asks for: of a run, each sample has its own."""
        return range(self.body["seed"], self.body["seed"] + self.body.get("n", 1))


Rule = Callable[[Asked], Change | None]
"""Called, in a thread of the request, before it is passed on: it may wait, or do something to somebody."""


@dataclasses.dataclass
class Proxy:
    """What a proxy has seen, and its rule."""

    url: str = ""
    rule: Rule | None = None
    answered: list[Asked] = dataclasses.field(default_factory=list)
    """Whose answers have gone back whole and as they came."""
    seen: Counter[str] = dataclasses.field(default_factory=Counter)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def ask(self, path: str, data: bytes) -> Asked:
        """The request, counted."""
        try:
            body = json.loads(data)
        except ValueError:
            body = None
        asked = Asked(path=path, body=body, number=0)
        with self.lock:
            asked = dataclasses.replace(asked, number=self.seen[asked.kind])
            self.seen[asked.kind] += 1
        return asked

    def drawn(self) -> Counter[int]:
        """How often each sample of a group was answered, by its seed."""
        with self.lock:
            return Counter(seed for one in self.answered if one.kind == GROUP for seed in one.samples)


@contextlib.contextmanager
def proxying(upstream: str, rule: Rule | None = None) -> Iterator[Proxy]:
    """The proxy of a server, while it runs."""
    proxy, to = Proxy(rule=rule), urlsplit(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = proxy.ask(self.path, data)
            try:
                change = proxy.rule(asked) if proxy.rule is not None else None
                status, headers, body = self.forward(data)
            except (http.client.HTTPException, OSError):
                self.close_connection = True  # as a server that is gone does
                return
            self.send_response(status)
            spoilt = body if change is None else change(body)
            for name, value in [*headers, ("Content-Length", str(len(spoilt)))]:
                self.send_header(name, value)
            with contextlib.suppress(OSError):  # whoever asked has given up
                self.end_headers()
                self.wfile.write(spoilt)
                if change is None and status == 200:
                    with proxy.lock:
                        proxy.answered.append(asked)

        do_GET = do_POST = do_PUT = do

        def forward(self, data: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(to.hostname or "", to.port, timeout=SECONDS)
            with contextlib.closing(connection):
                given = {name: value for name, value in self.headers.items() if name.lower() not in _OWN_HEADERS}
                connection.request(self.command, self.path, data, given)
                answer = connection.getresponse()
                kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _OWN_HEADERS]
                return answer.status, kept, answer.read()

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
