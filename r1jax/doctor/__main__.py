"""Looks at this machine, and at the others of a run, and says what to change before training.

    python -m r1jax.doctor [--output_dir DIR] [--vllm_python PATH] [--json]

With the variables of several processes (docs/launch.md) it is started on all of them, as a run is: each says which
devices it has, and the first prints the table: all that it found, and of the others what is not well. The exit code
is 1 when anything is bad. It writes 64 MiB into --output_dir and into the cache (R1JAX_CACHE), and removes them again.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console

from r1jax import commands, runtime
from r1jax.data.array_folder import VARIABLE
from r1jax.doctor import devices, processes
from r1jax.doctor.findings import Finding, as_json, as_table, is_bad
from r1jax.doctor.folders import check_folder
from r1jax.doctor.machine import check_machine
from r1jax.doctor.nvidia import check_nvidia
from r1jax.doctor.versions import check_versions
from r1jax.doctor.vllm import check_vllm
from r1jax.experience.exchange import all_gathered
from r1jax.sharding.processes import leave

# What is looked at without the other processes.
ALONE: tuple[Callable[[], list[Finding]], ...] = (check_versions, check_nvidia, check_machine)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when nothing is bad."""
    return leave(commands.run(_examine, sys.argv[1:] if argv is None else argv))


def _examine(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=160)
    folders = {"output_dir": Path(args.output_dir)} if args.output_dir else {}
    cache = Path(os.environ.get(VARIABLE) or "~/.cache/r1jax").expanduser()
    runtime.configure("bfloat16")
    findings = processes.check_environment(os.environ)
    for check in (*ALONE, functools.partial(check_vllm, args.vllm_python)):
        findings += check()
    for name, folder in {**folders, VARIABLE: cache}.items():
        findings += check_folder(name, folder)
    findings.append(devices.check_flags())
    # With flags that abort a process, or variables that make no sense, nobody asks for devices.
    if "bad" not in (findings[0].verdict, findings[-1].verdict):
        joined = processes.join()
        several = jax.distributed.is_initialized()  # a TPU VM's workers know each other without variables
        if several or joined.verdict == "bad":
            findings.append(joined)
        if joined.verdict == "ok":
            findings.append(devices.check_devices())
            if several and findings[-1].verdict == "ok":
                return _together(console, findings, folders, args.json)
    return _show(console, findings, args.json)


def _together(console: Console, mine: list[Finding], folders: dict[str, Path], json: bool) -> int:
    """What the processes see of each other, and all their findings."""
    if not json:
        console.print(f"process {processes.label()}, of {jax.process_count()}: {mine[-1].found}")
    if uneven := devices.check_even():
        jax.distributed.shutdown()
        return _show(console, [*mine, *uneven], json)
    shared = processes.check_clocks()
    for name, folder in folders.items():
        shared += processes.check_same_folder(name, folder)
    findings = [*_gathered(mine), *shared]
    code = _show(console, findings, json) if jax.process_index() == 0 else int(is_bad(findings))
    jax.distributed.shutdown()  # together: a process that left alone would have the others aborted
    return code


def _gathered(mine: list[Finding]) -> list[Finding]:
    """What the first process found, and of the others what is not well."""
    return [
        dataclasses.replace(finding, where=where)
        for number, (where, theirs) in enumerate(all_gathered((processes.label(), mine)))
        for finding in theirs
        if number == 0 or finding.verdict != "ok"
    ]


def _show(console: Console, findings: list[Finding], json: bool) -> int:
    """The exit code, once the findings are printed."""
    if json:
        console.out(as_json(findings))
    else:
        console.print(as_table(findings))
    return int(is_bad(findings))


def _parser() -> commands.ArgumentParser:
    parser = commands.ArgumentParser(prog="python -m r1jax.doctor", description=__doc__ or "")
    parser.add_argument("--output_dir", help="a run's folder, to see whether it can hold checkpoints")
    parser.add_argument(
        "--vllm_python", help="the interpreter with vLLM (default: $PYTHON, .venv-vllm/bin/python, or this one)"
    )
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
