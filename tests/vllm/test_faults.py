"""What goes wrong with a real server, and what a run makes of it: it recovers, or stops with one line and can go on."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.bench import SAMPLES, STEPS, Bench, Host, again, at_group, stopped, trained
from tests.vllm.proxy import GROUP as GROUPS
from tests.vllm.proxy import Asked, Change, proxying
from tests.vllm.small import GROUP, PROMPTS, Run, write_world

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    made = Host(write_world(tmp_path_factory.mktemp("faults")))
    try:
        yield made
    finally:
        made.down()


@pytest.fixture
def bench(host: Host, report: list[str]) -> Iterator[Bench]:
    with proxying(host.up().url) as proxy:
        made = Bench(host, proxy, report)
        try:
            yield made
        finally:
            for run in made.runs:  # of a test that has failed
                run.process.kill()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_killed_server_that_comes_back_is_given_the_weights_again(bench: Bench, depth: int):
    """kill -9 of all its processes while generation 3 is drawn; what was accepted of it is not asked for again."""
    bench.proxy.rule = at_group(7, bench.host.kill, bench.proxy)
    run = bench.start(f"killed-{depth}", max_steps=STEPS, rollout_async_depth=depth)
    run.until("waiting up to")
    assert set(run.journal().values()) == {1} and sum(run.journal().values()) == 7 * GROUP
    bench.host.up()
    run.end()
    trained(run, depth)
    assert run.total("recoveries") >= 1 and run.total("connection") >= 1
    assert run.total("replayed") == GROUP
    assert len(bench.proxy.drawn()) == SAMPLES and set(bench.proxy.drawn().values()) == {1}
    bench.note(f"killed and started again, depth {depth}", run)


def test_a_server_that_stood_still_for_a_while_goes_on(bench: Bench):
    """SIGSTOP of all its processes in the middle of generation 2, SIGCONT eight seconds later."""

    def stop() -> None:
        bench.host.signal(signal.SIGSTOP)
        threading.Timer(8, bench.host.signal, (signal.SIGCONT,)).start()

    bench.proxy.rule = at_group(5, stop)
    run = bench.start("paused", max_steps=STEPS)
    run.end()
    trained(run)
    assert max(row["time/rollout"] for row in run.rows()) > 7
    bench.note("stopped for 8 s", run)


@pytest.mark.parametrize("part", ["whole", "VLLM::EngineCore"])
def test_a_server_that_is_frozen_for_good_ends_the_run_which_can_go_on(bench: Bench, part: str):
    """Of the engine alone the port still says that it is healthy."""
    name = "frozen-" + part[-6:].lower()

    def stop() -> None:
        bench.host.signal(signal.SIGSTOP, None if part == "whole" else {bench.host.pid(part)})

    bench.proxy.rule = at_group(7, stop, bench.proxy)
    run = bench.start(name, max_steps=STEPS, vllm_server_timeout=15.0)
    try:
        run.end()
    finally:
        bench.host.signal(signal.SIGCONT)
    stopped(run, f"no server came back within 15 s (vllm_server_timeout): {bench.proxy.url}", 3)
    bench.note(f"frozen for good ({part})", run)
    again(bench, name)


def test_an_answer_that_takes_too_long_is_asked_for_again(bench: Bench):
    bench.proxy.rule = at_group(5, lambda: time.sleep(8))
    run = bench.start("slow", max_steps=STEPS, vllm_request_timeout=4.0)
    run.end()
    trained(run)
    assert run.total("timeout") == 1 and run.total("retries") == 1 and run.total("recoveries") == 0
    bench.note("one answer too late", run)


def of_choice(change: Callable[[dict[str, Any]], Any]) -> Change:
    """A change of an answer's second choice."""

    def changed(body: bytes) -> bytes:
        content = json.loads(body)
        change(content["choices"][1])
        return json.dumps(content).encode()

    return changed


GARBAGE: dict[str, Change] = {
    "half of the JSON": lambda body: body[: len(body) // 2],
    "nothing": lambda body: b"",
    "ids beyond the vocabulary": of_choice(lambda choice: choice.update(token_ids=[999] * len(choice["token_ids"]))),
    "another prompt": of_choice(lambda choice: choice.update(prompt_token_ids=[5, 6, 7])),
    "a choice twice": of_choice(lambda choice: choice.update(index=0)),
    "a token too few": of_choice(lambda choice: choice["token_ids"].pop()),
    "no number": of_choice(lambda choice: choice["logprobs"].update(token_logprobs=[float("nan")] * 16)),
}


def test_garbage_is_counted_and_not_used(bench: Bench):
    """A spoilt answer of each sort, each to another request; what is used instead is the policy's own."""
    spoilers = iter(GARBAGE.values())
    bench.proxy.rule = lambda asked: next(spoilers, None) if asked.kind == GROUPS and asked.number % 2 == 0 else None
    run = bench.start("garbage", max_steps=STEPS)
    run.end()
    trained(run)
    assert run.total("malformed") == run.total("retries") == len(GARBAGE) and run.total("recoveries") == 0
    assert len(bench.proxy.drawn()) == SAMPLES and set(bench.proxy.drawn().values()) == {1}
    bench.note("garbage now and then", run)


def test_a_server_that_only_talks_garbage_ends_the_run_which_can_go_on(bench: Bench):
    half = GARBAGE["half of the JSON"]
    bench.proxy.rule = lambda asked: half if asked.kind == GROUPS and asked.number >= 6 else None
    run = bench.start("nonsense", max_steps=STEPS)
    run.end()
    stopped(run, "which is no JSON", 3)
    assert max(generation for generation, _, _ in run.journal()) == 2
    bench.note("garbage for good", run)
    again(bench, "nonsense")


def test_spoilt_answers_about_weights_are_not_believed(bench: Bench):
    """Of a look, both phases of a push and the reset, one each: the weights may or may not have been loaded."""
    at = {"r1jax_state": 6, "r1jax_prepare": 2, "r1jax_apply": 5, "/reset_prefix_cache": 3}
    half = GARBAGE["half of the JSON"]
    bench.proxy.rule = lambda asked: half if at.get(asked.kind) == asked.number else None
    run = bench.start("control", max_steps=STEPS)
    run.end()
    trained(run)
    assert run.total("recoveries") == 3 and len(bench.proxy.drawn()) == SAMPLES
    bench.note("garbage about weights", run)


@pytest.mark.parametrize("part", ["VLLM::Worker", "VLLM::EngineCore"])
def test_a_server_that_loses_a_part_is_one_that_was_killed(bench: Bench, part: str):
    """As the system does when memory runs out: kill -9 of one process, whatever the others make of it."""
    bench.proxy.rule = at_group(7, lambda: bench.host.signal(signal.SIGKILL, {bench.host.pid(part)}), bench.proxy)
    run = bench.start("part-" + part[-6:].lower(), max_steps=STEPS)
    run.until("waiting up to")
    bench.host.up().process.wait(60)  # vLLM ends with its engine
    bench.host.down()
    bench.host.up()
    run.end()
    trained(run)
    assert run.total("recoveries") >= 1 and run.total("replayed") == GROUP
    assert len(bench.proxy.drawn()) == SAMPLES and set(bench.proxy.drawn().values()) == {1}
    bench.note(f"{part} killed", run)


def test_another_model_behind_the_address_ends_the_run_which_can_go_on(bench: Bench):
    bench.proxy.rule = at_group(7, bench.host.kill, bench.proxy)
    run = bench.start("replaced", max_steps=STEPS)
    run.until("waiting up to")
    bench.host.up("other")
    run.end()
    bench.host.kill()
    stopped(run, "came back that does not fit: vllm_server_base_url: need num_layers 2", 3)
    bench.note("another model", run)
    bench.host.up()
    again(bench, "replaced")


@pytest.mark.parametrize("phase", ["prepare", "apply"])
def test_a_server_without_memory_for_new_weights_ends_the_run_which_can_go_on(bench: Bench, phase: str):
    """Its worker gets no more address space when it is to look at version 3, or to load it."""
    worker, name = bench.host.pid("VLLM::Worker"), "memory-" + phase
    limits = resource.prlimit(worker, resource.RLIMIT_AS)

    def rule(asked: Asked) -> None:
        if asked.kind == "r1jax_" + phase and asked.number == 3:
            resource.prlimit(worker, resource.RLIMIT_AS, (1 << 20, limits[1]))

    bench.proxy.rule = rule
    run = bench.start(name, max_steps=STEPS)
    try:
        run.end()
    finally:
        resource.prlimit(worker, resource.RLIMIT_AS, limits)
    stopped(run, "weights of step 3 are not loaded: ", 3)
    assert f"r1jax_{phase}: Cannot allocate memory" in run.last_line and run.total("recoveries") == 0
    bench.note(f"out of memory in {phase}", run)
    again(bench, name)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[Callable[[], None]]:
    """What puts a file system of 64 KiB over the folder, until the end."""
    mounted = []

    def mount() -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(folder)], check=True)
        mounted.append(folder)

    try:
        yield mount
    finally:
        for one in mounted:
            subprocess.run(["umount", str(one)], check=True)


@pytest.mark.parametrize("route", ["file", "upload"])
def test_a_full_disk_during_a_sync_ends_the_run_which_can_go_on(bench: Bench, route: str):
    """The directory is full from the middle of generation 3 on; the trainer may not see it where it has to upload."""
    if os.geteuid() != 0:
        pytest.skip("NOT RUN: only root can mount a small file system")
    with full(bench.host.sync_dir) as fill:

        def rule(asked: Asked) -> Change | None:
            if asked.kind == GROUPS and asked.number == 7:
                fill()
            if route == "upload" and asked.kind == "r1jax_digest":
                return lambda body: b'{"results": [{"ok": true, "sha256": "of another file"}]}'
            return None

        bench.proxy.rule = rule
        run = bench.start("disk-" + route, max_steps=STEPS)
        run.end()
        where = str(bench.host.sync_dir) if route == "file" else "the upload was answered 507"
        stopped(run, f"weights of step 4 did not reach every server: {where}", 4)
        assert "No space left on device" in run.last_line
        assert list(bench.host.sync_dir.iterdir()) == []
    bench.note(f"disk full, {route}", run)
    again(bench, "disk-" + route)


def push_others(host: Host, version: int) -> None:
    """Another trainer's weights into the server: each of the first ones doubled."""
    from safetensors.numpy import load_file, save_file

    weights = {name: 2 * value for name, value in load_file(host.world / "model" / "model.safetensors").items()}
    path = host.sync_dir / "others.safetensors"
    save_file(weights, path, metadata={"format": "pt", "version": str(version)})
    path.chmod(0o600)
    for answer in (host.up().rpc("r1jax_prepare", path.name, version), host.up().rpc("r1jax_apply", version)):
        assert answer["ok"], answer


@pytest.mark.parametrize("moment", ["while it draws", "before it draws"])
def test_weights_that_somebody_else_pushes_are_never_sampled(bench: Bench, moment: str):
    """They bear the number of the run's own version, so that the number tells nothing."""

    def rule(asked: Asked) -> None:
        during = moment == "while it draws" and asked.kind == GROUPS and asked.number == 5
        before = moment == "before it draws" and asked.kind == "/reset_prefix_cache" and asked.number == 2
        if during or before:
            push_others(bench.host, 2)

    bench.proxy.rule = rule
    run = bench.start("others-" + moment[:3], max_steps=STEPS)
    run.end()
    trained(run)
    assert run.total("recoveries") >= 1
    bench.note(f"somebody else's push {moment}", run)


TIMED = ("time/", "tokens_per_second", "tflops_per_device", "mfu", "memory/", "vllm/")


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("moment", ["generation", "update"])
def test_a_killed_trainer_neither_loses_nor_reuses_a_sample(bench: Bench, depth: int, moment: str):
    """kill -9 when half of generation 3 is accepted, or the whole."""
    name = f"trainer-{moment}-{depth}"
    accepted = (7 if moment == "generation" else 8) * GROUP
    lives: list[Run] = []

    def wait_and_kill() -> None:
        deadline = time.monotonic() + 60
        while sum(lives[0].journal().values()) < accepted and time.monotonic() < deadline:
            time.sleep(0.002)
        lives[0].process.kill()

    def rule(asked: Asked) -> None:
        if asked.kind != GROUPS or asked.number != 7:
            return
        if moment == "generation":
            wait_and_kill()
            raise ConnectionResetError("nobody is there to hear the answer")
        threading.Thread(target=wait_and_kill, daemon=True).start()

    bench.proxy.rule = rule
    lives.append(bench.start(name, max_steps=STEPS, rollout_async_depth=depth))
    assert lives[0].end() == -signal.SIGKILL
    first, journal = untimed(lives[0].rows()), lives[0].journal()
    assert sum(journal.values()) == accepted and set(journal.values()) == {1}
    assert len(first) >= 2
    bench.proxy.rule = None
    second = bench.start(name, max_steps=STEPS, rollout_async_depth=depth)
    second.end()
    trained(second, depth)
    assert untimed(second.rows())[: len(first)] == first
    assert len(bench.proxy.drawn()) == SAMPLES and set(bench.proxy.drawn().values()) == {1}
    shown = second.shown()
    assert len(shown) == STEPS * PROMPTS and set(shown.values()) == {GROUP}
    assert second.total("replayed") >= accepted - 3 * PROMPTS * GROUP
    # What the killed one has left in the servers' memory is gone too.
    assert list(bench.host.sync_dir.iterdir()) == []
    bench.note(f"trainer killed in {moment}, depth {depth}", second)
