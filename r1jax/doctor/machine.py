"""Memory, shared memory, processors and limits of this machine."""

import os
import resource
import shutil
from pathlib import Path

from r1jax.doctor.findings import Finding, Verdict

GIB = 2**30


def check_machine() -> list[Finding]:
    """What this process may use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
    return [
        Finding("processors", str(processors)),
        judge_memory(available_memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))),
        judge_shared_memory(shm),
        judge_open_files(soft, hard),
    ]


def judge_memory(available: int | None) -> Finding:
    """Bytes that may still be used; a run holds a model's shards, its data and the compiler."""
    if available is None:
        return Finding("memory", "not known here")
    verdict: Verdict = "bad" if available < GIB else "warn" if available < 4 * GIB else "ok"
    advice = "" if verdict == "ok" else "end other programs, or ask the scheduler for more: XLA alone takes 1 to 2 GiB"
    return Finding("memory", f"{available / GIB:.1f} GiB free", verdict, advice)


def judge_shared_memory(free: int | None) -> Finding:
    """NCCL passes data between the GPUs of a host through it, worker processes their rows."""
    if free is None:
        return Finding("shared memory", "no /dev/shm", "warn", "mount a tmpfs at /dev/shm")
    advice = "docker run --shm-size=16g; in a pod an emptyDir with medium: Memory at /dev/shm (launch/jobset.yaml)"
    verdict: Verdict = "ok" if free >= GIB else "warn"
    return Finding("shared memory", f"{free / GIB:.2f} GiB free", verdict, "" if verdict == "ok" else advice)


def judge_open_files(soft: int, hard: int) -> Finding:
    """Checkpoints, data and connections of a run need some hundreds."""
    verdict: Verdict = "ok" if soft >= 1024 or soft == resource.RLIM_INFINITY else "warn" if soft >= 256 else "bad"
    return Finding("open files", f"{soft} (at most {hard})", verdict, "" if verdict == "ok" else "ulimit -n 65536")


def available_memory(meminfo: Path, cgroup: Path) -> int | None:
    """Bytes that this process may still take: the machine's, or what its control group leaves if that is less."""
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
