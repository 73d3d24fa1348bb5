"""One world for all tests of GRPO runs, with its rewards where workers find them."""

from collections.abc import Iterator
from pathlib import Path

import datasets.config
import pytest

from tests.grpo.world import write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of `write_world`; its rewards can be imported, here and in processes that a test starts."""
    folder = write_world(tmp_path_factory.mktemp("grpo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "rewards")
        patch.setenv("PYTHONPATH", str(folder / "rewards"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder
