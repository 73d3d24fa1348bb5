import dataclasses

import jax
import jax.numpy as jnp
import pytest

from r1jax.training.profiling import profiled


@dataclasses.dataclass(frozen=True)
class Given:
    step: int


def run(steps, folder, num_steps=6):
    """The steps that went through, each doing some work on the device."""
    seen = []
    for given in profiled((Given(step) for step in range(num_steps)), steps, folder):
        jnp.sin(jnp.full((8, 8), float(given.step))).block_until_ready()
        seen.append(given.step)
    return seen


def trace_files(folder):
    return sorted(folder.rglob("*.xplane.pb"))


@pytest.mark.parametrize("steps", [(2, 3), (6, 6), (5, 90)])
def test_chosen_steps_are_traced(steps, tmp_path):
    """In the middle; the last one; beyond the end: one trace each, closed, with events in it."""
    assert run(steps, tmp_path) == list(range(6))
    (file,) = trace_files(tmp_path)
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    assert sum(1 for plane in planes for line in plane.lines for _ in line.events) > 0


@pytest.mark.parametrize("steps", [None, (7, 8)])
def test_nothing_is_traced_otherwise(steps, tmp_path):
    assert run(steps, tmp_path) == list(range(6))
    assert not trace_files(tmp_path)


def test_a_run_that_stops_inside_ends_the_trace(tmp_path):
    """SIGTERM closes the inputs; another trace can then be started in the same process."""
    for part in ("first", "second"):
        inputs = profiled((Given(step) for step in range(6)), (2, 5), tmp_path / part)
        for _ in range(3):
            next(inputs)
        inputs.close()
        assert len(trace_files(tmp_path / part)) == 1
