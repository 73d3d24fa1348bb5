"""The real server, started as a user starts it."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 400
OPTIONS = ("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "32", "--enforce-eager")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
    url: str
    key_file: Path
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def key(self) -> str:
        return self.key_file.read_text().strip()

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def rpc(self, method: str, *args: object) -> dict:
        with self.client() as client:
            answer = client.post("/collective_rpc", json={"method": method, "args": list(args)})
        assert answer.status_code == 200, answer.text
        return answer.json()["results"][0]


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def environment(folder: Path) -> dict[str, str]:
    """What the script is started with: an environment with vLLM, and a key file that does not exist yet."""
    python = os.environ.get("R1JAX_VLLM_PYTHON") or str(ROOT / ".venv-vllm" / "bin" / "python")
    own = {"PYTHON": python, "R1JAX_VLLM_KEY_FILE": str(folder / "made" / "key"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    rest = {name: value for name, value in os.environ.items() if name not in ("R1JAX_VLLM_KEY", "PYTHONPATH")}
    return {**rest, **own, "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def serving(model: Path, folder: Path, *options: str, port: int | None = None) -> Iterator[Server]:
    """A server of the model that answers; it is gone afterwards."""
    port, log = port or free_port(), folder / "server.log"
    command = [str(ROOT / "launch" / "vllm_server.sh"), str(model), "--port", str(port), *OPTIONS, *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment(folder), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(url=f"http://127.0.0.1:{port}", key_file=folder / "made" / "key", log=log, process=process)
    try:
        _wait(server)
        yield server
    finally:
        process.send_signal(signal.SIGCONT)  # one that a test has stopped hears nothing else
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.process.poll() is None, "\n".join(server.log.read_text().splitlines()[-30:])
        try:
            if httpx.get(server.url + "/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise AssertionError(f"no answer in {START_SECONDS} s:\n" + "\n".join(server.log.read_text().splitlines()[-30:]))


def family(process: int) -> set[int]:
    """The process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, rest = set(), [process]
    while rest:
        found.add(one := rest.pop())
        rest += parents.get(one, [])
    return found


def listening(process: int) -> set[str]:
    """The addresses (hexadecimal, as /proc has them) on which the process or a descendant listens."""
    inodes = set()
    for pid in family(process):
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if (target := os.readlink(link)).startswith("socket:["):
                    inodes.add(target[8:-1])
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}
