"""Servers that are not there, or are something else, end in one line that says what to start."""

import time

import pytest

from r1jax.config.errors import UserError
from r1jax.rollout.vllm_checks import Expected, check_servers
from r1jax.rollout.vllm_client import Limits, VllmClient
from tests.rollout.http_server import HANG, HANG_UP, listening

PATIENT = Limits(request_seconds=20, control_seconds=20, connect_seconds=20)
MODELS = {"data": [{"id": "policy"}]}


def check(configs, *urls, seconds=20.0, model=None):
    expected = Expected(config=configs["qwen3"], longest=20, stop_ids=(2,), probe=(1, 5), model=model)
    return check_servers(VllmClient(urls, "key", limits=PATIENT), expected, start_seconds=seconds)


@pytest.mark.parametrize("reply", [HANG, HANG_UP, (503, b"")])
def test_nobody_answers_in_time(configs, reply):
    start = time.monotonic()
    with (
        listening(lambda *_: reply) as server,
        pytest.raises(
            UserError, match=r"need an answer to /health, got none from http.* in 0.5 s; start it with launch"
        ),
    ):
        check(configs, server.url, seconds=0.5)
    assert time.monotonic() - start < 5


def test_a_server_that_comes_up_late_is_waited_for(configs):
    """Then what it is counts: this one is no vLLM."""
    with (
        listening(lambda path, body, number: (503, b"") if not number else (404, b"nothing here")) as server,
        pytest.raises(UserError, match="need an answer to /health") as failed,
    ):
        check(configs, server.url, seconds=1.5)
    assert len(server.requests) >= 2 and "404" in str(failed.value)


def answers(**routes):
    def answer(path, body, number):
        return routes.get(path.rpartition("/")[2], (404, b'{"detail": "Not Found"}'))

    return answer


STATE = {
    "ok": True, "version": None, "torn": False, "sync_dir": "/nowhere", "vllm": "0.0",
    "dtype": "float32", "logprobs_mode": "raw_logprobs", "max_model_len": 64, "vocab_size": 40, "hidden_size": 32,
    "num_layers": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("routes", "line"),
    [
        (
            {"models": (401, b'{"error": "unauthorized"}')},
            "R1JAX_VLLM_KEY: need the key of http.*, got another one; set R1",
        ),
        ({"models": (500, b"")}, "need a server that answers, got http.*: /v1/models answered 500"),
        ({"models": (200, b"<html>")}, "need a server that answers, got http.* is no JSON"),
        ({"models": {"data": [{"id": "a"}, {"id": "b"}]}}, r"need one model served at http.*, got \[.a., .b.\]"),
        ({"models": []}, r"need one model served at http.*, got \[\]"),
        ({"models": MODELS}, "need r1jax's worker extension in http.*, got /collective_rpc answered 404"),
        (
            {"models": MODELS, "collective_rpc": {"results": []}},
            "need r1jax's worker extension in http.*, got r1jax_state",
        ),
        ({"models": MODELS, "collective_rpc": {"results": ["ok"]}}, "need r1jax's worker extension in http"),
        (
            {"models": MODELS, "collective_rpc": {"results": [{"ok": False, "error": "quantization: need none"}]}},
            "need r1jax's worker extension in http.*, got r1jax_state: quantization: need none",
        ),
        ({"models": MODELS, "collective_rpc": {"results": [STATE | {"torn": True}]}}, "need whole weights at http"),
        (
            {"models": MODELS, "collective_rpc": {"results": [STATE]}},
            "need a server that answers, got http.*completions",
        ),
    ],
)
def test_something_else_listens(configs, routes, line):
    with listening(answers(health={}, **routes)) as server, pytest.raises(UserError, match=line):
        check(configs, server.url)


def test_a_server_without_a_name_cannot_be_told_from_a_restarted_one(configs):
    with listening(answers(health={}, models=MODELS, collective_rpc={"results": [STATE]})) as server:
        server.instance = ""
        with pytest.raises(UserError, match=r"need a name of the process in http.*, got none; start it with launch"):
            check(configs, server.url)


def test_raw_log_probabilities_are_found_out(configs):
    """The gaps between likely tokens do not grow when the temperature falls."""
    top = {"choices": [{"logprobs": {"top_logprobs": [{f"token_id:{i}": -0.5 * i for i in range(5)}]}}]}
    routes = {"models": MODELS, "collective_rpc": {"results": [STATE]}, "completions": top}
    line = "raw_logprobs, a gap of 2.000 at 1 and 2.000 at 0.5; start it with --logprobs-mode processed_logprobs"
    with listening(answers(health={}, **routes)) as server, pytest.raises(UserError, match=line):
        check(configs, server.url)
