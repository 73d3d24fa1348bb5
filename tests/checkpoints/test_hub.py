"""Names become directories; each way of failing is one line that names the way out. The hub is a server in the test."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from r1jax.checkpoints.hub import is_hub_id, resolve
from r1jax.config.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"",
    "pytorch_model.bin": b"pickle",
    "onnx/config.json": b"{}",
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Serves org/model at main; refuses org/gated, does not know org/absent, breaks on org/broken."""

    fetched: tuple[str, ...] = ()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "org/gated" in path:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "org/absent" in path:
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "org/broken" in path:
            self._answer(500, b"{}", {})
        elif "/revision/" in path and not path.endswith(("/main", COMMIT)):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/revision/" in path:
            self._answer(200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": []}).encode(), {})
        elif "/tree/" in path:
            self._answer(200, json.dumps([self._entry(name) for name in FILES]).encode(), {})
        else:
            name = path.split(f"/{COMMIT}/")[1]
            type(self).fetched += (name,)
            self._answer(200, FILES[name], {"ETag": f'"{self._entry(name)["oid"]}"', "X-Repo-Commit": COMMIT})

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's output stays clean."""

    def _entry(self, name: str) -> dict:
        oid = hashlib.sha1(FILES[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(FILES[name]), "oid": oid}

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub client talks to the fake and has an empty cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    _point_client(monkeypatch, tmp_path, endpoint)
    monkeypatch.setattr(FakeHub, "fetched", ())
    yield
    server.shutdown()
    server.server_close()


def _point_client(monkeypatch: pytest.MonkeyPatch, cache: Path, endpoint: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def test_a_directory_is_itself(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path


def test_a_directory_without_config_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"need a directory with config\.json, got .*; give the directory of a model"):
        resolve(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"; this is a run that exported nothing; `python -m r1jax\.convert"):
        resolve(str(tmp_path))


def test_a_file_is_refused(tmp_path: Path):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(UserError, match=r"SRC: need a directory, got the file .*model\.gguf"):
        resolve(str(tmp_path / "model.gguf"), field="SRC")


@pytest.mark.parametrize("name", ["./model", "../model", "/no/such", "outputs/run/3", "~nobody/model", "outputs/"])
def test_a_path_that_is_not_there_is_no_hub_id(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a checkout may have an outputs/
    assert not is_hub_id(name)
    with pytest.raises(UserError, match=r"need a directory that exists or a hub id.*looked from"):
        resolve(name)


def test_an_uncached_model_offline_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"org/model, which is not .* in the cache while HF_HUB_OFFLINE is set; fetch it"
    ):
        resolve("org/model")


def test_a_hub_model_is_fetched_once_without_what_is_not_needed(online: None, monkeypatch: pytest.MonkeyPatch):
    directory = resolve("org/model")
    wanted = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in directory.iterdir()) == wanted
    assert set(FakeHub.fetched) == set(wanted)
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    monkeypatch.setattr(FakeHub, "fetched", ())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/model") == directory
    assert FakeHub.fetched == ()


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("org/gated", "main", r"org/gated, which is gated.*; ask for access on its page .*HF_TOKEN"),
        ("org/absent", "main", r"org/absent, which is not on the hub, or is private; check the spelling"),
        ("org/model", "v9", r"org/model, which has no revision v9; set model_revision"),
        ("org/broken", "main", r"org/broken, which .* the hub cannot be reached \(HfHubHTTPError\); check"),
        ("org--model", "main", r"org--model, which is not one"),
    ],
)
def test_each_refusal_of_the_hub_is_one_line(online: None, repo: str, revision: str, message: str):
    with pytest.raises(UserError, match=f"^model_name_or_path: need .* got {message}") as caught:
        resolve(repo, revision)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Nothing listens on port 9 (discard).
    _point_client(monkeypatch, tmp_path, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the hub cannot be reached \(ConnectError\); check the connection"):
        resolve("org/model")
