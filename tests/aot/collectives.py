"""The collectives of a compiled program, read from the text of its optimised HLO: kind, mesh axes, bytes, how often.

The TPU compiler hides some of them, which is undone here:
- a reduce-scatter is an all-reduce and a slice in a fusion of its own, called all-reduce-scatter;
- a collective that runs beside computation is cut into pieces, one a fusion, with one channel and one chain id;
- a reduce-scatter or all-gather that runs beside one matrix product becomes a loop of collective-permutes over a ring,
  called windowed_dot_general_body_rs or _ag.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?%([\w.-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLS = re.compile(r"(body|condition|calls|to_apply)=%([\w.-]+)")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")

Groups = frozenset[frozenset[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of the program, all pieces of it."""

    kind: str
    """One of KINDS."""
    axes: tuple[str, ...]
    """The mesh axes over which devices exchange data."""
    shapes: tuple[str, ...]
    """The arrays before they are scattered or after they are gathered, as "bf16[512,256]"."""
    times: int
    """How often it runs in a call of the program: the turns of the loops it stands in."""
    depth: int
    """In how many loops it stands."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays, once."""
        return sum(map(bytes_of, self.shapes))

    @property
    def total_bytes(self) -> int:
        """Bytes of the arrays in a call of the program."""
        return self.times * self.num_bytes


def bytes_of(shape: str) -> int:
    """The bytes of an array written as "bf16[512,256]"."""
    dtype, dims = shape.rstrip("]").split("[")
    return ITEM_BYTES[dtype] * math.prod(map(int, filter(None, dims.split(","))))


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Every collective of the optimised HLO of a program compiled for the mesh."""
    bodies = _computations(text)
    loops = _loops(bodies)
    found: dict[tuple[str, ...], Collective] = {}
    for computation, line, match in _collective_lines(bodies):
        name, result, kind, start = match.groups()
        if start:
            raise ValueError(f"{name}: a form that this reader does not know: {kind}{start}")
        key, size = (computation, name), 1
        if chain := re.search(r'channel_id=(\d+).*chain_id="(\d+)"', line):
            key = (kind, *chain.groups())
        if computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            size = len(next(iter(_groups(line))))
        turns = loops[computation]
        if ring := re.search(r"windowed_dot_general_body_(rs|ag)", computation):
            kind, size = {"rs": "reduce-scatter", "ag": "all-gather"}[ring[1]], mesh.size
            key, turns = (computation,), turns[:-1]
        axes = _axes(line, mesh)
        if ring:
            size = math.prod(mesh.shape[axis] for axis in axes)
        found[key] = Collective(
            kind=kind, axes=axes, shapes=_shapes(result, size), times=math.prod(turns), depth=len(turns)
        )
    return list(found.values())


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation, by name; the entry is called ""."""
    bodies: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = "" if line.startswith("ENTRY") else match[1]
            bodies[name] = []
        elif name is not None:
            bodies[name].append(line)
    return bodies


def _collective_lines(bodies: dict[str, list[str]]) -> Iterator[tuple[str, str, re.Match[str]]]:
    for computation, lines in bodies.items():
        for line in lines:
            if match := _COLLECTIVE.match(line):
                yield computation, line, match


def _loops(bodies: dict[str, list[str]]) -> dict[str, tuple[int, ...]]:
    """The turns of the loops around each computation that the entry reaches, outermost first."""
    found: dict[str, tuple[int, ...]] = {"": ()}
    waiting = [""]
    while waiting:
        name = waiting.pop()
        for line in bodies[name]:
            calls = dict(_CALLS.findall(line))
            for role, called in calls.items():
                inside = (_turns(bodies[calls["condition"]]),) if role == "body" else ()
                if called in bodies and called not in found:
                    found[called] = (*found[name], *inside)
                    waiting.append(called)
    return found


def _turns(condition: list[str]) -> int:
    """The bound that the loop's counter is compared with; counters start at 0 and rise by 1."""
    bounds = [int(match[1]) for line in condition if (match := re.search(r" constant\((\d+)\)", line))]
    if len(bounds) != 1:
        raise ValueError(f"a loop whose turns this reader cannot count: {condition}")
    return bounds[0]


def _shapes(result: str, size: int) -> tuple[str, ...]:
    """The arrays of an HLO type without layouts; `size` parts of each, where it is not 1, as a first dimension."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", result))
    return tuple(f"{dtype}[{dims}]" if size == 1 else f"{dtype}[{size},{dims}]" for dtype, dims in arrays)


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _groups(line: str) -> Groups:
    """Which devices exchange data, by their place in the mesh; a ring's neighbours are pairs."""
    if match := _MESH_GROUPS.search(line):
        names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", match[1]), strict=True)
        sizes = [int(size) for size in sizes]
        ids = _iota(_ints(match[2]) if match[2] else sizes, match[3]).reshape(sizes)
        inner = [names.index(name) for name in re.findall(r"'(\w+)'", match[4])]
        last = range(len(sizes) - len(inner), len(sizes))
        rows = np.moveaxis(ids, inner, last).reshape(-1, math.prod(sizes[axis] for axis in inner))
    elif match := _IOTA_GROUPS.search(line):
        rows = _iota(_ints(match[2]), match[3]).reshape(_ints(match[1]))
    elif match := _LISTED_GROUPS.search(line):
        rows = [_ints(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    else:
        raise ValueError(f"groups of devices in a form that this reader does not know: {line[:300]}")
    return frozenset(frozenset(map(int, row)) for row in rows)


def _iota(shape: list[int], permutation: str | None) -> np.ndarray:
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_ints(permutation)) if permutation else ids


def _axes(line: str, mesh: Mesh) -> tuple[str, ...]:
    """The fewest mesh axes whose groups are those of the line, or contain the pairs of a ring."""
    groups = _groups(line)
    wide = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    for count in range(1, len(wide) + 1):
        for axes in itertools.combinations(wide, count):
            inner = [mesh.axis_names.index(axis) for axis in axes]
            rows = np.moveaxis(places, inner, range(-count, 0)).reshape(
                -1, math.prod(mesh.shape[axis] for axis in axes)
            )
            candidates = [set(map(int, row)) for row in rows]
            if "source_target_pairs" in line:
                if all(any(group <= candidate for candidate in candidates) for group in groups):
                    return axes
            elif groups == frozenset(map(frozenset, candidates)):
                return axes
    raise ValueError(f"groups that are no mesh axes: {line[:300]}")
