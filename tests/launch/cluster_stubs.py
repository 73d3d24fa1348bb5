"""Programs that stand in for a cluster's: they write down how they were called, and do what a test needs of them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

RECORD = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""

# As the real ones: scontrol spells a list of hosts out, srun sets a step's variables for each of its tasks, passes TERM
# on, and ends with the highest exit code of a task.
SCONTROL = (
    RECORD
    + """
if sys.argv[1] == "show":
    print("\\n".join(os.environ["STUB_HOSTS"].split()))
"""
)
SRUN = (
    RECORD
    + """
import signal, subprocess
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
step = {"SLURM_STEP_NUM_TASKS": options["ntasks"], "SLURM_STEP_NODELIST": options["nodelist"]}
tasks = [
    subprocess.Popen(command, env={**os.environ, **step, "SLURM_PROCID": str(task), "SLURM_LOCALID": "0"})
    for task in range(int(options["ntasks"]))
]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
)
# What is trained with: says its place among the processes, then does as the test says.
PYTHON = (
    RECORD
    + f"""
import signal, time
sys.path.insert(0, {str(ROOT)!r})
from r1jax.sharding.environment import find_processes
found = find_processes(os.environ)
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(["place", found and [found.coordinator, found.num_processes, found.process_id]]) + "\\n")
if os.environ.get("STUB_WAITS"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    open(os.environ["STUB_WAITS"], "w").close()
    time.sleep(60)
sys.exit(int(os.environ.get("STUB_CODE", "0")))
"""
)


def install(folder: Path, **programs: str) -> Path:
    """The folder, with these programs in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in programs.items():
        file = folder / name
        file.write_text(text)
        file.chmod(0o755)
    return folder


def environment(programs: Path, record: Path, **more: str) -> dict[str, str]:
    """This process's, without what a cluster would set, with the programs first on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_", "XLA_", "HF_"))}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "RECORD": str(record), "PYTHON": str(programs / "python-stub"), **more}


def recorded(record: Path) -> list[list[Any]]:
    """The calls in the order in which they were written down."""
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def run(command: list[str], environ: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """What the command says."""
    return subprocess.run(command, env=dict(environ), cwd=cwd, capture_output=True, text=True, timeout=60)
