"""The processes of a run as the environment has them: do they find each other, and do they agree."""

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from r1jax.config.errors import RunFailure, UserError
from r1jax.doctor.findings import Finding
from r1jax.doctor.folders import judge_clock
from r1jax.experience.exchange import all_gathered
from r1jax.sharding.environment import find_processes
from r1jax.sharding.processes import JOIN_SECONDS, initialize_processes

_JOIN_SECONDS_HERE = "60"
"""The doctor waits less for the others than a run does, unless it is told how long."""


def check_environment(environ: Mapping[str, str]) -> list[Finding]:
    """What the environment says, and whether a proxy is in the way."""
    try:
        found = find_processes(environ)
    except UserError as error:
        return [Finding("processes", str(error), "bad", "docs/launch.md has the variables")]
    if found is None:
        return [Finding("processes", "one: no variable says that there are others")]
    place = f"process {found.process_id} of {found.num_processes}, coordinator {found.coordinator}"
    return [Finding("processes", f"{place} (from: {found.source})"), *_check_proxy(found.coordinator, environ)]


def _check_proxy(coordinator: str, environ: Mapping[str, str]) -> list[Finding]:
    """jaxlib speaks gRPC, which sends even such connections through a proxy unless no_proxy names the host."""
    lowered = {name.lower(): value for name, value in environ.items()}
    proxy = next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if lowered.get(name)), None)
    host = coordinator.rpartition(":")[0]
    spared = [name for name in lowered.get("no_proxy", "").replace(" ", "").split(",") if name]
    if proxy is None or any(name == "*" or host == name or host.endswith("." + name.lstrip(".")) for name in spared):
        return []
    advice = f"add {host} to no_proxy: joining may hang otherwise"
    return [Finding("proxy", f"{proxy} is set and no_proxy leaves {host} out", "warn", advice)]


def join() -> Finding:
    """Whether all processes find the coordinator in time."""
    os.environ.setdefault(JOIN_SECONDS, _JOIN_SECONDS_HERE)
    started = time.monotonic()
    try:
        initialize_processes()
    except (RunFailure, UserError) as error:
        problem, _, advice = str(error).partition("; ")
        return Finding("coordinator", problem, "bad", advice)
    return Finding("coordinator", f"all processes joined after {time.monotonic() - started:.1f} s")


def label() -> str:
    """This process and its host, once it has joined."""
    return f"{jax.process_index()} on {socket.gethostname()}"


def check_clocks() -> list[Finding]:
    """How far every process's clock is from the first one's, as seen when all leave a barrier; all must call it."""
    all_gathered(None)  # compiled and connected, so that the next leaves all of them at once
    all_gathered(None)
    times = all_gathered((label(), time.time()))
    return judge_clocks(times)


def judge_clocks(times: Sequence[tuple[str, float]]) -> list[Finding]:
    """One line when all agree, else one for each that does not."""
    skews = {name: abs(when - times[0][1]) for name, when in times}
    judged = [judge_clock(f"clock of {name}", skew) for name, skew in skews.items()]
    apart = [one for one in judged if one.verdict != "ok"]
    return apart or [Finding("clocks", f"of all processes within {max(skews.values()):.1f} s")]


def check_same_folder(name: str, folder: Path) -> list[Finding]:
    """Whether a file of the first process is seen by all: checkpoints need one folder; all must call it."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    marker = there / all_gathered(f".r1jax-doctor-{secrets.token_hex(8)}")[0]
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # said by the folder's own check; the others will not see it
            marker.touch()
    all_gathered(None)
    sees = all_gathered((label(), marker.exists()))
    if jax.process_index() == 0:
        marker.unlink(missing_ok=True)
    blind = [name for name, found in sees if not found]
    if not blind:
        return [Finding(f"{name}: shared", f"all {len(sees)} processes see it")]
    advice = f"{name} must be the same folder for all: a shared mount, under the same path"
    return [Finding(f"{name}: shared", f"not seen by process {', '.join(blind)}", "bad", advice)]
