"""Training commands in processes of their own, which a test stops, signals, or takes the disk from.

Without a launcher: the processes of a run are started here, so that a test sees how each of them ends.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import sums, write_model, write_rows

ROOT = Path(__file__).resolve().parents[2]
TIMED = ("time/", "tokens_per_second", "tflops_per_device", "mfu", "memory/", "eval_runtime")
SECONDS = 240.0
"""For what comes for sure, on a machine that others use too."""


@dataclasses.dataclass
class Trainer:
    """One process of a run."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self, *words: str) -> list[str]:
        """What it said in lines that have all these words."""
        return [" ".join(line.split()) for line in self.said().splitlines() if all(word in line for word in words)]

    def until(self, happened: Callable[[], Any], seconds: float = SECONDS) -> Any:
        """What `happened` gives once it is true; the process must live until then."""
        deadline = time.monotonic() + seconds
        while not (found := happened()):
            assert self.process.poll() is None, f"exit code {self.process.returncode}\n{self.said()}"
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)
        return found

    def until_said(self, words: str) -> None:
        self.until(lambda: words in self.said())

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, seconds: float = SECONDS) -> int:
        """Its exit code, once it has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds:g} s\n{self.said()}") from None


def write_world(folder: Path) -> Path:
    """The folder, with a small model and sums as rows."""
    write_model(folder / "model")
    rows = sums(128)
    write_rows(folder / "train.jsonl", rows[:96])
    write_rows(folder / "test.jsonl", rows[96:])
    return folder


def recipe(world: Path, name: str, **changes: Any) -> Path:
    """A config file of a supervised run of 12 steps that saves every fourth."""
    content = {
        "model_name_or_path": str(world / "model"), "dataset_train_file": str(world / "train.jsonl"),
        "output_dir": str(world / name), "max_length": 64, "packing": True, "per_device_train_batch_size": 1,
        "max_steps": 12, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 4,
        "report_to": "none", **changes,
    }  # fmt: skip
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(config: Path, world: Path, processes: int = 1, **environment: str) -> list[Trainer]:
    """The processes of a run, each with one device, in their order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "HF_DATASETS_CACHE": str(world / "cache"), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes), **environment,
    }  # fmt: skip
    command = [sys.executable, "-m", "r1jax.train", "--config", str(config)]
    trainers = []
    for number in range(processes):
        log = config.with_suffix(f".{number}.log")
        with log.open("wb") as file:
            own = {**shared, "JAX_PROCESS_ID": str(number)}
            process = subprocess.Popen(command, env=own, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        trainers.append(Trainer(process, log))
    return trainers


def end(trainers: list[Trainer]) -> None:
    """Kills what is left of a run and all that it has started."""
    for trainer in trainers:
        for number in (signal.SIGCONT, signal.SIGKILL):
            try:
                os.killpg(trainer.process.pid, number)
            except ProcessLookupError:
                break
        trainer.process.wait()


def finished(config: Path, world: Path, processes: int = 1, **environment: str) -> str:
    """What the first process said in a run that is let alone."""
    trainers = start(config, world, processes, **environment)
    try:
        codes = [trainer.ended() for trainer in trainers]
        assert codes == [0] * processes, [trainer.said() for trainer in trainers]
    finally:
        end(trainers)
    return trainers[0].said()


def checkpoints(folder: Path) -> list[int]:
    """The steps of those that count as whole."""
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def slow_disk(folder: Path, part: str) -> dict[str, str]:
    """The environment of processes whose writes to paths with this part wait while `folder`/disk-waits is there."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("a disk that does not answer is made with gcc, which is not installed")
    library = folder / "slow_disk.so"
    if not library.exists():
        source = Path(__file__).with_name("slow_disk.c")
        subprocess.run([gcc, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "SLOW_PATH": part, "SLOW_WHILE": str(folder / "disk-waits")}


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """The folder, with a file system of its own that holds so much. Who may not mount one skips."""
    folder.mkdir()
    options = f"size={kib}k,mode=0777"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small disk is a tmpfs mount, which needs root: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is left of the disk; deleting it makes room again."""
    path = disk / "everything-else"
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                return path


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]
