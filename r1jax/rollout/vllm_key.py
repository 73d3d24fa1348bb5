"""The key that opens a vLLM server, from where `launch/vllm_server.sh` has it."""

import os
import stat
from pathlib import Path

from r1jax.config.errors import need

KEY = "R1JAX_VLLM_KEY"
KEY_FILE = "R1JAX_VLLM_KEY_FILE"


def read_key() -> str:
    """The environment's R1JAX_VLLM_KEY, else what stands in the key file; raises `UserError` where neither is."""
    if key := os.environ.get(KEY):
        return key
    path = Path(os.environ.get(KEY_FILE) or Path.home() / ".config" / "r1jax" / "vllm_key")
    if not path.is_file():
        advice = f"set {KEY} to the server's key, or start a server here, which makes the file"
        raise need(KEY, f"a key in the environment or in {path}", "neither", advice)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        mode = f"mode {stat.S_IMODE(path.stat().st_mode):04o}"
        raise need(KEY_FILE, f"{path} readable by you alone", mode, f"chmod 600 {path}")
    key = path.read_text().strip()
    if not key:
        raise need(KEY_FILE, f"a key in {path}", "an empty file", "remove it and start the server, which makes one")
    return key
