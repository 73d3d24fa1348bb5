import pytest

from r1jax.doctor.nvidia import driver_in, judge_nvidia

MODULE = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (dvs-builder@U16-I3)
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\n"


@pytest.mark.parametrize(
    ("text", "version"), [(MODULE, "550.54.15"), (CLOSED, "470.82.01"), ("580.65\n580.65\n", "580.65"), ("", None)]
)
def test_the_drivers_version(text: str, version: str | None):
    assert driver_in(text) == version


@pytest.mark.parametrize(
    ("driver", "plugins", "jaxlib", "verdict", "words"),
    [
        (None, {}, "0.10.2", "ok", "not a machine with NVIDIA GPUs"),
        (None, {12: "0.10.2"}, "0.10.2", "warn", "install a driver"),
        (
            driver_in(CLOSED),
            {12: "0.10.2"},
            "0.10.2",
            "bad",
            "install a driver of at least 525.60.13: no JAX runs on it",
        ),
        ("525.60.11", {12: "0.10.2"}, "0.10.2", "bad", "install a driver of at least 525.60.13"),
        ("525.60.13", {12: "0.10.2"}, "0.10.2", "ok", ""),
        (driver_in(MODULE), {12: "0.10.2"}, "0.10.2", "ok", ""),
        (driver_in(MODULE), {13: "0.10.2"}, "0.10.2", "bad", "at least 580, or pip install 'r1jax[cuda12]'"),
        ("580.65", {13: "0.10.2"}, "0.10.2", "ok", ""),
        ("580.65", {12: "0.10.2"}, "0.10.2", "ok", ""),
        ("580.65", {}, "0.10.2", "bad", "pip install 'r1jax[cuda13]'"),
        ("550.54", {}, "0.10.2", "bad", "pip install 'r1jax[cuda12]'"),
        ("580.65", {13: "0.10.1"}, "0.10.2", "bad", "pip install 'jax[cuda13]==0.10.2'"),
        ("580.65", {13: "0.10.2", 12: "0.10.2"}, "0.10.2", "bad", "uninstall all but that of CUDA 13"),
    ],
)
def test_driver_and_plugin(driver: str | None, plugins: dict[int, str], jaxlib: str, verdict: str, words: str):
    (finding,) = judge_nvidia(driver, plugins, jaxlib)
    assert finding.verdict == verdict
    assert words in f"{finding.found} {finding.advice}"
    assert bool(finding.advice) == (verdict != "ok")
