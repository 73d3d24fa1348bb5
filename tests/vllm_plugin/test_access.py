"""The door and the upload behind it, as an ASGI server would call them."""

import asyncio
import json
import os
import resource

import pytest

from r1jax.vllm_plugin import receive
from r1jax.vllm_plugin.access import RequireKey

KEY = "a-key-of-some-length"
AUTHORIZED = [(b"authorization", b"Bearer " + KEY.encode())]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = tmp_path / "sync"
    made.mkdir(mode=0o700)
    monkeypatch.setenv("R1JAX_VLLM_KEY", KEY)
    monkeypatch.setenv("R1JAX_VLLM_INSTANCE", "abc")
    monkeypatch.setenv("R1JAX_VLLM_SYNC_DIR", str(made))
    return made


async def inner(scope, receive, send):
    """The application behind the door."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"inner", b"yes")]})
    await send({"type": "http.response.body", "body": b"inside"})


def request(door, path, headers=AUTHORIZED, *, method="GET", bodies=(b"",), kind="http"):
    """(status, headers, body) of a request; for a websocket the messages sent."""
    sent = []
    messages = [
        {"type": "http.request", "body": body, "more_body": number + 1 < len(bodies)}
        for number, body in enumerate(bodies)
    ]

    async def give():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def take(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "method": method, "headers": headers}
    asyncio.run(door(scope, give, take))
    if kind != "http":
        return sent
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


def put(door, name, data, length=None, **options):
    headers = [*AUTHORIZED, (b"content-length", str(len(b"".join(data)) if length is None else length).encode())]
    status, _, body = request(door, receive.PREFIX + name, headers, method="PUT", bodies=data, **options)
    return status, json.loads(body)


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/collective_rpc", "/", "/health/", "/metrics/x", "//health", "/HEALTH"]
)
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer " + KEY[:-1].encode())],
        [(b"authorization", KEY.encode())],
        [(b"authorization", b"bearer " + KEY.encode())],
        [*AUTHORIZED, *AUTHORIZED],
    ],
)
def test_nothing_answers_without_the_key(folder, path, headers):
    status, _, body = request(RequireKey(inner), path, headers)
    assert (status, body) == (401, b'{"error": "unauthorized"}')


def test_the_key_opens_and_health_needs_none_and_answers_carry_the_process(folder):
    door = RequireKey(inner)
    for path, headers in (("/v1/completions", AUTHORIZED), ("/health", []), ("/ping", []), ("/metrics", [])):
        status, found, body = request(door, path, headers)
        assert (status, body, found) == (200, b"inside", {b"inner": b"yes", b"x-r1jax-instance": b"abc.0"})


def test_websockets_need_the_key_and_other_kinds_stay_out(folder):
    closed = [{"type": "websocket.close", "code": 1008}]
    assert request(RequireKey(inner), "/v1/realtime", [], kind="websocket") == closed
    assert request(RequireKey(inner), "/v1/realtime", kind="websocket") != closed
    assert request(RequireKey(inner), "/", [], kind="unheard of") == closed


@pytest.mark.parametrize("missing", ["R1JAX_VLLM_KEY", "R1JAX_VLLM_INSTANCE"])
def test_without_a_key_there_is_no_door(folder, monkeypatch, missing):
    monkeypatch.setenv(missing, "")
    with pytest.raises(RuntimeError, match=rf"{missing}: need a value"):
        RequireKey(inner)


def test_an_upload_appears_when_it_is_whole(folder):
    door = RequireKey(inner)
    assert put(door, "a.safetensors", [b"one", b"two", b""]) == (200, {"ok": True})
    assert (folder / "a.safetensors").read_bytes() == b"onetwo"
    # The next one takes the same file, shorter or longer.
    before = (folder / "a.safetensors").stat().st_ino
    for data in (b"x", b"longer than before"):
        assert put(door, "a.safetensors", [data])[0] == 200
        assert (folder / "a.safetensors").read_bytes() == data
    assert (folder / "a.safetensors").stat().st_ino == before
    assert (folder / "a.safetensors").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("data", "length", "line"),
    [([b"one"], 4, "need 4 bytes, got 3"), ([b"one", b"two"], 4, "need 4 bytes, got more"), ([b"x"], "", "got none")],
)
def test_a_broken_upload_leaves_nothing(folder, data, length, line):
    status, content = put(RequireKey(inner), "a.safetensors", data, length)
    assert status == 400 and line in content["error"]
    assert list(folder.iterdir()) == []


def test_an_upload_that_falls_silent_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(receive, "SILENCE_SECONDS", 0.05)

    async def silent():
        await asyncio.sleep(10)
        return {"type": "http.disconnect"}

    sent = []

    async def take(message):
        sent.append(message)

    headers = [*AUTHORIZED, (b"content-length", b"3")]
    scope = {"type": "http", "path": receive.PREFIX + "a.safetensors", "method": "PUT", "headers": headers}
    asyncio.run(RequireKey(inner)(scope, silent, take))
    assert sent[0]["status"] == 400 and list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a.safetensors", "b/a.safetensors", "a.txt", "", ".safetensors"]
)
def test_an_upload_stays_in_the_directory(folder, name):
    status, content = put(RequireKey(inner), name, [b"x"])
    assert status == 400 and "need a plain name" in content["error"]
    assert list(folder.iterdir()) == [] and os.listdir(folder.parent) == ["sync"]


def test_a_disk_that_takes_no_more_is_said_and_nothing_stays(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))
    try:
        status, content = put(RequireKey(inner), "a.safetensors", [b"four", b"five"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, content["error"]) == (507, "sync directory: File too large")
    assert list(folder.iterdir()) == []
