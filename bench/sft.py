"""SFT tokens/s of r1jax beside transformers' training step: `python -m bench.sft [--resume] [--case NAME ...]`.

Both sides train the same shapes on the same batch with AdamW over float32 weights, in turns of a few steps, each in a
process of its own. A case ends after 150 s whatever it does. Rows are appended to bench/results/<device>.jsonl.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cases import CASES, Case

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("r1jax", "transformers")
CASE_SECONDS = 150
ROUND_SECONDS = 2.0
"""How long one side has its turn, at least one step."""
MAX_ROUNDS = 12

Row = dict[str, Any]


class Worker:
    """One side's process."""

    def __init__(self, side: str, case: Case, num_threads: int):
        # Two frameworks share the GPU's memory here, so jax may not take most of it at the start.
        environment = os.environ | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "OMP_NUM_THREADS": str(num_threads),
            "JAX_PLATFORMS": "cpu" if case.platform == "cpu" else "cuda,cpu",
        }
        if case.platform == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "bench.worker", side, case.name, str(num_threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def answer(self) -> Row:
        """The next answer; EOFError when the process has ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def ask(self, line: str) -> Row:
        """The answer to a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError from error
        return self.answer()


def measure(case: Case, num_threads: int) -> Row:
    """The case's status and, for each side, its speed, step times, preparation and peak memory."""
    workers: dict[str, Worker] = {}
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        for worker in workers.values():
            worker.process.kill()

    deadline = time.monotonic() + CASE_SECONDS
    timer = threading.Timer(CASE_SECONDS, expire)
    timer.start()
    sides: dict[str, Row] = {}
    try:
        for side in SIDES:
            workers[side] = Worker(side, case, num_threads)
            sides[side] = workers[side].answer()
        _take_turns(workers, sides, deadline)
        for side in SIDES:
            sides[side] |= workers[side].ask("end")
        status = "ok"
    except EOFError:
        status = "timed out" if expired.is_set() else "failed"
    finally:
        timer.cancel()
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    return summary(case, status, sides)


def _take_turns(workers: dict[str, Worker], sides: dict[str, Row], deadline: float) -> None:
    """Runs both sides by turns, at least twice and until MAX_ROUNDS or the time is used up; fills in the seconds."""
    num_steps = {}
    for side in SIDES:
        one = workers[side].ask("1")["seconds"]
        num_steps[side] = max(1, round(ROUND_SECONDS / one))
        sides[side]["step_seconds"] = []
    for done in range(MAX_ROUNDS):
        start = time.monotonic()
        # The other side first in every second round, so that a slow drift of the machine hits both.
        for side in SIDES if done % 2 == 0 else reversed(SIDES):
            turn = workers[side].ask(str(num_steps[side]))
            sides[side]["step_seconds"].append(turn["seconds"] / num_steps[side])
            sides[side]["loss"] = turn["loss"]
        spent = time.monotonic() - start
        if done >= 1 and time.monotonic() + 1.5 * spent > deadline:
            return


def summary(case: Case, status: str, sides: dict[str, Row]) -> Row:
    """The medians of what was measured; a ratio above 1 says that r1jax is faster."""
    row: Row = {"case": case.name, "status": status, "ratio": None}
    for side, fields in sides.items():
        row[side] = dict(fields)
        if fields.get("step_seconds"):
            step = statistics.median(fields["step_seconds"])
            row[side]["tokens_per_second"] = case.num_tokens / step
            # The first step is a step too.
            row[side]["compile_seconds"] = max(0.0, fields["prepare_seconds"] - step)
    if status == "ok":
        row["ratio"] = row["r1jax"]["tokens_per_second"] / row["transformers"]["tokens_per_second"]
    return row


def machine() -> tuple[str, str]:
    """('gpu' or 'cpu', the device's name), asked in a process of its own so that none of its memory stays taken."""
    code = "import jax; d = jax.devices()[0]; open(1, 'w').write(d.platform + '|' + d.device_kind)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kind, _, name = result.stdout.partition("|")
    return kind, name


def settings(case: Case, num_threads: int) -> Row:
    """What a result depends on beside the code."""
    return {
        "model_type": case.hf_config["model_type"],
        "rows": case.rows,
        "row_length": case.row_length,
        "compute_dtype": case.compute_dtype,
        "gradient_checkpointing": case.gradient_checkpointing,
        "num_threads": num_threads if case.platform == "cpu" else None,
        "python": platform.python_version(),
        "processor": processor(),
    }


def processor() -> str:
    """The CPU's name, where Linux tells."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def commit() -> str:
    """The checkout's commit, with -dirty where files differ from it; unknown outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def results_table(rows: list[Row]) -> Table:
    """One line a case, r1jax's figure before transformers'."""
    table = Table(title="SFT: r1jax / transformers")
    table.add_column("case", overflow="fold")
    table.add_column("status")
    for name in ("tokens/s", "ratio", "compile s", "peak GiB"):
        table.add_column(name, justify="right")
    for row in rows:

        def both(key: str, unit: float, form: str, row: Row = row) -> str:
            found = (row.get(side, {}).get(key) for side in SIDES)
            return " / ".join("-" if value is None else format(value / unit, form) for value in found)

        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        # torch compiles nothing; what its first step took longer is in the results file.
        compiling = both("compile_seconds", 1, ".1f").partition(" / ")[0]
        memory = both("peak_memory_bytes", 2**30, ".2f")
        table.add_row(row["case"], row["status"], both("tokens_per_second", 1, ".0f"), ratio, compiling, memory)
    return table


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sft", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--resume", action="store_true", help="skip cases measured at this commit with these settings")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this one")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads of each side")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 when every case was measured, 1 when one failed or ran out of time."""
    options = parse(argv)
    kind, device = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = ROOT / "bench" / "results" / f"{slug}.jsonl"
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    console, rows = Console(), []
    for case in CASES:
        if not (case.name in options.case if options.case else case.platform == kind):
            continue
        about = {"device": device, "commit": commit(), "settings": settings(case, options.threads)}
        key = {"case": case.name, "status": "ok", **about}
        done = [row for row in earlier if key.items() <= row.items()]
        if options.resume and done:
            rows.append(done[-1])
            continue
        console.print(f"{case.name}: at most {CASE_SECONDS} s")
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        rows.append(measure(case, options.threads) | about | {"date": date})
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    console.print(results_table(rows))
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
