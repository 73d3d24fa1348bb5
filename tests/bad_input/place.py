"""A run that would work, for a mistake to be made in it; and what a refusal must look like."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1jax import train
from tests.tiny import sums, write_rows

Mistake = Callable[["Place"], object]


@dataclasses.dataclass(kw_only=True)
class Place:
    """A folder with a model, rows and the recipe of a run of one step."""

    folder: Path
    keys: dict[str, Any]
    words: list[str]
    """The command line."""

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def rows(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def config(self) -> Path:
        return self.folder / "recipe.yaml"

    def set(self, **keys: Any) -> None:
        """Changes keys of the recipe."""
        self.keys |= keys

    def unset(self, *names: str) -> None:
        """Takes keys out of the recipe."""
        for name in names:
            del self.keys[name]

    def say(self, *words: str) -> None:
        """Adds to the command line."""
        self.words += words

    def command(self, *words: str) -> None:
        """The whole command line."""
        self.words = list(words)

    def write_config(self, content: str | bytes) -> None:
        """What the recipe's file holds instead."""
        self.config.write_bytes(content if isinstance(content, bytes) else content.encode())

    def write_rows(self, *rows: Any, file: str = "train.jsonl") -> str:
        """The file's name, with these rows."""
        return str(write_rows(self.folder / file, rows))

    def link(self, name: str, target: str) -> None:
        """A symbolic link in the folder."""
        (self.folder / name).symlink_to(target)

    def edit_json(self, file: str, **changes: Any) -> None:
        """Changes entries of a JSON file of the model; None takes one out."""
        path = self.model / file
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def remove(self, pattern: str) -> None:
        """Removes files of the model."""
        found = list(self.model.glob(pattern))
        assert found, pattern
        for path in found:
            path.unlink()

    def everything(self) -> dict[str, bytes | None]:
        """What lies in the folder, folders too."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.folder.rglob("*"))
        }


def make_place(folder: Path, model: Path) -> Place:
    """A place with a copy of the model."""
    shutil.copytree(model, folder / "model")
    write_rows(folder / "train.jsonl", sums(16))
    keys = {
        "model_name_or_path": str(folder / "model"), "dataset_train_file": str(folder / "train.jsonl"),
        "output_dir": str(folder / "out"), "max_steps": 1, "per_device_train_batch_size": 1, "max_length": 64,
        "packing": True, "report_to": "none", "save_strategy": "no", "log_level": "error",
    }  # fmt: skip
    return Place(folder=folder, keys=keys, words=["--config", str(folder / "recipe.yaml")])


def assert_refused(place: Place, field: str, words: str, mistake: Mistake, capsys: pytest.CaptureFixture[str]) -> None:
    """Makes the mistake and runs the command: exit code 2, one line that names the field, and nothing written."""
    mistake(place)
    if not place.config.exists():
        place.write_config(yaml.safe_dump(place.keys, sort_keys=False))
    before = place.everything()
    capsys.readouterr()
    code = train.main(place.words)
    shown = capsys.readouterr()
    assert code == 2, shown.err
    assert_one_line(shown.err, field, words)
    assert place.everything() == before


def assert_one_line(text: str, field: str, words: str) -> None:
    """The text is `field: need ..., got ...; ...` and says these words."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert re.fullmatch(rf"{re.escape(field)}: need .+, got .+; .+", lines[0]), lines[0]
    assert words in lines[0], lines[0]
