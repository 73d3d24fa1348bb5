"""Small programs under the launcher: what it does to processes needs no training to be seen."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
"""In which anything that is waited for happens, on a busy machine too."""

# As r1jax.launch does it, with other arguments than the trainer's and other limits.
_LAUNCHER = """
import json, signal, sys
from pathlib import Path
# The tests themselves may run in the background, under nohup: then these come ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from r1jax.launch.here import start_here
from r1jax.launch.hosts import read_hosts, start_on_hosts
from r1jax.launch.restarts import run
from r1jax.launch.supervision import Limits
given = json.loads(sys.argv[1])
hosts = read_hosts(given["hosts"]) if given["hosts"] else []
start = lambda words: start_on_hosts(hosts, words) if hosts else start_here(given["count"], words)
limits = Limits(**given["limits"])
folder = Path(given["folder"])
sys.exit(run(start, sys.argv[2:], max_restarts=given["restarts"], output_dir=folder, limits=limits))
"""

# What every program begins with. `me` is its number; `ready` is seen by the test once the program says so.
_BEGIN = """
import os, signal, sys, time
from pathlib import Path
me = int(os.environ["JAX_PROCESS_ID"])
def ready():
    Path(os.environ["FOLDER"], f"ready-{me}.tmp").write_text(str(os.getpid()))
    os.rename(Path(os.environ["FOLDER"], f"ready-{me}.tmp"), Path(os.environ["FOLDER"], f"ready-{me}"))
"""


def launch(
    folder: Path,
    program: str,
    *words: str,
    count: int = 2,
    restarts: int = 0,
    hosts: Path | None = None,
    environment: dict[str, str] | None = None,
    **limits: float,
) -> subprocess.Popen[str]:
    """The launcher with `count` of these programs; output_dir is the folder."""
    given = {
        "count": count, "restarts": restarts, "folder": str(folder), "limits": limits,
        "hosts": None if hosts is None else str(hosts),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, json.dumps(given), "-c", _BEGIN + program, *words],
        env={**os.environ, "FOLDER": str(folder), **(environment or {})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(launcher: subprocess.Popen[str]) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, lines of stderr)."""
    out, errors = launcher.communicate(timeout=SECONDS)
    return launcher.returncode, out.splitlines(), errors.splitlines()


def pids(folder: Path, count: int = 2) -> list[int]:
    """Of the programs, when all have said that they are ready."""
    return [int(wait_for((folder / f"ready-{number}").read_text)) for number in range(count)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(ask: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """The first answer that is true; an OSError is no answer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := ask():
                return found
        except OSError:
            pass
        time.sleep(0.02)
    raise AssertionError("waited in vain")
