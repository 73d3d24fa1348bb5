"""Whether NVIDIA's driver and JAX's CUDA plugin fit each other."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from r1jax.doctor.findings import Finding
from r1jax.doctor.versions import numbers, version_of

# The oldest Linux driver by CUDA's major version. https://docs.jax.dev/en/latest/installation.html (525 and 580) and
# https://docs.nvidia.com/cuda/cuda-toolkit-release-notes (minor-version compatibility).
OLDEST_DRIVER = {13: "580", 12: "525.60.13"}
_SMI_SECONDS = 20


def check_nvidia() -> list[Finding]:
    """The driver, the plugin, and what of them does not fit."""
    return judge_nvidia(find_driver(), find_plugins(), version_of("jaxlib") or "")


def find_plugins() -> dict[int, str]:
    """The versions of JAX's CUDA plugins that are installed, by CUDA's major version."""
    return {major: version for major in OLDEST_DRIVER if (version := version_of(f"jax-cuda{major}-plugin"))}


def judge_nvidia(driver: str | None, plugins: Mapping[int, str], jaxlib: str) -> list[Finding]:
    """What there is to say of a driver's version (None: no driver) and of plugins by CUDA's major version."""
    if driver is None:
        if not plugins:
            return [Finding("NVIDIA", "no driver and no CUDA plugin: not a machine with NVIDIA GPUs")]
        names = ", ".join(f"jax-cuda{major}-plugin" for major in plugins)
        return [Finding("NVIDIA", f"no driver, but {names}", "warn", "install a driver, or JAX's CPU or TPU wheels")]
    fitting = next((major for major, oldest in OLDEST_DRIVER.items() if numbers(driver) >= numbers(oldest)), None)
    if fitting is None:
        oldest = OLDEST_DRIVER[min(OLDEST_DRIVER)]
        return [Finding("NVIDIA driver", driver, "bad", f"install a driver of at least {oldest}: no JAX runs on it")]
    if not plugins:
        return [Finding("CUDA plugin", f"none, driver {driver}", "bad", f"pip install 'r1jax[cuda{fitting}]'")]
    if len(plugins) > 1:
        names = ", ".join(f"jax-cuda{major}-plugin {version}" for major, version in plugins.items())
        return [Finding("CUDA plugin", names, "bad", f"uninstall all but that of CUDA {fitting}: both would start")]
    ((major, version),) = plugins.items()
    found = f"driver {driver}, jax-cuda{major}-plugin {version}, jaxlib {jaxlib}"
    if major > fitting:
        advice = f"install a driver of at least {OLDEST_DRIVER[major]}, or pip install 'r1jax[cuda{fitting}]'"
        return [Finding("CUDA", found, "bad", advice)]
    if numbers(version)[:3] != numbers(jaxlib)[:3]:
        return [
            Finding("CUDA", found, "bad", f"pip install 'jax[cuda{major}]=={jaxlib}': plugin and jaxlib go together")
        ]
    return [Finding("CUDA", found)]


def find_driver() -> str | None:
    """The version of the loaded driver, None where there is none."""
    file = Path("/proc/driver/nvidia/version")
    if file.exists():
        return driver_in(file.read_text())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return driver_in(answer.stdout)


def driver_in(text: str) -> str | None:
    """The first version in the words of the kernel module or of nvidia-smi, such as 550.54.15."""
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None
