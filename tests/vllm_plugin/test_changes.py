"""An answer names the state of the weights that drew it, or nothing where they may have changed meanwhile."""

import asyncio
import json

import pytest

from r1jax.vllm_plugin.access import RequireKey

KEY = "a-key-of-some-length"
READS = ("r1jax_state", "r1jax_digest", "r1jax_prepare")


@pytest.fixture(autouse=True)
def variables(tmp_path, monkeypatch):
    monkeypatch.setenv("R1JAX_VLLM_KEY", KEY)
    monkeypatch.setenv("R1JAX_VLLM_INSTANCE", "abc")
    monkeypatch.setenv("R1JAX_VLLM_SYNC_DIR", str(tmp_path))


class Application:
    """Behind the door: completions are answered when the test says, all else when its body has been read."""

    def __init__(self):
        self.drawn, self.bodies = asyncio.Event(), []

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        if scope["path"] == "/v1/completions":
            await self.drawn.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


async def asked(door, path, *parts, key=KEY):
    """The header of the answer."""
    messages = [
        {"type": "http.request", "body": part, "more_body": number + 1 < len(parts)}
        for number, part in enumerate(parts or (b"",))
    ]
    sent = []

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())]
    await door({"type": "http", "path": path, "method": "POST", "headers": headers}, receive, send)
    return dict(sent[0]["headers"]).get(b"x-r1jax-instance")


def call(method, **more):
    return json.dumps({"method": method, "args": [], **more}).encode()


def around(path, *parts, key=KEY):
    """Headers of a completion before, of one during which the request is answered, and of one after it."""

    async def work():
        application = Application()
        door = RequireKey(application)
        during = asyncio.ensure_future(asked(door, "/v1/completions", b"{}"))
        await asyncio.sleep(0)
        before = await asked(door, "/v1/models")
        await asked(door, path, *parts, key=key)
        application.drawn.set()
        return before, await during, await asked(door, "/v1/completions", b"{}")

    return asyncio.run(work())


UNTOUCHED = (b"abc.0", b"abc.0", b"abc.0")
CHANGED = (b"abc.0", b"", b"abc.1")


@pytest.mark.parametrize("method", READS)
def test_calls_that_only_look_leave_answers_believed(method):
    body = call(method)
    assert around("/collective_rpc", body) == UNTOUCHED
    assert around("/collective_rpc", body[:9], b"", body[9:]) == UNTOUCHED
    assert around("/collective_rpc", body, b"") == UNTOUCHED


@pytest.mark.parametrize("method", ["r1jax_apply", "reload_weights", "load_weights", "R1JAX_STATE", ""])
def test_an_answer_that_a_change_overtook_names_nothing(method):
    body = call(method)
    assert around("/collective_rpc", body) == CHANGED
    assert around("/collective_rpc", body[:9], body[9:]) == CHANGED


@pytest.mark.parametrize(
    "parts",
    [
        (b"",),
        (b"method=r1jax_state",),
        (b"[]",),
        (b'"r1jax_state"',),
        (b'{"method": ["r1jax_state"]}',),
        (b'{"args": []}',),
        (b'{"method": "r1jax_state", "method": "r1jax_apply"}',),
        (b"[" * 60_000,),
        (call("r1jax_state", args=["x" * 2**16]),),
        (call("r1jax_state"), b"x" * 2**16),
        (b"\xff\xfe",),
    ],
)
def test_what_cannot_be_read_counts(parts):
    assert around("/collective_rpc", *parts) == CHANGED


@pytest.mark.parametrize(
    "path", ["/update_weights", "/start_weight_update", "/finish_weight_update", "/sleep", "/wake_up"]
)
def test_vllms_own_routes_count(path):
    assert around(path, b"{}") == CHANGED


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/reset_prefix_cache", "/pause", "/resume"])
def test_other_requests_do_not(path):
    assert around(path, call("r1jax_apply")) == UNTOUCHED


@pytest.mark.parametrize("path", ["/collective_rpc", "/update_weights"])
def test_who_is_not_let_in_changes_nothing(path):
    assert around(path, call("r1jax_apply"), key="another") == UNTOUCHED


def test_the_body_arrives_as_it_was_sent():
    async def work():
        application = Application()
        await asked(RequireKey(application), "/collective_rpc", b'{"method": ', b'"r1jax_apply"}')
        return application.bodies

    assert asyncio.run(work()) == [b'{"method": "r1jax_apply"}']


def test_it_counts_when_the_call_is_whole_and_before_it_is_done():
    """What the application does with the call comes after the count: no answer in between names the old state."""

    async def work():
        loading, loaded = asyncio.Event(), asyncio.Event()

        async def application(scope, receive, send):
            if scope["path"] == "/collective_rpc":
                await receive()
                loading.set()
                await loaded.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        door = RequireKey(application)
        first = await asked(door, "/v1/models")
        apply = asyncio.ensure_future(asked(door, "/collective_rpc", call("r1jax_apply")))
        await loading.wait()
        meanwhile = await asked(door, "/v1/models")
        loaded.set()
        return first, meanwhile, await apply

    assert asyncio.run(work()) == (b"abc.0", b"abc.1", b"")
