"""The estimates that the modelled tables are made of, read from programs of a known shape."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from tests.aot.cycles import Program, Work
from tests.aot.steps import chip

pytestmark = pytest.mark.aot


def compiled(function: Any, *shapes: tuple[int, ...]) -> str:
    place = SingleDeviceSharding(chip("v5p"))
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    text = jax.jit(function).lower(*given).compile().as_text()
    assert text
    return text


def layers(x: Any, kernels: Any) -> Any:
    def layer(x: Any, kernel: Any) -> Any:
        with jax.named_scope("mlp"):
            return x @ kernel, None

    with jax.named_scope("sampling"):
        return jnp.sin(jax.lax.scan(layer, x, kernels)[0])


def test_a_loops_body_counts_as_often_as_it_goes_round():
    found = [Program(compiled(layers, (2048, 1024), (count, 1024, 1024))).cycles() for count in (4, 8)]
    four, eight = (cycles[Work("mlp", True)] for cycles in found)
    assert eight == 2 * four > 0
    # The sine behind the loop, once.
    assert found[0][Work("sampling", False)] == found[1][Work("sampling", False)] > 0


def test_a_loop_that_nobody_can_count_is_refused():
    def until(x: Any, kernel: Any) -> Any:
        return jax.lax.while_loop(lambda x: jnp.max(x) < 1000, lambda x: x @ kernel, x)

    with pytest.raises(ValueError, match="rounds among"):
        Program(compiled(until, (256, 256), (256, 256))).cycles()
