"""Trains what a recipe asks for.

    python -m r1jax.train --config FILE [--key value ...] [--dry_run]

A key of the command line wins over the file's. --dry_run validates everything that needs no device, shows each value
with where it came from, and exits 0. --help lists every key.
"""

import logging
import os
import sys

import jax
from rich.console import Console

from r1jax import commands, config, progress, runtime
from r1jax.sharding.processes import initialize_processes, leave
from r1jax.training import agreement, preemption, watchdog

logger = logging.getLogger("r1jax.train")

_READS = "reading model and data"


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when the model is exported, or saved after a SIGTERM; 2 for what the user can mend, 1 for what
    fails in the run, 124 where it gets nowhere (training/watchdog.py).
    """
    return leave(commands.run(_train, sys.argv[1:] if argv is None else argv))


def _train(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        config.print_help(Console())
        return 0
    resolved = config.load(argv)
    if resolved.dry_run:
        config.print_resolved(resolved, Console())
        return 0
    run = resolved.config
    commands.configure_logging(run.run.log_level)
    config.warn_ignored(resolved)
    os.environ.update(resolved.env)
    runtime.configure(run.model.compute_dtype, deterministic=run.run.deterministic)
    with preemption.heeded() as handler:
        with preemption.joining(handler):
            initialize_processes()
        with watchdog.watching(run.run.ddp_timeout), agreement.others_named():
            _run(run)
    return 0


def _run(run: config.RunConfig) -> None:
    if jax.process_index() != 0:
        commands.configure_logging("warning")  # the first process speaks for all
    # Imported here: datasets and transformers read the environment, which `env:` may have set, when they are imported.
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # a log file wants lines
    if run.run.task == "grpo":
        from r1jax import grpo

        progress.report(_READS)
        grpo.run(run)
    else:
        from r1jax import sft

        progress.report(_READS)
        sft.run(run)


if __name__ == "__main__":
    sys.exit(main())
