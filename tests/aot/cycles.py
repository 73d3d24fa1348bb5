"""What the TPU compiler expects the parts of a program to take: its own estimates, summed by the names in the code.

Nothing runs. The estimates stand in the text of the compiled program, in cycles of one operation; a loop's body counts
as often as the loop goes round. Pallas kernels have none, and of two operations that run side by side both count.
"""

import re
from collections import Counter
from typing import NamedTuple

PARTS = ("attention", "mlp", "vocabulary", "sampling", "optimizer")
"""The `jax.named_scope`s of r1jax, of which the innermost counts; what is under none of them is "other"."""
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LOOP = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"calls=%([\w.\-]+)")
_PART = re.compile(rf"\b({'|'.join(PARTS)})\b")
_NUMBER = re.compile(r"s32\[\]\S* constant\((\d+)\)")


class Work(NamedTuple):
    """A part's operations of a kind."""

    part: str
    is_product: bool
    """Matrix products, with what is fused into them."""


class Program:
    """An optimised program's text, by computation."""

    def __init__(self, text: str) -> None:
        self._lines: dict[str, list[str]] = {}
        current: list[str] = []
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self._lines[found[2]] = []
                if found[1]:
                    self._entry = found[2]
            else:
                current.append(line)

    def cycles(self) -> Counter[Work]:
        """Estimated cycles by part; raises ValueError where nobody can say how often a loop goes round."""
        found: Counter[Work] = Counter()
        self._add(self._entry, 1, found)
        return found

    def _add(self, computation: str, times: int, found: Counter[Work]) -> None:
        for line in self._lines[computation]:
            if loop := _LOOP.search(line):
                self._add(loop[2], times * self._rounds(loop[1]), found)
            elif cycles := _CYCLES.search(line):
                named = _NAME.search(line)
                found[_work(named[1] if named else "")] += times * int(cycles[1])

    def _rounds(self, condition: str) -> int:
        """What the loop's counter, which starts at 0, is compared with."""
        text = "\n".join(self._lines[condition])
        text += "".join("\n".join(self._lines[called]) for called in _CALLED.findall(text))
        numbers = {int(number) for number in _NUMBER.findall(text)}
        if len(numbers) != 1:
            raise ValueError(f"{condition}: rounds among {numbers}")
        return numbers.pop()


def _work(name: str) -> Work:
    parts = _PART.findall(name)
    return Work(parts[-1] if parts else "other", name.endswith("dot_general"))
