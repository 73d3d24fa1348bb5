"""The frame of the tables of keys: where each key shows, and what an observer has seen of a recipe."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent

Observer = Callable[[Mapping[str, Any]], Any]
"""From a recipe to what is seen of it at one place, in values that can be compared."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Where a key shows, and two values of it: `before` None leaves it as the recipe has it."""

    observer: Observer
    value: Any
    beside: dict[str, Any]
    before: Any = None

    def changes(self, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the recipe gets before and after the key is changed."""
        return self.beside | ({} if self.before is None else {key: self.before}), self.beside | {key: self.value}


def at(observer: Observer, value: Any, before: Any = None, **beside: Any) -> Case:
    """{folder} in a text stands for the folder with models and rows."""
    return Case(observer, value, beside, before)


_numbers: dict[str, int] = {}


def look(observer: Observer, recipe: Mapping[str, Any]) -> Any:
    """What the observer sees, once for each recipe."""
    text = json.dumps(recipe, sort_keys=True)
    return _observed(observer, text, _numbers.setdefault(text, len(_numbers)))


def look_again(observer: Observer, recipe: Mapping[str, Any]) -> Any:
    """What the observer sees of it in another folder."""
    return _observed(observer, json.dumps(recipe, sort_keys=True), -1)


def forget() -> None:
    """Drops what was seen, when the folder goes."""
    _observed.cache_clear()


@functools.cache
def _observed(observer: Observer, text: str, number: int) -> Any:
    recipe = json.loads(text)
    beside = recipe.get("output_dir", f"{recipe['model_name_or_path']}-out")
    return observer(recipe | {"output_dir": f"{beside}-{number}"})


def assert_named(elsewhere: str) -> None:
    """Fails where the sentence does not end with FILE::TEST of a test that is there."""
    found = re.search(r"([\w/]+\.py)::(\w+)$", elsewhere)
    assert found, elsewhere
    assert f"def {found[2]}(" in (TESTS / found[1]).read_text()
