"""Nobody gets in without the key, nothing is read outside the private directory, nothing listens to the network."""

import re
import stat
from pathlib import Path

import httpx
import pytest

from tests.vllm.server import Server, listening

pytestmark = pytest.mark.vllm
OPEN = {"/health", "/ping", "/metrics"}


def test_every_route_but_health_and_metrics_wants_the_key(server: Server):
    with server.client() as client:
        routes = client.get("/openapi.json").json()["paths"]
    found = {(path, method) for path, methods in routes.items() for method in methods}
    assert len(found) > 30 and ("/collective_rpc", "post") in found and ("/v1/completions", "post") in found
    with server.client(key="x" * 40) as wrong, httpx.Client(base_url=server.url, timeout=60, trust_env=False) as none:
        for path, method in sorted(found | {("/docs", "get"), ("/openapi.json", "get"), ("/r1jax/weights/a", "put")}):
            filled = re.sub(r"\{[^}]*\}", "x", path)
            statuses = {client.request(method, filled).status_code for client in (wrong, none)}
            assert (statuses == {401}) == (path not in OPEN), (method, path, statuses)
        assert none.get("/metrics").status_code == 200
        assert none.options("/v1/completions").status_code == 401
        assert none.get("/health/../collective_rpc").status_code in (401, 404)


def test_the_key_is_in_a_private_file_and_nowhere_else(server: Server):
    assert stat.S_IMODE(server.key_file.stat().st_mode) == 0o600
    assert len(server.key) >= 32
    assert server.key not in server.log.read_text()
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert server.key.encode() not in arguments.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue


def test_weights_come_from_the_private_directory_alone(server: Server, tmp_path: Path, smollm2: Path):
    folder = Path(server.rpc("r1jax_state")["sync_dir"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "link.safetensors").symlink_to(smollm2 / "model.safetensors")
    names = [str(smollm2 / "model.safetensors"), "../x.safetensors", "../../etc/passwd", "link.safetensors", "", "/"]
    try:
        for name in names:
            for method, *rest in (("r1jax_prepare", 1), ("r1jax_digest",)):
                answer = server.rpc(method, name, *rest)
                assert not answer["ok"] and answer["error"].startswith("file: need a"), answer
    finally:
        (folder / "link.safetensors").unlink()
    with server.client() as client:
        for name in ("..%2Fa.safetensors", "%2Ftmp%2Fa.safetensors", "a"):
            answer = client.put(f"/r1jax/weights/{name}", content=b"x")
            assert answer.status_code == 400 and "need a plain name" in answer.json()["error"]
    assert list(folder.iterdir()) == []


def test_files_that_are_no_weights_change_nothing(server: Server):
    before = server.rpc("r1jax_state")
    with server.client() as client:
        assert client.put("/r1jax/weights/noise.safetensors", content=b"noise" * 100).status_code == 200
    answer = server.rpc("r1jax_prepare", "noise.safetensors", 1)
    assert not answer["ok"]
    assert not server.rpc("r1jax_prepare", "missing.safetensors", 1)["ok"]
    assert not server.rpc("r1jax_apply", 1)["ok"]
    after = server.rpc("r1jax_state")
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    (Path(after["sync_dir"]) / "noise.safetensors").unlink()


def test_nothing_listens_beyond_this_machine(server: Server):
    # 127.0.0.1 in the machine's byte order.
    assert listening(server.process.pid) == {"0100007F"}
