"""Whether a folder can hold checkpoints or a cache: room, rights, speed, locks, renames, and its server's clock."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from r1jax.doctor.findings import Finding, NoAnswer, Verdict, within

MIB, GIB = 2**20, 2**30
_BLOCKS = 64
"""MiB written to measure the speed."""
_SECONDS = 60.0
"""A check of a file system that takes longer is taken for a mount that hangs."""
_NUM_RENAMES = 200


def check_folder(name: str, folder: Path, seconds: float = _SECONDS) -> list[Finding]:
    """All checks of one folder; one that does not exist yet is looked at in the nearest that does."""
    try:
        return within(seconds, lambda: _check(name, folder))
    except NoAnswer as error:
        return [Finding(name, f"{folder}: {error}", "bad", "its file system hangs: mount it again, or choose another")]


def _check(name: str, folder: Path) -> list[Finding]:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    findings = [judge_room(name, there, shutil.disk_usage(there).free, _free_files(there))]
    try:
        with _scratch(there) as scratch:
            checks: list[Callable[[str, Path], Finding]] = [check_speed, check_locks, check_renames, check_file_clock]
            findings += [check(name, scratch) for check in checks]
    except OSError as error:
        advice = "choose another folder, or mend its rights, mount or quota"
        findings.append(Finding(f"{name}: writing", f"{there}: {error.strerror}", "bad", advice))
    return findings


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=".r1jax-doctor-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _free_files(folder: Path) -> int | None:
    """How many files may still be made; None where the file system does not count them."""
    counts = os.statvfs(folder)
    return counts.f_favail if counts.f_files else None


def judge_room(name: str, folder: Path, free: int, free_files: int | None) -> Finding:
    """A checkpoint has 12 bytes a parameter: 20 GiB hold one of a model of 1.7 billion."""
    found = f"{folder}: {free / GIB:.1f} GiB free"
    if free_files is not None and free_files < 1000:
        return Finding(f"{name}: room", f"{found}, {free_files} files", "bad", "remove files: no more can be made")
    verdict: Verdict = "bad" if free < GIB else "warn" if free < 20 * GIB else "ok"
    return Finding(f"{name}: room", found, verdict, "" if verdict == "ok" else "make room, or choose another disk")


def check_speed(name: str, scratch: Path) -> Finding:
    """Writing and flushing 64 MiB, then 4 KiB: the time of large shards, and of small files."""
    block = os.urandom(MIB)
    started = time.perf_counter()
    with open(scratch / "large", "wb") as file:
        for _ in range(_BLOCKS):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = _BLOCKS / (time.perf_counter() - started)
    started = time.perf_counter()
    with open(scratch / "small", "wb") as file:
        file.write(block[:4096])
        file.flush()
        os.fsync(file.fileno())
    return judge_speed(name, rate, time.perf_counter() - started)


def judge_speed(name: str, mib_per_second: float, sync_seconds: float) -> Finding:
    """Below these a save of some GiB takes minutes, and a checkpoint of hundreds of files too."""
    slow = mib_per_second < 50 or sync_seconds > 0.5
    found = f"{mib_per_second:.0f} MiB/s written and flushed, {sync_seconds * 1000:.0f} ms to flush a small file"
    advice = "save less often (save_steps), or choose a faster disk" if slow else ""
    return Finding(f"{name}: speed", found, "warn" if slow else "ok", advice)


def check_locks(name: str, scratch: Path) -> Finding:
    """flock holds a second opener out: with it one process tokenises and the others wait."""
    path = scratch / "lock"
    with open(path, "w") as first, open(path, "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            advice = (
                "without locks each process makes the cache for itself: mount with locks, or set R1JAX_CACHE elsewhere"
            )
            return Finding(f"{name}: locks", error.strerror or str(error), "warn", advice)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding(f"{name}: locks", "work")
    advice = "mount with locks (NFS: without nolock), or choose another folder"
    return Finding(f"{name}: locks", "two hold the same lock", "bad", advice)


def check_renames(name: str, scratch: Path) -> Finding:
    """A reader never finds a file that is replaced missing or half written: checkpoints and exports count on it."""
    target = scratch / "target"
    target.write_bytes(b"0" * 4096)
    faults: list[str] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                size = len(target.read_bytes())
            except OSError as error:
                faults.append(error.strerror or str(error))
            else:
                if size != 4096:
                    faults.append(f"{size} of 4096 bytes")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for number in range(_NUM_RENAMES):
        new = scratch / f"new-{number}"
        new.write_bytes(b"%d" % (number % 10) * 4096)
        os.replace(new, target)
    over.set()
    reader.join()
    (scratch / "folder.tmp").mkdir()
    (scratch / "folder.tmp").rename(scratch / "folder")
    if faults:
        advice = "choose a POSIX file system for output_dir: object stores mounted as folders copy instead"
        return Finding(f"{name}: renames", f"a reader saw {faults[0]}", "bad", advice)
    return Finding(f"{name}: renames", "are atomic")


def check_file_clock(name: str, scratch: Path) -> Finding:
    """How far the file server's clock is from this machine's."""
    before = time.time()
    (scratch / "clock").touch()
    after = time.time()
    stamp = (scratch / "clock").stat().st_mtime
    # A kernel stamps with the time of its last tick, so a little before `before` is no error.
    return judge_clock(f"{name}: clock", max(before - stamp, stamp - after, 0.0))


def judge_clock(check: str, skew_seconds: float) -> Finding:
    """Clocks that differ make logs lie; hubs and trackers refuse signatures that are minutes off."""
    verdict: Verdict = "bad" if skew_seconds > 60 else "warn" if skew_seconds > 2 else "ok"
    advice = "" if verdict == "ok" else "run NTP (chronyc tracking says whether it does)"
    return Finding(check, f"{skew_seconds:.1f} s apart" if skew_seconds >= 0.1 else "the same time", verdict, advice)
