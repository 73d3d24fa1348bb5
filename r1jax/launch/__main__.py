"""Trains what a recipe asks for in several processes, watches them, and starts them again when one is lost.

    python -m r1jax.launch [--num_processes N | --hosts FILE] [--max_restarts R] CONFIG [--key value ...]

What stands from CONFIG on goes to `python -m r1jax.train --config`. With neither option it looks after one process and
leaves the environment as it is: so a Slurm task, a pod or a TPU worker is started.
"""

import argparse
import os
import sys
from pathlib import Path

from r1jax import commands, config
from r1jax.config.errors import at_least, need
from r1jax.launch.here import start_here, start_one
from r1jax.launch.hosts import read_hosts, start_on_hosts
from r1jax.launch.restarts import Start, run
from r1jax.launch.supervision import Limits
from r1jax.sharding.environment import find_processes


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when all processes ended so, else that of the one that was lost first; 128 + n for a signal."""
    return commands.run(_launch, sys.argv[1:] if argv is None else argv)


def _launch(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    start = _way_to_start(options)
    # What is wrong in the recipe is said once, not by each process.
    recipe = config.load(["--config", options.config, *options.words]).config
    return run(
        start,
        ["-m", "r1jax.train", "--config", options.config, *options.words],
        max_restarts=options.max_restarts,
        output_dir=Path(recipe.run.output_dir),
        limits=Limits(),
    )


def _way_to_start(options: argparse.Namespace) -> Start:
    """What starts the processes with the arguments given to it."""
    at_least("num_processes", options.num_processes, 1, "give the number of processes")
    at_least("max_restarts", options.max_restarts, 0, "0 starts once")
    if options.hosts is not None:
        if options.num_processes is not None:
            raise need(
                "num_processes", "nothing beside --hosts", str(options.num_processes), "the file has the numbers"
            )
        hosts = read_hosts(options.hosts)
        return lambda arguments: start_on_hosts(hosts, arguments)
    if options.num_processes is not None:
        return lambda arguments: start_here(options.num_processes, arguments)
    found = find_processes(os.environ)
    if found is not None and options.max_restarts:
        advice = f"let {found.source} start all {found.num_processes} processes again"
        raise need("max_restarts", "0 in one process of several", str(options.max_restarts), advice)
    return start_one


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser("python -m r1jax.launch", "Trains in several processes and watches them.")
    parser.add_argument("--num_processes", type=int, help="on this machine")
    parser.add_argument("--hosts", metavar="FILE", help="`[user@]host [processes]` a line; SSH is the command (ssh)")
    parser.add_argument("--max_restarts", type=int, default=0, help="from the newest checkpoint, when one is lost (0)")
    parser.add_argument("config", help="the recipe")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="go to r1jax.train")
    return parser


if __name__ == "__main__":
    sys.exit(main())
