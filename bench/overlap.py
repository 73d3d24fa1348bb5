"""Seconds of a GRPO step with rollout_async_depth 1 beside 0, sampled by a real vLLM server on this machine.

    PYTHON=.venv-vllm/bin/python .venv/bin/python -m bench.overlap --model DIR --data gsm8k_train.jsonl

The server is given half of the cores and the trainer the other half, as two machines would be; both runs take turns.
A row a depth is appended to bench/results/overlap.jsonl.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.sft import ROOT, commit, processor

CONFIG = ROOT / "configs" / "SmolLM2-135M-Instruct" / "grpo.yaml"
OPTIONS = ("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "64", "--enforce-eager")
START_SECONDS = 600
COLUMNS = ("time/step", "time/update", "time/sync", "time/rollout", "time/rollout_wait", "sampling/staleness/mean")
LENGTH = 64
"""Tokens of a completion at most."""


@contextlib.contextmanager
def serving(model: str, folder: Path, cores: set[int]) -> Iterator[str]:
    """The address of a server that answers."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port = made.getsockname()[1]
    command = [str(ROOT / "launch" / "vllm_server.sh"), model, "--port", str(port), *OPTIONS]
    bind = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(cores))), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {**os.environ, **bind, "R1JAX_VLLM_KEY_FILE": str(folder / "key")}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    os.sched_setaffinity(process.pid, cores)
    try:
        _wait(f"http://127.0.0.1:{port}", process, folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url + "/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(1)
    raise SystemExit("the server did not come up:\n" + "\n".join(log.read_text().splitlines()[-20:]))


def train(depth: int, args: argparse.Namespace, url: str, folder: Path, cores: set[int]) -> list[dict[str, float]]:
    """The rows of a run's steps but for the first two, which wait for the compiler or have nothing drawn ahead."""
    keys = {
        "model_name_or_path": args.model, "dataset_train_file": args.data, "output_dir": folder / f"depth{depth}",
        "overwrite_output_dir": "true", "resume_from_checkpoint": "false", "rollout_engine": "vllm",
        "vllm_server_base_url": url, "rollout_async_depth": depth, "max_steps": args.steps + 2, "beta": 0,
        "eval_strategy": "no", "eval_on_start": "false", "max_completion_length": LENGTH, "report_to": "none",
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "log_completions": "false",
    }  # fmt: skip
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "r1jax.train", "--config", str(CONFIG), *words]
    environment = {**os.environ, "R1JAX_VLLM_KEY_FILE": str(folder / "key"), "JAX_NUM_CPU_DEVICES": "1"}
    with (folder / f"depth{depth}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        os.sched_setaffinity(process.pid, cores)
        if process.wait() != 0:
            raise SystemExit((folder / f"depth{depth}.log").read_text()[-3000:])
    text = (folder / f"depth{depth}" / "metrics.jsonl").read_text()
    return [row for row in map(json.loads, text.splitlines()) if "mismatch_kl" in row][2:]


def table(rows: list[dict[str, Any]]) -> Table:
    """A line a depth."""
    made = Table(
        title="SmolLM2-135M on GSM8K, 16 completions of at most 64 tokens a step, float32", title_justify="left"
    )
    for name in ("rollout_async_depth", *COLUMNS, "mismatch_kl"):
        made.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row[name]:.2f}" if name in row else "" for name in COLUMNS]
        made.add_row(str(row["rollout_async_depth"]), *cells, f"{row['mismatch_kl']:.1e}")
    return made


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description=__doc__)
    parser.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="GSM8K's training rows as JSON lines")
    parser.add_argument("--steps", type=int, default=6, help="steps of each run that are measured (6)")
    parser.add_argument("--turns", type=int, default=2, help="runs of each depth (2)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    args, console = parse(argv), Console(width=160)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed, one for each side")
    mine, theirs = set(cores[: len(cores) // 2]), set(cores[len(cores) // 2 :])
    found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(args.model, folder, theirs) as url:
            for _ in range(args.turns):
                for depth, rows in found.items():
                    rows += train(depth, args, url, folder, mine)
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "processor": processor(),
        "cores": [len(mine), len(theirs)],
    }
    means = [
        {"rollout_async_depth": depth, "steps": len(rows), **about}
        | {
            name: float(np.mean(values))
            for name in (*COLUMNS, "mismatch_kl")
            # A run's last generation has none after it to push weights for.
            if (values := [row[name] for row in rows if name in row])
        }
        for depth, rows in found.items()
    ]
    console.print(table(means))
    console.print(f"ratio of steps: {means[0]['time/step'] / means[1]['time/step']:.2f}")
    with (ROOT / "bench" / "results" / "overlap.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in means)
    return 0


if __name__ == "__main__":
    sys.exit(main())
