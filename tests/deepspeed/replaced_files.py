"""Files that take the place of whatever is there."""

import shutil
from pathlib import Path


def clear(path: Path) -> None:
    """Nothing stands at the path afterwards; what it was linked to stays as it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path)
    path.write_bytes(content)
