"""Requests to servers that misbehave: nothing is lost, doubled, believed unseen, or waited for without end."""

import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest

from r1jax.config.errors import RunFailure
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.vllm_client import Limits, ServerChanged, ServersLost, VllmClient
from r1jax.rollout.vllm_requests import Sample, group_seed
from r1jax.rollout.vllm_router import draw_samples
from tests.rollout.http_server import HANG, HANG_UP, TRICKLE, completion, listening

SETTINGS = SamplingSettings(max_new_tokens=4, stop_ids=(2,), seed=7, temperature=0.7)
# Two pulses of a tenth of a second: a server that is silent for less than half a second is left.
WATCHFUL = Limits(request_seconds=20, connect_seconds=20, first_pause=0.01, pulse_seconds=0.1, missed_pulses=2)
QUICK = Limits(request_seconds=20, connect_seconds=20, num_retries=3, first_pause=0.01)
IMPATIENT = dataclasses.replace(QUICK, request_seconds=0.5)
SIGN_OF_LIFE = {"results": [{"ok": True}]}
PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10]]


def draw(client, prompts=PROMPTS, num_generations=4, settings=SETTINGS, ids=None, **more):
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
        **more,
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
    """Nor one whose weights may have changed while it answered: its header is empty."""
    with listening(completion) as server:
        client = VllmClient([server.url], "k", limits=QUICK)
        client.servers[0].instance = "one"
        assert draw(client) == expected()
        for instance in ("two", ""):
            server.instance = instance
            with pytest.raises(ServerChanged, match=r"was started again, or given other weights, since") as changed:
                draw(client)
            assert changed.value.url == server.url
    assert client.counts["stale"] >= 2


def test_a_greedy_group_is_one_sample_many_times():
    greedy = SamplingSettings(max_new_tokens=4, stop_ids=(2,), temperature=0)
    with listening(completion) as server:
        found = draw(VllmClient([server.url], "k"), PROMPTS[:1], 3, greedy)
    assert found[0][0] == found[0][1] == found[0][2]
    assert [body["n"] for body in server.asked("/v1/completions")] == [1]


def kept(prompt_row, numbers):
    """What a journal would give: samples that no server draws."""
    tokens = [[30 + prompt_row, 2]] * len(numbers)
    return {
        number: Sample(
            token_ids=np.array(ids, np.int32), logprobs=np.zeros(2, np.float32), finish_reason="stop", version=3
        )
        for number, ids in zip(numbers, tokens, strict=True)
    }


def test_samples_that_are_there_are_not_asked_for_and_the_others_are_told_once():
    told = []

    def accept(piece, samples):
        told.extend((piece.prompt_id, number) for number, _ in enumerate(samples, piece.first))
        assert len(samples) == piece.count

    known = [kept(0, [0, 2]), {}, kept(2, [0, 1, 2, 3])]
    with listening(completion) as server:
        found = draw(VllmClient([server.url], "k", limits=QUICK), known=known, accept=accept)
        asked = sorted((len(body["prompt"]), body["seed"], body["n"]) for body in server.asked("/v1/completions"))
    wanted = expected()
    wanted[0][0] = wanted[0][2] = [30, 2]
    wanted[2] = [[32, 2]] * 4
    assert found == wanted
    first, second = group_seed(7, 5, 10), group_seed(7, 5, 11)
    assert asked == sorted([(3, first + 1, 1), (3, first + 3, 1), (2, second, 4)])
    assert sorted(told) == [(10, 1), (10, 3), (11, 0), (11, 1), (11, 2), (11, 3)]
    assert [sorted(one) for one in known] == [[0, 2], [], [0, 1, 2, 3]]  # the caller's stay as they are


def test_with_everything_there_no_server_is_asked():
    with listening(completion) as server:
        found = draw(VllmClient([server.url], "k"), PROMPTS[:1], known=[kept(0, range(6))], accept=None)
    assert found == [[[30, 2]] * 4] and server.requests == []


def test_what_has_come_is_kept_when_another_request_fails():
    """Each once, although its prompt's neighbour never came."""
    told, both = [], threading.Event()

    def accept(piece, samples):
        told.append((piece.prompt_id, len(samples)))
        if len(told) == 2:
            both.set()

    def answer(path, body, number):
        if body["prompt"] != PROMPTS[1]:
            return completion(path, body, number)
        assert both.wait(10)
        return (500, b"{}")

    with listening(answer) as server:
        client = VllmClient([server.url], "k", limits=QUICK)
        with pytest.raises(ServersLost, match="no answer for prompt 11"):
            draw(client, accept=accept)
    assert sorted(told) == [(10, 4), (12, 4)]
    assert [one.in_flight for one in client.servers] == [0]


def alive(answer=completion, pulse=None):
    """Answers completions so, and pulses; pulse: its number among them -> its answer."""
    counter = itertools.count()

    def both(path, body, number):
        if path != "/collective_rpc":
            return answer(path, body, number)
        assert body["method"] == "r1jax_state"
        return pulse(next(counter)) if pulse else SIGN_OF_LIFE

    return both


def test_a_server_that_is_frozen_is_found_by_its_pulse_and_left_for_the_other():
    prompts = [[1, token] for token in range(12)]
    start = time.monotonic()
    with listening(lambda *_: HANG) as frozen, listening(alive()) as other:
        client = VllmClient([frozen.url, other.url], "k", limits=WATCHFUL)
        assert draw(client, prompts, num_generations=2) == expected(prompts, 2)
        seconds = time.monotonic() - start
        given = len(frozen.asked("/v1/completions"))
    # 0.4 s of pulses, and room for a machine that is busy; without the pulse it would be 20 s.
    assert 0.3 < seconds < 8
    assert 0 < given == client.counts["silent"] == client.counts["retries"]
    assert len(other.asked("/v1/completions")) == 12


def test_when_all_are_frozen_nobody_is_waited_for():
    start = time.monotonic()
    with listening(lambda *_: HANG) as one, listening(lambda *_: HANG) as two:
        client = VllmClient([one.url, two.url], "k", limits=WATCHFUL)
        with pytest.raises(ServersLost, match=r"no sign of life"):
            draw(client)
    assert time.monotonic() - start < 8
    assert [server.in_flight for server in client.servers] == [0, 0]


@pytest.mark.parametrize(
    "pulse",
    [
        lambda number: SIGN_OF_LIFE,
        lambda number: HANG if number % 2 else SIGN_OF_LIFE,  # never twice in a row
        lambda number: HANG_UP,
        lambda number: (500, b"{}"),
    ],
)
def test_a_server_that_is_slow_is_waited_for(pulse):
    """Also one whose worker says no, at once: its requests will say so themselves."""
    several = threading.Event()

    def counted(number):
        if number == 4:
            several.set()
        return pulse(number)

    def slowly(path, body, number):
        assert several.wait(15)
        return completion(path, body, number)

    with listening(alive(slowly, counted)) as server:
        client = VllmClient([server.url], "k", limits=WATCHFUL)
        assert draw(client, PROMPTS[:1]) == expected(PROMPTS[:1])
    assert client.counts == {}


def test_what_took_too_long_twice_is_not_asked_a_third_time():
    """The server lives: what it could not do in its time it will not do in the same time."""
    limits = dataclasses.replace(WATCHFUL, request_seconds=0.3, num_retries=9)
    with listening(alive(lambda *_: HANG)) as server:
        client = VllmClient([server.url], "k", limits=limits)
        with pytest.raises(ServersLost, match=r"in 2 tries; the last: .* no answer to /v1/completions within 0.3 s"):
            draw(client, PROMPTS[:1])
    assert client.counts == {"timeout": 2, "retries": 1}


def test_a_server_that_was_left_out_gets_nothing():
    with listening(completion) as absent, listening(completion) as other:
        client = VllmClient([absent.url, other.url], "k", limits=QUICK)
        client.servers[0].absent = True
        assert draw(client) == expected()
    assert absent.requests == [] and len(other.requests) == 3
