from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.grpo.world import opened_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of `opened_world`, one for all runs."""
    with opened_world(tmp_path_factory.mktemp("grpo")) as folder:
        yield folder
