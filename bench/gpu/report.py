"""The tables of what was measured: on the console, and between two marks of docs/performance.md."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from r1jax.models.flops import peak_flops

Row = dict[str, Any]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TITLES = ("case", "tokens/s", "of the bound", "torch tokens/s", "ratio", "peak GiB", "compile s", "settings", "status")


def share(row: Row, side: str, ceilings: Row) -> str:
    """An update's causal MFU of the datasheet's peak; of a decode the bytes read of those that the copy moved."""
    found = row[side]["best"]
    if not found:
        return "-"
    if "bytes_per_token" in row:
        moved = row["bytes_per_token"] * found["tokens_per_second"]
        bound = ceilings.get("read_bytes_per_second")
        return f"{moved / bound:.1%} of memory" if bound else "-"
    peak = peak_flops(ceilings.get("device_kind", ""))
    return f"{row['flops_per_token'] * found['tokens_per_second'] / peak:.1%} MFU" if peak else "-"


def cells(row: Row, ceilings: Row) -> list[str]:
    """A case's line; what was not measured is a dash."""
    ours, theirs = row["r1jax"]["best"], row["torch"]["best"]

    def both(key: str, unit: float, form: str) -> str:
        found = [side.get(key) if side else None for side in (ours, theirs)]
        return " / ".join("-" if value is None else format(value / unit, form) for value in found)

    settings = ", ".join(str(value) for value in (ours or {}).get("setting", {}).values() if value)
    peer = ", ".join(f"{key} {value}" for key, value in (theirs or {}).get("setting", {}).items())
    status = "; ".join(f"{side} {row[side]['status']}" for side in ("r1jax", "torch") if row[side]["status"] != "ok")
    return [
        row["case"],
        f"{ours['tokens_per_second']:,.0f}" if ours else "-",
        share(row, "r1jax", ceilings),
        f"{theirs['tokens_per_second']:,.0f} ({share(row, 'torch', ceilings)})" if theirs else "-",
        f"{row['ratio']:.2f}" if row["ratio"] else "-",
        both("peak_memory_bytes", 2**30, ".1f"),
        f"{ours['compile_seconds']:.0f}" if ours else "-",
        f"{settings} / {peer}",
        status or "ok",
    ]


def console_table(rows: list[Row], ceilings: Row) -> Table:
    """For a terminal."""
    table = Table(*TITLES)
    for row in rows:
        table.add_row(*cells(row, ceilings))
    return table


def markdown(results: list[Row]) -> str:
    """A table a file, newest last."""
    parts = []
    for found in results:
        limits = found["ceilings"]
        about = ", ".join(
            f"{name} {value / 1e12:,.1f} T" for name, value in limits.items() if isinstance(value, int | float)
        )
        parts.append(
            f"**{found['device']}**, {found['date']}, commit {found['commit']}, Python {found['python']}; {about}"
        )
        lines = ["| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES)]
        lines += ["| " + " | ".join(cells(row, limits)) + " |" for row in found["cases"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Not measured on a GPU yet."


def write_table(root: Path) -> None:
    """docs/performance.md with the tables of all result files between the marks."""
    files = sorted((root / "bench" / "results").glob("*-20??-??-??.json"))
    page = root / "docs" / "performance.md"
    text = page.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    tables = markdown([json.loads(file.read_text()) for file in files])
    page.write_text(f"{head}{BEGIN}\n{tables}\n{END}{tail}")
