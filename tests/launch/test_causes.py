"""Exit statuses and last lines as they were seen, in words."""

import pytest

from r1jax.launch.causes import Cause, explain

# As jaxlib 0.10.2 wrote them, addresses and repetitions left out.
_STACK = [
    "*** Check failure stack trace: ***",
    "    @     0x7ff965840634  absl::lts_20260107::log_internal::LogMessage::SendToLog()",
    "    @     0x7ff96cea71f5  (unknown)",
]
_TERMINATING = (
    "client.h:80] Terminating process because the JAX distributed service detected fatal errors. This most likely "
    "indicates that another task died; see the other task logs for more details. absl::Status: "
)
SILENT = [
    f"F1125 02:58:06.733538   12910 {_TERMINATING}UNAVAILABLE: The following tasks are unhealthy (stopped sending "
    "heartbeats):",
    "1, 3",
    "The tasks have crashed. Check the task logs for an earlier error, or scheduler events.",
    *_STACK,
]
BARRIER = [
    f"F1125 02:56:24.197515   12236 {_TERMINATING}INTERNAL: Shutdown barrier has failed.",
    "Barrier result: 'INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout.",
    *_STACK,
]
CLOSED = [
    f"F1125 02:57:14.410714   12628 {_TERMINATING}UNAVAILABLE: Failed to send RPC to coordination service. Either the "
    "leader task was preempted/died/restarted unexpectedly or this task is experiencing network issues.",
    *_STACK,
]
UNANSWERED = [
    f"F1125 02:58:49.053830   13537 {_TERMINATING}DEADLINE_EXCEEDED: Deadline Exceeded",
    "",
    "RPC: /xla.coordination.CoordinationService/Heartbeat",
    *_STACK,
]
GLOO = [
    "Traceback (most recent call last):",
    '  File "r1jax/train.py", line 60, in <module>',
    "    sys.exit(main())",
    "             ^^^^^^",
    "jax.errors.JaxRuntimeError: FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: "
    "[external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242",
    "E1125 02:56:24.196561   12225 coordination_service.cc:1549] [97790] Use error polling",
]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (SILENT, "no heartbeat from process 1 3"),
        (BARRIER, "no heartbeat from process 1"),
        (CLOSED, "the coordinator, process 0, could not be reached"),
        (UNANSWERED, "the coordinator, process 0, could not be reached"),
    ],
)
def test_an_abort_by_jaxlib_follows_from_another_end(lines: list[str], words: str) -> None:
    assert explain(134, lines) == Cause(f"was aborted by jaxlib (SIGABRT): {words}", is_root=False)


def test_an_abort_of_other_code_is_its_own_cause() -> None:
    assert explain(134, ["free(): invalid pointer"]) == Cause("was killed by SIGABRT (native code gave up)")


def test_a_collective_that_lost_its_peer_follows_from_another_end() -> None:
    found = explain(1, GLOO)
    assert not found.is_root and found.words.startswith("ended with exit code 1: jax.errors.JaxRuntimeError: FAILED")


@pytest.mark.parametrize("line", ["gloo_timeout: need x > 0, got -1; see --help", "ValueError: no such coordination"])
def test_words_alone_are_no_lost_peer(line: str) -> None:
    assert explain(1, [line]).is_root


def test_one_that_was_ended_by_the_watchdog_of_another_follows_from_it() -> None:
    assert explain(124, ["no progress for 5 s: process 0 on host a, step 3"]).is_root
    place = "no progress for 61 s: process 1 on host b, step 12, saving, in save (training/saving.py:9)"
    assert not explain(124, [f"{place}; process 0 met ddp_timeout, the stacks stand above"]).is_root
    assert explain(124, [f"{place}; it met ddp_timeout, the stacks stand above"]).is_root


def test_the_line_that_says_why_is_found_among_others() -> None:
    ignored = ["Exception ignored in atexit callback: <function f>", *GLOO[:1], "  stack", "RuntimeError: late"]
    lines = [
        "step 3 loss 2.0",
        *GLOO[:1],
        "  stack",
        "OSError: no space",
        "of two lines",
        *ignored,
        "[Gloo] Rank 0",
        "",
    ]
    assert explain(1, lines).words == "ended with exit code 1: OSError: no space"
    assert explain(2, ["training", "seed: need  x >= 0,   got -1", "", *_STACK]).words.endswith(
        ": seed: need x >= 0, got -1"
    )


def test_no_words_and_many_words() -> None:
    assert explain(3, []).words == "ended with exit code 3"
    assert explain(1, ["x" * 1000]).words == f"ended with exit code 1: {'x' * 300}..."


def test_statuses_above_the_signals_are_exit_codes() -> None:
    assert explain(255, ["gone"]).words == "ended with exit code 255: gone"
