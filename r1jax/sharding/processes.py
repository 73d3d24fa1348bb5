"""The processes of a run: joined, and left.

jaxlib answers every mishap with an abort and a stack trace, from C++. What can be said in a line is said before.
"""

import os
import socket
import sys
import threading
from types import TracebackType

import jax

from r1jax.config.errors import RunFailure
from r1jax.sharding.environment import ADDRESS, COUNT, PORT, Processes, find_processes, number

HEARTBEAT_SECONDS = 20
"""A process that is silent for so long is taken for dead, and jaxlib ends the others."""

JOIN_SECONDS = "R1JAX_JOIN_SECONDS"
"""How long a process waits for all others at the start."""

_JOIN_SECONDS_DEFAULT, _LONGER_SECONDS = 300, 5
_SHUTDOWN_SECONDS = 24 * 3600
"""Who has finished waits so long for who still exports or uploads: when the time is over jaxlib aborts all of them, and
its default is five minutes. Heartbeats tell of the dead, and who fails does not wait (`leave`)."""


def initialize_processes() -> None:
    """Joins the other processes of the run, if there are any; must come before any device is asked for.

    Raises `UserError` for an environment that cannot be right, and `RunFailure` when not all have come in time: jaxlib
    would abort with a stack trace.
    """
    if jax.distributed.is_initialized():
        return
    found = find_processes(os.environ)
    if found is None and not _on_tpu_vm():
        return
    if found is not None and found.process_id == 0:
        _check_port(found.coordinator)
    seconds = number(os.environ, JOIN_SECONDS, 1) or _JOIN_SECONDS_DEFAULT
    _join(found, seconds)
    sys.excepthook = _leave_with_traceback


def leave(exit_code: int) -> int:
    """The exit code of the process, which ends here when it fails and others have joined it.

    A normal end waits for the others at a barrier. They wait for this one in a collective, and when the barrier's time
    is over all are aborted and the exit code is lost.
    """
    if exit_code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


def _leave_with_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    leave(1)


def _on_tpu_vm() -> bool:
    """Whether JAX shall ask the metadata server for the other workers: on a TPU VM importing it has set this variable
    (cloud_tpu_init.py), and the other one where there are no chips."""
    return os.environ.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in os.environ


def _check_port(coordinator: str) -> None:
    """Raises when process 0 cannot listen: jaxlib 0.10 dies of a segmentation fault then."""
    port = int(coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        advice = f"end the run that has it, or choose another with {PORT}"
        raise RunFailure(f"{ADDRESS}: need a free port on process 0, got {port}: {error.strerror}; {advice}") from error


def _join(found: Processes | None, seconds: int) -> None:
    """Joins in a thread of its own, because jaxlib's wait hears no signal and ends the process when its time is over.

    found None lets JAX ask the TPU's metadata server.
    """
    failure: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                coordinator_address=found and found.coordinator,
                num_processes=found and found.num_processes,
                process_id=found and found.process_id,
                # JAX's own reading of Slurm would take one GPU for this process, though all has been said above.
                cluster_detection_method=None if found is None else "deactivate",
                initialization_timeout=seconds + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
        except Exception as error:  # handed to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=join, name="join", daemon=True)
    thread.start()
    # Process 0 stays a little longer: when it goes the others are told that nobody answers.
    thread.join(seconds + _LONGER_SECONDS if found is not None and found.process_id == 0 else seconds)
    if failure and isinstance(failure[0], jax.errors.JaxRuntimeError | OSError):
        raise RunFailure(f"{ADDRESS}: need to join the other processes, got {failure[0]}; see their lines")
    if failure:
        raise failure[0]
    if thread.is_alive():
        raise _late(found, seconds)


def _late(found: Processes | None, seconds: int) -> RunFailure:
    """Why not all came: process 0 does not answer, or somebody else is missing."""
    if found is None:
        return RunFailure(
            f"{ADDRESS}: need the TPU's workers to join within {seconds} s, got fewer; look at each of them"
        )
    who = f"process {found.process_id} of {found.num_processes} ({found.source})"
    if problem := connection_problem(found.coordinator, 2.0):
        rule = f"process 0 at {found.coordinator} to answer {who} within {seconds} s"
        return RunFailure(f"{ADDRESS}: need {rule}, got {problem}; start process 0, and let its port through firewalls")
    rule = f"all processes to join {found.coordinator} within {seconds} s"
    advice = f"look whether all were started ({JOIN_SECONDS} gives them longer)"
    return RunFailure(f"{COUNT}: need {rule}, got fewer than {found.num_processes}, says {who}; {advice}")


def connection_problem(address: str, timeout_seconds: float) -> str | None:
    """Why host:port cannot be reached by TCP, or None."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_seconds).close()
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return error.strerror or str(error)
    return None
