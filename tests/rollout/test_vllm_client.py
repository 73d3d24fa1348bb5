"""The client against servers that misbehave: nothing is lost, doubled, believed unseen, or waited for without end."""

import dataclasses
import threading
import time

import pytest

from r1jax.config.errors import RunFailure, UserError
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.vllm_client import Limits, ServerChanged, VllmClient, check_urls
from r1jax.rollout.vllm_requests import group_seed
from r1jax.rollout.vllm_router import draw_samples
from tests.rollout.http_server import HANG, HANG_UP, TRICKLE, completion, listening

SETTINGS = SamplingSettings(max_new_tokens=4, stop_ids=(2,), seed=7, temperature=0.7)
QUICK = Limits(request_seconds=20, connect_seconds=20, num_retries=3, first_pause=0.01)
IMPATIENT = dataclasses.replace(QUICK, request_seconds=0.5)
PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10]]


def draw(client, prompts=PROMPTS, num_generations=4, settings=SETTINGS, ids=None):
    ids = range(10, 10 + len(prompts)) if ids is None else ids
    drawn = draw_samples(
        client,
        prompts,
        ids,
        settings,
        num_generations=num_generations,
        step=5,
        model="policy",
        vocab_size=40,
        version=3,
    )
    return [[one.token_ids.tolist() for one in group] for group in drawn]


def expected(prompts=PROMPTS, num_generations=4):
    """Sample k of a prompt is drawn with the prompt's seed + k, however requests are cut."""
    seeds = [group_seed(7, 5, 10 + row) for row in range(len(prompts))]
    return [[[(seed + k) % 30 + 3, 2] for k in range(num_generations)] for seed in seeds]


def first_of(kinds, otherwise=completion):
    """Answers the first requests as `kinds` say."""

    def answer(path, body, number):
        return kinds[number] if number < len(kinds) else otherwise(path, body, number)

    return answer


def test_samples_come_in_order_with_their_numbers():
    with listening(completion) as server:
        client = VllmClient([server.url], "the key", limits=QUICK)
        assert draw(client) == expected()
        drawn = draw_samples(
            client, PROMPTS[:1], [3], SETTINGS, num_generations=1, step=None, model="policy", vocab_size=40, version=3
        )
    one = drawn[0][0]
    assert (one.logprobs.tolist(), one.finish_reason, one.version) == ([-0.5, -0.25], "stop", 3)
    assert {header["Authorization"] for header in server.headers} == {"Bearer the key"}
    asked = server.asked("/v1/completions")
    assert {body["n"] for body in asked[:3]} == {4}
    assert {body["ignore_eos"] for body in asked} == {True}
    assert asked[0]["stop_token_ids"] == [2] and asked[0]["temperature"] == 0.7
    assert client.counts == {}


def test_cutting_groups_changes_no_sample():
    with listening(completion) as server:
        narrow = VllmClient([server.url], "k", limits=Limits(in_flight=3))
        assert draw(narrow, num_generations=7) == expected(num_generations=7)
    assert sorted(body["n"] for body in server.asked("/v1/completions")) == [1, 1, 1, 3, 3, 3, 3, 3, 3]


def test_servers_share_the_work_and_the_bound_holds():
    def slowly(path, body, number):
        time.sleep(0.05)
        return completion(path, body, number)

    prompts = [[1, token] for token in range(12)]
    with listening(slowly) as one, listening(slowly) as two:
        client = VllmClient([one.url, two.url], "k", limits=Limits(in_flight=4))
        assert draw(client, prompts, num_generations=2) == expected(prompts, 2)
        # A group alone is cut, so that both have something to do.
        assert draw(client, [[1, 2]], num_generations=4) == expected([[1, 2]], 4)
    assert [len(server.requests) for server in (one, two)] == [7, 7]
    assert max(one.most_at_once, two.most_at_once) <= 2


def test_processes_begin_with_different_servers():
    with listening(completion) as one, listening(completion) as two:
        for process, server in enumerate((one, two, one)):
            before = len(server.requests)
            draw(VllmClient([one.url, two.url], "k", first_server=process), [[1, 2]], num_generations=1)
            assert len(server.requests) == before + 1


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (HANG, "timeout"),
        (TRICKLE, "timeout"),
        (HANG_UP, "connection"),
        ((500, b"{}"), "status"),
        ((503, b"<html>"), "status"),
        ((429, b'{"error": "busy"}'), "status"),
        ((200, b"<html>"), "malformed"),
        ((200, b""), "malformed"),
        ((200, b"[" * 100_000), "malformed"),
        ({"choices": []}, "malformed"),
        ({"choices": [None] * 4}, "malformed"),
    ],
)
def test_a_failed_request_is_asked_again_and_counted(bad, kind):
    with listening(first_of([bad])) as server:
        client = VllmClient([server.url], "k", limits=IMPATIENT if kind == "timeout" else QUICK)
        assert draw(client, PROMPTS[:1]) == expected(PROMPTS[:1])
    assert client.counts == {kind: 1, "retries": 1}
    first, second = server.asked("/v1/completions")
    assert first == second


def test_a_dead_server_is_left_for_the_others():
    with listening(lambda *_: HANG_UP) as dead, listening(completion) as alive:
        client = VllmClient([dead.url, alive.url], "k", limits=QUICK)
        prompts = [[1, token] for token in range(20)]
        assert draw(client, prompts, num_generations=2) == expected(prompts, 2)
    # All that was sent there at first came back; nothing is sent again within its rest.
    assert client.counts["connection"] == client.counts["retries"] == len(dead.requests)
    assert len(alive.asked("/v1/completions")) == 20


def test_an_answer_that_comes_too_late_is_not_taken():
    """The slow answer of the first try, had it been taken, would be a second one."""
    done = threading.Event()

    def late(path, body, number):
        if number:
            return completion(path, body, number)
        done.wait(5)
        late_one = completion(path, body, number)
        for choice in late_one["choices"]:
            choice["token_ids"] = [39, 2]
        return late_one

    with listening(late) as server:
        client = VllmClient([server.url], "k", limits=IMPATIENT)
        found = draw(client, PROMPTS[:1])
        done.set()
    assert found == expected(PROMPTS[:1])


def test_without_an_answer_the_run_ends_in_one_line():
    with listening(lambda *_: (500, b'{"error": {"message": "CUDA error"}}')) as server:
        client = VllmClient([server.url], "k", limits=QUICK)
        with pytest.raises(
            RunFailure, match=r"no answer for prompt 10 at step 5, samples 0 to 3, in 4 tries"
        ) as failed:
            draw(client, PROMPTS[:1])
    assert "/v1/completions answered 500: 'CUDA error'" in str(failed.value)
    assert client.counts == {"status": 4, "retries": 3}


def test_what_a_server_refuses_is_not_asked_again():
    with listening(lambda *_: (400, b'{"error": "max_tokens is too large"}')) as server:
        client = VllmClient([server.url], "k", limits=QUICK)
        with pytest.raises(RunFailure, match=r"in 1 tries; .* answered 400: 'max_tokens is too large'"):
            draw(client, PROMPTS[:1])
    assert len(server.requests) == 1


def test_nobody_listens():
    with listening(completion) as server:
        url = server.url
    with pytest.raises(RunFailure, match=r"in 4 tries"):
        draw(VllmClient([url], "k", limits=QUICK), PROMPTS[:1])


def test_a_server_that_was_started_again_is_no_longer_believed():
    with listening(completion) as server:
        client = VllmClient([server.url], "k", limits=QUICK)
        client.servers[0].instance = "one"
        assert draw(client) == expected()
        server.instance = "two"
        with pytest.raises(ServerChanged, match=r"was started again since it got its weights") as changed:
            draw(client)
    assert changed.value.url == server.url


def test_a_greedy_group_is_one_sample_many_times():
    greedy = SamplingSettings(max_new_tokens=4, stop_ids=(2,), temperature=0)
    with listening(completion) as server:
        found = draw(VllmClient([server.url], "k"), PROMPTS[:1], 3, greedy)
    assert found[0][0] == found[0][1] == found[0][2]
    assert [body["n"] for body in server.asked("/v1/completions")] == [1]


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
