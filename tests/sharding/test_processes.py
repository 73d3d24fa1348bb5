"""Joining and leaving, each in processes of their own: jaxlib ends those that it is not content with."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import jax
import pytest

from r1jax.sharding.processes import initialize_processes

JOIN = """
import os, sys
from r1jax import commands
from r1jax.sharding import processes
if "CHIPS" in os.environ:
    del os.environ["TPU_SKIP_MDS_QUERY"]
def body(argv):
    processes.initialize_processes()
    {then}
sys.exit(processes.leave(commands.run(body)))
"""
SUM = """
    import jax, numpy
    from jax.experimental import multihost_utils
    print("the sum is", multihost_utils.process_allgather(numpy.ones(1)).sum())
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run(then: str = "", **environ: str) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr and seconds of a process with this environment that joins and then goes on."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SLURM_"))}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", JOIN.format(then=then)],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - started


def place(port: int, process: int, count: int = 2, seconds: int = 60) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(process),
        "R1JAX_JOIN_SECONDS": str(seconds),
    }


def run_all(thens: list[str], environs: list[dict[str, str]]) -> list[tuple[int, str, str, float]]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda then, environ: run(then, **environ), thens, environs))


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    initialize_processes()
    assert not jax.distributed.is_initialized()


def test_two_tasks_of_slurm_join():
    port = str(free_port())
    tasks = [
        {
            "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "JAX_COORDINATOR_PORT": port,
        }
        for task in range(2)
    ]  # fmt: skip
    for code, out, err, _ in run_all([SUM, SUM], tasks):
        assert code == 0, err
        assert out.endswith("the sum is 2.0\n")


def test_a_coordinator_that_is_not_there():
    port = free_port()
    code, _, err, seconds = run(**place(port, 1, seconds=3))
    assert code == 1
    assert err == (
        f"JAX_COORDINATOR_ADDRESS: need process 0 at 127.0.0.1:{port} to answer process 1 of 2 (environment) "
        "within 3 s, got Connection refused; start process 0, and let its port through firewalls\n"
    )
    assert 3 <= seconds < 60


def test_processes_that_never_come():
    port = free_port()
    for code, _, err, _ in run_all(["", ""], [place(port, process, 3, seconds=4) for process in range(2)]):
        assert code == 1
        assert f"JAX_NUM_PROCESSES: need all processes to join 127.0.0.1:{port} within 4 s, got fewer than 3" in err
        assert "Traceback" not in err and "Check failure" not in err


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err, _ = run(**place(port, 0))
    assert code == 1
    assert err.startswith(f"JAX_COORDINATOR_ADDRESS: need a free port on process 0, got {port}: Address already in use")


@pytest.mark.integration
def test_who_fails_does_not_wait_for_the_others():
    """Without `leave` the failed process stays at jaxlib's barrier for as long as the other is at work."""
    works = "import time; time.sleep(10); os._exit(0)"
    refuses = "from r1jax.config.errors import need; raise need('here', 'all well', 'a fault', 'mend it')"
    raises = "raise KeyError('ours')"
    one, two = free_port(), free_port()
    places = [place(one, 0), place(one, 1), place(two, 0), place(two, 1)]
    (_, _, _, first), refused, (_, _, _, second), raised = run_all([works, refuses, works, raises], places)
    assert refused[0] == 2 and "here: need all well, got a fault; mend it\n" in refused[2]
    assert raised[0] == 1 and "KeyError: 'ours'" in raised[2]
    assert refused[3] + 5 < first and raised[3] + 5 < second


def metadata_of(worker: int) -> type[BaseHTTPRequestHandler]:
    """What the metadata server of a TPU VM answers to one of two workers (jax/_src/clusters/cloud_tpu_cluster.py)."""
    values = {
        "agent-worker-number": str(worker),
        "worker-network-endpoints": "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.2",
        "tpu-env": "ZONE: 'nowhere'\nNODE_ID: 'r1'",
    }

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = values.get(self.path.rpartition("/")[2])
            self.send_response(200 if value else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Metadata


@contextlib.contextmanager
def metadata_server(worker: int) -> Iterator[str]:
    """Its host:port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), metadata_of(worker)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.integration
def test_the_workers_of_a_tpu_vm_are_found_by_jax():
    """Importing jax on a TPU VM says so in the environment; here it is told to, and lacks only the chips."""
    port = str(free_port())
    with metadata_server(0) as first, metadata_server(1) as second:
        workers = [
            {
                "JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": server, "JAX_COORDINATOR_PORT": port,
                "no_proxy": "127.0.0.1", "CHIPS": "present",
            }
            for server in (first, second)
        ]  # fmt: skip
        for code, out, err, _ in run_all([SUM, SUM], workers):
            assert code == 0, err
            assert out.endswith("the sum is 2.0\n")
