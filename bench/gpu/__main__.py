"""r1jax on one GPU beside torch: `python -m bench.gpu [--resume] [--case NAME ...] [--smoke] [--parts] [--table]`.

Nothing is downloaded: random weights of real shapes. Each side of a case has 150 s in processes of its own (r1jax one a
setting), and what it has by then stays; the fastest setting of each counts. First the machine's own ceilings are
measured, in the same run: a large bfloat16 product, a copy and a read. Rows go to bench/results/<device>-<date>.json as
they come, and the table into docs/performance.md. --smoke: tiny shapes on the CPU, written nowhere. --parts: where a
step's time goes, see parts.py.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.gpu.cases import CASES, GPU, SMOKE, Case
from bench.gpu.report import console_table, write_table
from bench.sft import ROOT, commit, machine, processor

SIDE_SECONDS = 150
Row = dict[str, Any]


def lines_of(module: str, arguments: list[str], *, cpu: bool, seconds: float = SIDE_SECONDS) -> tuple[list[Row], str]:
    """(what the process says, a JSON object a line, how it ended: ok, timed out, or failed and its last words)."""
    # As much of the device as torch may take; JAX's default is three quarters.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ
    environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
        told, words = process.communicate()
    finally:
        timer.cancel()
    # A line that was cut off by the end is none.
    rows = [json.loads(line) for line in told.splitlines(keepends=True) if line.endswith("}\n")]
    if expired.is_set():
        return rows, "timed out"
    return rows, "ok" if process.returncode == 0 else "failed: " + " | ".join(words.strip().splitlines()[-3:])[:300]


def side(module: str, calls: list[list[str]], *, cpu: bool) -> Row:
    """What a side's processes say one after the other in its seconds, what went wrong first, the fastest setting."""
    end = time.monotonic() + SIDE_SECONDS
    rows, endings = list[Row](), list[str]()
    for arguments in calls:
        more, ending = lines_of(module, arguments, cpu=cpu, seconds=max(0.0, end - time.monotonic()))
        rows += more
        endings += [ending, *(f"failed: {row['failed']}" for row in more if "failed" in row)]
    return {"status": next((one for one in endings if one != "ok"), "ok"), "best": best(rows), "all": rows}


def best(rows: list[Row]) -> Row | None:
    """The fastest of a side's settings; None where none was measured."""
    measured = [row for row in rows if "tokens_per_second" in row]
    return max(measured, key=lambda row: row["tokens_per_second"], default=None)


def measure(case: Case, *, cpu: bool) -> Row:
    """Both sides of a case."""
    row: Row = {"case": case.name, "num_tokens": case.num_tokens, "flops_per_token": case.flops_per_token}
    if case.kind == "decode":
        row["bytes_per_token"] = case.bytes_per_token_drawn
    numbers = range(len(case.settings))
    row["r1jax"] = side("bench.gpu.r1jax_side", [[case.name, str(number)] for number in numbers], cpu=cpu)
    row["torch"] = side("bench.gpu.torch_side", [[case.name]], cpu=cpu)
    ours, theirs = row["r1jax"]["best"], row["torch"]["best"]
    row["ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"] if ours and theirs else None
    return row


def results_path(device: str, date: str) -> Path:
    """Where a device's rows of a day lie."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return ROOT / "bench" / "results" / f"{slug}-{date}.json"


def save(path: Path, found: Row) -> None:
    """All of it at once, so that a run that is cut off leaves whole files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(found, indent=1) + "\n")
    beside.replace(path)


def begin(path: Path, device: str, *, resume: bool, cpu: bool) -> Row:
    """The file's content to go on with, or a new one with the machine's ceilings."""
    if resume and path.exists():
        earlier = json.loads(path.read_text())
        if earlier["commit"] == commit():
            return earlier
    ceilings, status = lines_of("bench.gpu.ceilings", [], cpu=cpu)
    return {
        "device": device,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "processor": processor(),
        "ceilings": ceilings[-1] if ceilings else {"status": status},
        "cases": [],
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--resume", action="store_true", help="skip what was measured today at this commit")
    parser.add_argument(
        "--case", action="append", choices=[case.name for case in CASES], metavar="NAME", help="only it"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: whether it all runs")
    parser.add_argument("--parts", action="store_true", help="where the time of a case's update goes, for every --case")
    parser.add_argument("--table", action="store_true", help="write docs/performance.md's table again and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 when both sides of every case were measured, 1 otherwise."""
    options, console = parse(argv), Console(width=180)
    if options.table:
        write_table(ROOT)
        return 0
    kind, device = ("cpu", "cpu") if options.smoke else machine()
    if kind != "gpu" and not options.smoke:
        console.print("no GPU here: nothing is measured; --smoke tries it all on the CPU")
        return 1
    group = SMOKE if options.smoke else GPU
    cases = [case for case in CASES if (case.name in options.case if options.case else case.group == group)]
    path = results_path(device, datetime.date.today().isoformat())
    found = begin(path, device, resume=options.resume, cpu=options.smoke)
    console.print(f"ceilings: {found['ceilings']}")
    measured = {row["case"] for row in found["cases"] if row["ratio"] is not None}
    for case in cases:
        if case.name in measured and not options.parts:
            continue
        if options.parts:
            rows, status = lines_of("bench.gpu.parts", [case.name], cpu=options.smoke)
            found.setdefault("parts", {})[case.name] = {"status": status, "parts": rows}
            console.print(case.name, status, rows)
        else:
            row = measure(case, cpu=options.smoke)
            found["cases"] = [one for one in found["cases"] if one["case"] != case.name] + [row]
            console.print(console_table([row], found["ceilings"]))
        if not options.smoke:
            save(path, found)
    if options.smoke:
        done = {row["case"]: row for row in found["cases"]}
        return 0 if options.parts or all(done[case.name]["ratio"] for case in cases) else 1
    write_table(ROOT)
    return 0 if all(row["ratio"] is not None for row in found["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
