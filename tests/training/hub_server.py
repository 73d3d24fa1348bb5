"""A hub on 127.0.0.1 that speaks what a push needs: repositories, branches, commits of regular files. Nothing else."""

import base64
import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER = "me"


@dataclasses.dataclass
class Hub:
    """What the server holds and has seen."""

    mode: str = "works"
    """works, or 401, 500 (every answer has that status), or hangs (no answer)."""
    repositories: dict[str, dict[str, dict[str, bytes]]] = dataclasses.field(default_factory=dict)
    """Repository -> branch -> path -> content."""
    private: dict[str, bool | None] = dataclasses.field(default_factory=dict)
    messages: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """(branch, message) of each commit."""
    tokens: set[str | None] = dataclasses.field(default_factory=set)
    requests: list[str] = dataclasses.field(default_factory=list)
    released: threading.Event = dataclasses.field(default_factory=threading.Event)
    url: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, str]:
        """(status, JSON, error code of the hub)."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts == ["api", "whoami-v2"]:
            return 200, {"name": OWNER}, ""
        if parts == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}, ""
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[:2] != ["api", "models"] or len(parts) < 5:  # the client's questions about itself
            return 404, {"error": "nothing there"}, ""
        repository, verb, rest = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
        if repository not in self.repositories:
            return 404, {"error": "no such repository"}, "RepoNotFound"
        branches = self.repositories[repository]
        if (method, verb) == ("POST", "branch"):
            status = 409 if rest in branches else 200
            branches.setdefault(rest, {})
            return status, {}, ""
        if rest not in branches:
            return 404, {"error": "no such revision"}, "RevisionNotFound"
        if (method, verb) == ("GET", "tree"):
            files = branches[rest]
            return 200, [{"type": "file", "path": p, "size": len(files[p]), "oid": "0" * 40} for p in files], ""
        if (method, verb) == ("GET", "commits"):
            date = "2026-01-01T00:00:00.000Z"
            return 200, [{"id": "0" * 40, "title": "initial", "message": "", "date": date, "authors": []}], ""
        if (method, verb) == ("POST", "preupload"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}, ""
        assert (method, verb) == ("POST", "commit"), (method, path)
        return self._commit(branches, rest, body)

    def _create(self, wish: dict[str, Any]) -> tuple[int, Any, str]:
        name = f"{wish.get('organization') or OWNER}/{wish['name']}"
        status = 409 if name in self.repositories else 200
        if status == 200:
            self.repositories[name] = {"main": {}}
            self.private[name] = {"private": True, "public": False}.get(wish.get("visibility", ""), wish.get("private"))
        return status, {"url": f"{self.url}/{name}", "error": "exists"}, ""

    def _commit(self, branches: dict[str, dict[str, bytes]], branch: str, body: bytes) -> tuple[int, Any, str]:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.messages.append((branch, value["summary"]))
            elif item["key"] == "file":
                branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "deletedFile":
                del branches[branch][value["path"]]
        oid = f"{len(self.messages):040x}"
        return 200, {"success": True, "commitUrl": f"{self.url}/{OWNER}/x/commit/{oid}", "commitOid": oid}, ""


@contextlib.contextmanager
def serving(mode: str = "works") -> Iterator[Hub]:
    """The hub while its server runs; `hub.url` is what HF_ENDPOINT has to be."""
    hub = Hub(mode=mode)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.mode == "hangs":
                hub.released.wait()
                return
            if hub.mode == "works":
                status, content, code = hub.answer(self.command, urlsplit(self.path).path, body)
            else:
                status, content, code = int(hub.mode), {"error": "as the test asks"}, ""
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = handle_one

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
