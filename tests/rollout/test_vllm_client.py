"""Calls to servers, from one thread and ended by another."""

import asyncio
import threading
import time

import pytest

from r1jax.config.errors import UserError
from r1jax.rollout.vllm_client import Limits, VllmClient, check_urls
from r1jax.rollout.vllm_http import Failure
from tests.rollout.http_server import HANG, HANG_UP, listening

QUICK = Limits(control_seconds=20, connect_seconds=20)


def rpc(client, method="r1jax_state", *args):
    return client.run(lambda clients: clients.rpc(client.servers[0], method, *args))


def test_a_call_of_a_method_gives_the_first_workers_answer_and_who_answered():
    results = {"results": [{"ok": True, "version": 3}, {"ok": True, "version": 4}]}
    with listening(lambda *_: results) as server:
        found = rpc(VllmClient([server.url + "/"], "the key", limits=QUICK), "r1jax_digest", "a name")
    assert found == {"ok": True, "version": 3, "instance": "one"}
    body = {"method": "r1jax_digest", "args": ["a name"], "timeout": 20}
    assert server.requests == [("/collective_rpc", body)]
    assert server.headers[0]["Authorization"] == "Bearer the key"


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ({"results": [{"ok": True}, {"ok": False, "error": "no room"}]}, "refused"),
        ({"results": []}, "malformed"),
        ({"results": ["ok"]}, "malformed"),
        ([], "malformed"),
        ((200, b""), "malformed"),
        ((404, b"{}"), "refused"),
        ((503, b"{}"), "status"),
        (HANG_UP, "connection"),
    ],
)
def test_what_is_no_answer_has_a_kind(reply, kind):
    with listening(lambda *_: reply) as server, pytest.raises(Failure) as failed:
        rpc(VllmClient([server.url], "k", limits=QUICK))
    assert failed.value.kind == kind and failed.value.url == server.url


def test_each_asks_the_servers_in_use_and_one_that_fails_ends_the_others():
    def answered(client):
        return client.run(lambda clients: clients.each(lambda server: clients.rpc(server, "r1jax_state")))

    fine = {"results": [{"ok": True}]}
    with listening(lambda *_: fine) as one, listening(lambda *_: HANG) as two, listening(lambda *_: HANG_UP) as three:
        client = VllmClient([one.url, two.url, three.url], "k", limits=QUICK)
        start = time.monotonic()
        with pytest.raises(Failure):
            answered(client)
        assert time.monotonic() - start < 8  # not the 20 s of the one that hangs
        client.servers[1].absent = client.servers[2].absent = True
        assert [state["ok"] for state in answered(client)] == [True]
        assert (len(one.requests), len(two.requests), len(three.requests)) == (2, 1, 1)


def test_another_thread_ends_a_call_and_all_later_ones():
    with listening(lambda path, body, number: {"results": [{"ok": True}]} if number else HANG) as server:
        client = VllmClient([server.url], "k", limits=QUICK)
        ends = []

        def call():
            try:
                rpc(client)
            except BaseException as error:
                ends.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        while not server.requests:
            time.sleep(0.01)
        start = time.monotonic()
        client.close()
        thread.join(10)
        assert not thread.is_alive() and time.monotonic() - start < 8
        assert [type(error) for error in ends] == [asyncio.CancelledError]
        with pytest.raises(asyncio.CancelledError):
            rpc(client)
        client.close()  # there is nothing left to end


@pytest.mark.parametrize(
    ("urls", "line"),
    [
        (["localhost:8000"], "x: need http://host:port, .* got localhost:8000; add http:// before the host"),
        ([], "x: need at least one address"),
        (["http://a", "http://a"], "x: need each server once"),
    ],
)
def test_addresses_that_are_none(urls, line):
    with pytest.raises(UserError, match=line):
        check_urls(urls, "x")
