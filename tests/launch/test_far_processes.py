"""Processes that hang on a connection. The ssh of these tests runs the command on this machine."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1jax.config.errors import UserError
from r1jax.launch.hosts import Host, read_hosts
from tests.launch.programs import ROOT, SECONDS, ended, is_alive, launch, pids, wait_for

# Takes `[options] host command` as ssh does, and hands the command to a shell.
SSH = """#!/bin/sh
while [ $# -gt 2 ]; do shift; done
[ "$1" != unreachable ] || { echo "ssh: connect to host $1 port 22: No route to host" >&2; exit 255; }
exec sh -c "$2"
"""
WAITING = "ready(); time.sleep(600)"


@pytest.fixture
def ssh(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "my ssh"
    path.write_text(SSH)
    path.chmod(0o755)
    return {"SSH": f"{shlex.quote(str(path))} -o BatchMode=yes"}


def host_file(folder: Path, *lines: str) -> Path:
    path = folder / "hosts"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_each_process_gets_its_place_and_its_arguments(tmp_path: Path, ssh: dict[str, str]) -> None:
    """Quotes, spaces and dollar signs go through two shells; variables of some names go along, tokens unseen."""
    hosts = host_file(tmp_path, "# two hosts", "me@first 2  # with two", "second")
    program = """
names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "HF_TOKEN", "XLA_FLAGS", "OTHER_HOSTS"]
print(me, [os.environ.get(name) for name in names], sys.argv[1:], os.getcwd())
"""
    words = ["--prompt", 'it\'s "$HOME" `x` \\ *', ""]
    environment = {**ssh, "HF_TOKEN": "hf_secret", "XLA_FLAGS": "--a --b", "JAX_COORDINATOR_PORT": "4321"}
    status, lines, errors = ended(launch(tmp_path, program, *words, hosts=hosts, environment=environment))
    assert (status, errors) == (0, [])
    expected = [["first:4321", "3", "hf_secret", "--a --b", None], words, str(ROOT)]
    assert sorted(lines) == [f"[{n}] {n} {expected[0]} {expected[1]} {expected[2]}" for n in range(3)]


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL ("),
        ("print('seed: need x'); sys.exit(2)", 2, "refused what it was given (exit code 2): seed: need x"),
        ("1 / 0", 1, "ended with exit code 1: ZeroDivisionError: division by zero"),
    ],
)
def test_one_line_names_process_host_and_cause(
    tmp_path: Path, ssh: dict[str, str], end: str, code: int, words: str
) -> None:
    hosts = host_file(tmp_path, "first", "second")
    program = f"""
ready()
if me != 1: time.sleep(600)
while not Path(os.environ["FOLDER"], "ready-0").exists(): time.sleep(0.01)
{end}"""
    status, lines, errors = ended(launch(tmp_path, program, hosts=hosts, environment=ssh))
    assert status == code and len(errors) == 1, errors
    assert errors[0].startswith(f"launch: process 1 on host second {words}")
    assert not any("launch:" in line for line in lines)
    assert not any(map(is_alive, pids(tmp_path)))


def test_one_that_stands_still_is_named_when_jaxlib_aborts_another_first(tmp_path: Path, ssh: dict[str, str]) -> None:
    program = """
ready()
if me == 1: time.sleep(600)
while not Path(os.environ["FOLDER"], "go").exists(): time.sleep(0.01)
print("Terminating process because the JAX distributed service detected fatal errors", flush=True); os.abort()
"""
    hosts = host_file(tmp_path, "first", "second")
    launcher = launch(tmp_path, program, hosts=hosts, environment=ssh)
    os.kill(pids(tmp_path)[1], signal.SIGSTOP)
    (tmp_path / "go").touch()
    status, _, errors = ended(launcher)
    assert status == 128 + signal.SIGSTOP and len(errors) == 1 and "process 1 on host second" in errors[0]


def test_a_host_out_of_reach_is_named(tmp_path: Path, ssh: dict[str, str]) -> None:
    hosts = host_file(tmp_path, "first", "unreachable")
    status, _, errors = ended(launch(tmp_path, WAITING, hosts=hosts, environment=ssh))
    words = "is out of reach: ssh: connect to host unreachable port 22: No route to host; ending the others"
    assert (status, errors) == (255, [f"launch: process 1 on host unreachable {words}"])


def test_an_ssh_that_is_not_there_is_the_users_to_mend(tmp_path: Path) -> None:
    hosts = host_file(tmp_path, "first")
    status, _, errors = ended(launch(tmp_path, WAITING, hosts=hosts, environment={"SSH": "no-such-command"}))
    assert status == 1 and "SSH: need a command, got 'no-such-command'" in errors[-1]


def test_sigterm_reaches_each_once(tmp_path: Path, ssh: dict[str, str]) -> None:
    program = """
def note(number, frame):
    with open(os.path.join(os.environ["FOLDER"], f"signals-{me}"), "a") as file: file.write(f"{number} ")
signal.signal(15, note); ready(); signal.pause(); time.sleep(1)
"""
    launcher = launch(tmp_path, program, hosts=host_file(tmp_path, "first", "second"), environment=ssh)
    pids(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    assert ended(launcher)[0] == 0
    assert [(tmp_path / f"signals-{number}").read_text() for number in range(2)] == ["15 ", "15 "]


def test_one_that_hears_nothing_is_killed_there(tmp_path: Path, ssh: dict[str, str]) -> None:
    program = "signal.signal(15, signal.SIG_IGN); ready(); time.sleep(600)"
    launcher = launch(tmp_path, program, hosts=host_file(tmp_path, "first", "second"), environment=ssh, grace=1)
    found = pids(tmp_path)
    os.kill(found[0], signal.SIGKILL)
    status, _, errors = ended(launcher)
    assert status == 137 and len(errors) == 1 and not any(map(is_alive, found))


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path, ssh: dict[str, str]) -> None:
    launcher = launch(tmp_path, WAITING, hosts=host_file(tmp_path, "first", "second"), environment=ssh)
    found = pids(tmp_path)
    launcher.kill()
    wait_for(lambda: not any(map(is_alive, found)))
    launcher.communicate()


FAR_SIDE = "from r1jax.launch import far_side; far_side.SILENCE_SECONDS = 1.0; raise SystemExit(far_side.main())"


def far_side(program: str) -> subprocess.Popen[bytes]:
    """The other end, told what to run."""
    process = subprocess.Popen(
        [sys.executable, "-c", FAR_SIDE],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    task = {"number": 3, "host": "far", "arguments": ["-c", program], "environment": {}}
    process.stdin.write(json.dumps(task).encode() + b"\n")
    process.stdin.flush()
    return process


def test_the_far_side_says_what_happened_to_the_launcher() -> None:
    """No word for a while, though the connection is open: a network that is cut closes nothing."""
    process = far_side("import time; time.sleep(600)")
    began = time.monotonic()
    assert process.wait(timeout=SECONDS) == 1 and time.monotonic() - began > 0.9
    assert process.stderr is not None
    words = b"launch: process 3 on host far lost its launcher: no sign of life for 1 s\n"
    assert process.stderr.read() == words


def test_the_far_side_goes_on_while_it_hears_something() -> None:
    process = far_side("import time; time.sleep(3); print(7)")
    assert process.stdin is not None and process.stdout is not None
    for _ in range(10):
        time.sleep(0.4)
        if process.poll() is None:
            process.stdin.write(b"\n")
            process.stdin.flush()
    assert process.wait(timeout=SECONDS) == 0 and process.stdout.read() == b"7\n"


def test_hosts_and_how_many_processes_they_get(tmp_path: Path) -> None:
    found = read_hosts(str(host_file(tmp_path, "", "# all", "node-1.cluster 4", "\tme@10.0.0.2 # one", "fe80::1%eth0")))
    assert found == [Host("node-1.cluster", 4), Host("me@10.0.0.2", 1), Host("fe80::1%eth0", 1)]
    assert [host.address for host in found] == ["node-1.cluster", "10.0.0.2", "[fe80::1%eth0]"]


@pytest.mark.parametrize(
    ("lines", "got"),
    [
        (["# none"], "need a file with a host a line"),
        (["a two"], "'a two'"),
        (["a 0"], "'a 0'"),
        (["a 1 2"], "'a 1 2'"),
        (["-oProxyCommand=x"], "-oProxyCommand"),
        (["a", "b", "a"], "got 'a'; write how many"),
        (["localhost", "b"], "got localhost; write its name"),
        (["127.0.0.1", "b"], "got 127.0.0.1; write its name"),
    ],
)
def test_host_files_that_cannot_be_meant(tmp_path: Path, lines: list[str], got: str) -> None:
    with pytest.raises(UserError, match=r"^hosts: need .*") as found:
        read_hosts(str(host_file(tmp_path, *lines)))
    assert got in str(found.value)


def test_a_host_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hosts: need a readable text file"):
        read_hosts(str(tmp_path / "none"))
