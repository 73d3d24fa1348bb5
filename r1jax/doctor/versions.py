"""What is installed, beside what r1jax asks for."""

import importlib.metadata
import platform
import re
from collections.abc import Iterable, Mapping

from r1jax.doctor.findings import Finding

SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "datasets", "numpy")
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^\]]*\])?\s*(?:>=|~=|==)\s*([\d.]+)")


def check_versions() -> list[Finding]:
    """Python, the packages that matter and r1jax's own demands."""
    demands = importlib.metadata.requires("r1jax") or []
    versions = {name: version_of(name) for name in (*SHOWN, *lower_bounds(demands))}
    python = Finding("python", f"{platform.python_version()}, {platform.platform()}")
    return [python, *judge_versions(versions, lower_bounds(demands))]


def judge_versions(versions: Mapping[str, str | None], bounds: Mapping[str, str]) -> list[Finding]:
    """A line for all packages that are well, and one for each that is missing or too old."""
    bad = {
        name: bound
        for name, bound in bounds.items()
        if (version := versions.get(name)) is None or numbers(version) < numbers(bound)
    }
    if versions.get("jax") and numbers(versions["jax"] or "")[:3] != numbers(versions.get("jaxlib") or "")[:3]:
        bad.setdefault("jaxlib", versions["jax"] or "")
    shown = ", ".join(f"{name} {versions.get(name)}" for name in SHOWN if name not in bad and versions.get(name))
    return [
        Finding("packages", shown),
        *(
            Finding(name, versions.get(name) or "not installed", "bad", f"pip install '{name}>={bound}'")
            for name, bound in bad.items()
        ),
    ]


def lower_bounds(demands: Iterable[str]) -> dict[str, str]:
    """The oldest version that does, by package; extras are left out."""
    found = (_REQUIREMENT.match(demand) for demand in demands if "extra ==" not in demand)
    return {match[1]: match[2] for match in found if match}


def version_of(name: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The version's leading numbers: 535.104.05 is (535, 104, 5), 0.12.0.dev3 is (0, 12, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
