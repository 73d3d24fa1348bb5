"""The devices that JAX finds, and whether the compiler takes its flags."""

import collections
import os
import subprocess
import sys

import jax

from r1jax.doctor.findings import Finding, NoAnswer, within
from r1jax.doctor.nvidia import find_driver

_START_SECONDS = 120
"""More than the slowest start of a TPU slice; a driver that hangs takes for ever."""
GIB = 2**30


def check_flags() -> Finding:
    """Whether a process starts with XLA_FLAGS as they are now; XLA aborts for one that it does not know."""
    flags = os.environ.get("XLA_FLAGS", "")
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_START_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("XLA flags", f"a process with {flags!r} does not start", "bad", "unset XLA_FLAGS")
    if done.returncode == 0:
        return Finding("XLA flags", flags or "none")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Finding("XLA flags", last.partition("] ")[2] or last, "bad", "take the flag out of XLA_FLAGS")


def check_devices() -> Finding:
    """This process's own devices; with several processes all must call it."""
    try:
        devices = within(_START_SECONDS, jax.local_devices)
    except NoAnswer as error:
        return Finding("devices", str(error), "bad", "the driver hangs: nvidia-smi or the host's log says why")
    except (RuntimeError, AssertionError) as error:  # jax asserts that the platform it was told to use is there
        words = f"{jax.config.values['jax_platforms'] or 'JAX'} does not start: {str(error) or 'no such platform'}"
        return Finding(
            "devices", words.splitlines()[0], "bad", "JAX_PLATFORMS names what is not here, or the plugin does not fit"
        )
    kinds = collections.Counter(device.device_kind for device in devices)
    found = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        found += f", {limit / GIB:.0f} GiB each for JAX"
    if devices[0].platform == "cpu" and find_driver() and not jax.config.values["jax_platforms"]:
        return Finding(
            "devices", found, "bad", "there are NVIDIA GPUs that JAX does not see: pip install 'r1jax[cuda13]'"
        )
    return Finding("devices", found)


def check_even() -> list[Finding]:
    """Nothing when all processes have as many devices; JAX can hardly exchange anything between them otherwise."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) == 1:
        return []
    found = ", ".join(f"{count} with process {process}" for process, count in sorted(counts.items()))
    return [Finding("devices of all", found, "bad", "start the processes on hosts with as many devices each")]
