"""The TPU compiler takes our flags, and with them gathers weights while it multiplies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1jax.xla_flags import FLAGS

pytestmark = pytest.mark.aot
ROOT = Path(__file__).resolve().parents[2]

COMPILE = """
import jax
jax.config.update("jax_platforms", "cpu")
from tests.aot import steps
print(steps.compile_step(steps.layout_of({"mesh_fsdp": 8}, 3, 8)).text.count("async_collective_fusion"))
"""


def compile_with(*flags: str) -> subprocess.CompletedProcess[str]:
    """What a process says that compiles the step of ZeRO-3 for eight TPU v5e."""
    return subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "LIBTPU_INIT_ARGS": " ".join(flags)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_weights_are_gathered_beside_products():
    """By default: should a newer compiler need a flag for it, the table gets one."""
    ours = compile_with(*map(str, FLAGS["tpu"]))
    assert ours.returncode == 0, ours.stderr
    assert int(ours.stdout) > 50
    off = compile_with("--xla_enable_async_all_gather=false")
    assert int(off.stdout) == 0


def test_libtpu_ends_a_process_for_an_unknown_flag():
    done = compile_with("--xla_tpu_no_such_flag=true")
    assert done.returncode != 0
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in done.stderr + done.stdout
