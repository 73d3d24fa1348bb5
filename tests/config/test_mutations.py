"""Recipes changed at random: each is either valid or refused in one line that names the field, never a traceback."""

import copy
import math
import random
import re
from pathlib import Path

import pytest
import yaml

from r1jax import train
from r1jax.config import schema

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs").rglob("*.yaml"))]
MUTATIONS = 500
PARTS = 10
VALUES = [
    None, True, False, 0, 1, -1, 2**70, 0.5, -0.5, 1e300, math.nan, math.inf, "", " ", "no", "1e-5", "x", "a/b", "[",
    "é", "null", "\n", [], ["x"], [None], [[1]], {}, {"x": 1}, {1: 2}, {"a": {"b": []}}, "0-3", "/no/such/file",
    "2026-01-01",
]  # fmt: skip


def change(recipe: dict, draw: random.Random) -> dict:
    """The recipe with up to three things changed, as people and merges change them."""
    changed = copy.deepcopy(recipe)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        names = list(changed) or ["task"]
        name, known = draw.choice(names), draw.choice(list(schema.keys()))
        kind = draw.randrange(7)
        if kind == 0:
            changed.pop(name, None)
        elif kind == 1:
            changed[name] = draw.choice(VALUES)
        elif kind in (2, 3):
            changed[known] = draw.choice(VALUES)
        elif kind == 4:
            at = draw.randrange(len(str(name)) + 1)
            changed[str(name)[:at] + draw.choice("_xS-. ") + str(name)[at:]] = changed.get(name)
        elif kind == 5:
            changed[name] = changed[draw.choice(names)] if names[0] in changed else None
        else:
            changed[name] = [changed.get(name)]
    return changed


def damage(text: str, draw: random.Random) -> bytes:
    """The file's bytes, sometimes cut off, indented wrongly, doubled, or with bytes that are no text."""
    kind = draw.randrange(20)
    data = text.encode()
    if kind == 0:
        return data[: draw.randrange(len(data) + 1)]
    if kind == 1:
        return data.replace(b"\n", b"\n\t", 1)
    if kind == 2:
        at = draw.randrange(len(data) + 1)
        return (
            data[:at]
            + draw.choice([b"\xff", b"\x00", b"{", b": :", b"&a *b", b"!!python/object:os.system x"])
            + data[at:]
        )
    if kind == 3:
        return data + data
    return data


@pytest.mark.parametrize("part", range(PARTS))
def test_changed_recipes(part: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(part)
    outcomes = {0: 0, 2: 0}
    for number in range(MUTATIONS // PARTS):
        recipe = change(draw.choice(RECIPES), draw)
        file = tmp_path / f"{number}.yaml"
        file.write_bytes(damage(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False), draw))
        code = train.main(["--config", str(file), "--dry_run"])
        shown = capsys.readouterr()
        assert code in outcomes, (file.read_bytes(), shown.err)
        outcomes[code] += 1
        if code == 2:
            lines = shown.err.splitlines()
            assert len(lines) == 1, (file.read_bytes(), shown.err)
            assert re.match(r".*\S: need .+, got .+; .+", lines[0]), (file.read_bytes(), lines[0])
        else:
            assert "learning_rate" in shown.out
    assert min(outcomes.values()) >= 2  # both ends are reached


def test_enough_of_them() -> None:
    assert MUTATIONS >= 500 and MUTATIONS % PARTS == 0 and RECIPES
