"""Prints the tables of docs/zero.md: memory and collectives of each ZeRO stage, as the TPU compiler plans them.

make aot-table
"""

import importlib.metadata
import sys

import jax

from tests.aot.collectives import collectives
from tests.aot.steps import Compiled, compile_step, layout_of

CASES = [
    *[({"mesh_fsdp": 8}, 8, stage) for stage in range(4)],
    *[({"mesh_fsdp": 32}, 32, stage) for stage in range(4)],
    ({"mesh_data": 4, "mesh_fsdp": 8}, 32, 3),
    ({"mesh_fsdp": 4, "mesh_tensor": 2}, 8, 3),
]
PLACES = ("once a step", "each micro-batch", "each layer")
SMALL = 2**16
"""Bytes of a collective that is left out: norm scales and scalars."""


def mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def exchanged(step: Compiled) -> dict[tuple[int, str, str], tuple[int, int]]:
    """(number of arrays, their bytes in a whole step) by place, kind and axes."""
    sums: dict[tuple[int, str, str], tuple[int, int]] = {}
    for one in collectives(step.text, step.mesh):
        if one.num_bytes >= SMALL:
            key = (one.depth, one.kind, " x ".join(one.axes))
            count, size = sums.get(key, (0, 0))
            sums[key] = (count + len(one.shapes), size + one.total_bytes)
    return sums


def main() -> None:
    """The two tables in Markdown on stdout."""
    jax.config.update("jax_platforms", "cpu")
    memory = ["| mesh | stage | state and batch | temporary |", "|---|---|---|---|"]
    traffic = ["| mesh | stage | when | collective | axes | MiB a step |", "|---|---|---|---|---|---|"]
    for keys, num_devices, stage in CASES:
        step = compile_step(layout_of(keys, stage, num_devices))
        name = f"{' x '.join(f'{axis[5:]} {size}' for axis, size in keys.items())} | {stage}"
        memory.append(f"| {name} | {mib(step.argument_bytes)} | {mib(step.temporary_bytes)} |")
        for (depth, kind, axes), (_, size) in sorted(exchanged(step).items(), reverse=True):
            traffic.append(f"| {name} | {PLACES[depth]} | {kind} | {axes} | {mib(size)} |")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "libtpu"))
    sys.stdout.write("\n".join([versions, "", *memory, "", *traffic, ""]))


if __name__ == "__main__":
    main()
