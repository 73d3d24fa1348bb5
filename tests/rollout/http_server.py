"""Servers on 127.0.0.1 that behave as a test says: they answer, hang, hang up or talk nonsense."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes]
HANG, HANG_UP, TRICKLE = "hang", "hang up", "trickle"


@dataclasses.dataclass
class Listener:
    """What a server has seen, and what it says."""

    answer: Callable[[str, Any, int], Any]
    """(path, JSON of the request, number of the request from 0) -> (status, bytes), JSON, or HANG, HANG_UP, TRICKLE."""
    requests: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    instance: str = "one"
    most_at_once: int = 0
    at_once: int = 0
    released: threading.Event = dataclasses.field(default_factory=threading.Event)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    url: str = ""

    def asked(self, path: str) -> list[Any]:
        """The requests' JSON for a path."""
        return [body for found, body in self.requests if found == path]


@contextlib.contextmanager
def listening(answer: Callable[[str, Any, int], Any]) -> Iterator[Listener]:
    """The listener while its server runs."""
    listener = Listener(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(data) if data else None
            with listener.lock:
                number = len(listener.requests)
                listener.requests.append((self.path, body))
                listener.headers.append(dict(self.headers))
                listener.at_once += 1
                listener.most_at_once = max(listener.most_at_once, listener.at_once)
            try:
                self.say(listener.answer(self.path, body, number))
            finally:
                with listener.lock:
                    listener.at_once -= 1

        def say(self, reply: Any) -> None:
            self.close_connection = reply in (HANG, HANG_UP, TRICKLE)
            if reply == HANG:
                listener.released.wait(20)
            elif reply == TRICKLE:
                self.begin(200, 1000)
                while not listener.released.wait(0.05):
                    try:
                        self.wfile.write(b" ")
                    except OSError:
                        return
            elif reply != HANG_UP:
                status, data = reply if isinstance(reply, tuple) else (200, json.dumps(reply).encode())
                self.begin(status, len(data))
                self.wfile.write(data)

        def begin(self, status: int, length: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.send_header("x-r1jax-instance", listener.instance)
            self.end_headers()

        do_GET = do_POST = do_PUT = do

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    listener.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield listener
    finally:
        listener.released.set()
        server.shutdown()
        server.server_close()


def completion(path: str, body: Any, number: int) -> Any:
    """An answer as the client wants it: sample i of a request has the tokens [(seed + i) % 30 + 3, 2]; 2 ends it."""
    del path, number
    choices = [
        {
            "index": index,
            "token_ids": [(body["seed"] + index) % 30 + 3, 2],
            "logprobs": {"token_logprobs": [-0.5, -0.25]},
            "finish_reason": "stop",
            "prompt_token_ids": body["prompt"],
        }
        for index in reversed(range(body["n"]))
    ]
    return {"choices": choices}
